"""Aspect-ratio buckets: images keep their shape through encoding, training and sampling, as exactly as squares do."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import load_config, parse_config
from dit.dataset.aspect_ratios import LONGEST, MAX_SIZES, choose_sizes, cut_share, nearest_size, possible_sizes, side_step
from dit.dataset.decode import open_named, read_named_size
from dit.dataset.reader import read_metadata
from dit.encode import encode as encode_module
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.latents.device_cache import DeviceLatentCache
from dit.model.objectives import Flow
from dit.pipeline.model_folder import read_index
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.sampling import choose_prompts, sample
from dit.sources.writer import DatasetWriter, FetchResult
from dit.training.checkpoint import open_checkpoint
from dit.training.data import choose_bucket, global_batch, read_batch
from dit.training.export import save_model
from dit.training.setup import build_model
from dit.training.validation import validation_losses
from dit.utils.images import labelled_grid
from dit.yaml_file import read_yaml
from helpers import REPO, SHARED
from helpers.cache import write_cache
from helpers.encoding import SHARD_BYTES, contents, encode
from helpers.sources import folder_data, noise_file
from helpers.training import MODEL, OPTIM, TRAIN, run, same

SHAPES = ((4, 8), (8, 4), (8, 8))  # height and width of the latents in three shards
WIDE, HIGH, SQUARE = (80, 48), (48, 80), (64, 64)


@pytest.fixture(scope="module")
def bucket_cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("buckets"), images=30, val=6, shards=3, shapes=SHAPES)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """24 images: 10 twice as wide as high, 8 twice as high as wide, 6 squares."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return write_images(tmp_path / "raw", "files")


def write_images(folder: Path, storage: str) -> Path:
    shapes = [(96, 56)] * 10 + [(70, 120)] * 8 + [(80, 80)] * 6
    writer = DatasetWriter(folder, replace(folder_data(folder, storage=storage), val_fraction=0.25), len(shapes))
    for k, shape in enumerate(np.random.default_rng(0).permutation(shapes).tolist()):
        writer.add(f"images/{k}.png", noise_file(k, tuple(shape)), [f"a red circle number {k}"])
    writer.close(FetchResult())
    return folder


@pytest.mark.parametrize("image_size", [64, 128, 256, 384, 512, 768, 1024])
def test_possible_sizes_have_the_area_of_the_square(image_size):
    step = side_step(image_size)
    for width, height in possible_sizes(image_size):
        assert width % step == 0 == height % step and max(width, height) <= LONGEST * min(width, height)
        assert image_size**2 - step * max(width, height) < width * height <= image_size**2
        assert (height, width) in possible_sizes(image_size)
    assert (image_size, image_size) in possible_sizes(image_size)


@pytest.mark.parametrize(("image", "size", "share"), [((640, 480), (256, 256), 0.25), ((480, 640), (48, 64), 0)])
def test_cut_share_is_that_of_the_area(image, size, share):
    assert cut_share(image, size) == pytest.approx(share)


def test_choose_sizes_suits_the_set():
    photographs = [(640, 480)] * 60 + [(480, 640)] * 30 + [(500, 500)] * 10
    sizes = choose_sizes(photographs, 256)
    assert sizes == [(224, 288), (256, 256), (288, 224)]
    assert [sizes[nearest_size(image, sizes)] for image in [(640, 480), (480, 640), (500, 500)]] == [sizes[k] for k in (2, 0, 1)]
    assert choose_sizes([(4000, 3000)] * 5, 256) == [(288, 224)]  # a square would be trained on nothing


def test_choose_sizes_of_many_shapes_are_few():
    random = np.random.default_rng(0)
    images = [(int(1000 * ratio), 1000) for ratio in random.uniform(0.4, 2.5, 500)]
    sizes = choose_sizes(images, 512)
    assert len(sizes) == MAX_SIZES
    of_squares = np.mean([cut_share(image, (1, 1)) for image in images])
    assert np.mean([cut_share(image, sizes[nearest_size(image, sizes)]) for image in images]) < of_squares / 4


def test_nearest_size_does_not_depend_on_their_order():
    assert [(96, 160), (160, 96)][nearest_size((5, 5), [(96, 160), (160, 96)])] == (96, 160)
    assert [(160, 96), (96, 160)][nearest_size((5, 5), [(160, 96), (96, 160)])] == (96, 160)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_named_size_turns_as_the_image_is_turned(orientation, kind):
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(content, kind, exif=exif)
    size = (20, 40) if orientation > 4 else (40, 20)
    assert read_named_size(content.getvalue(), "x") == size == open_named(content.getvalue(), "x").size


def test_read_named_size_decodes_no_pixels():
    content = io.BytesIO()
    Image.new("RGB", (40, 20)).save(content, "PNG")
    cut_off = content.getvalue().partition(b"IDAT")[0] + b"IDAT"
    assert read_named_size(cut_off, "x.png") == (40, 20)


def test_read_named_size_names_what_cannot_be_read():
    with pytest.raises(UserError, match=r"x\.jpg: not an image"):
        read_named_size(b"nothing of the kind", "x.jpg")


def test_config_buckets_need_a_patch_size_that_divides_their_sides():
    values = read_yaml((REPO / "params.yaml").read_text(encoding="utf-8"), "params.yaml")
    values["coco"]["encode"]["aspect_ratios"] = "buckets"
    assert parse_config(values).coco.encode.aspect_ratios == "buckets"
    values["coco"]["model"]["patch_size"] = 4
    with pytest.raises(UserError, match=r"coco\.encode\.aspect_ratios: .* multiples of 16; model\.patch_size 4 needs"):
        parse_config(values)


def test_encode_buckets_cut_little_and_squares_much(raw, tmp_path):
    squares, buckets = (encode(raw, tmp_path / kind, aspect_ratios=kind) for kind in ("square", "buckets"))
    assert squares["cut_area"] == pytest.approx((10 * (1 - 56 / 96) + 8 * (1 - 70 / 120)) / 24, abs=1e-4)
    of_wide, of_high = 1 - (80 / 48) / (96 / 56), 1 - (70 / 120) / (48 / 80)
    assert buckets["cut_area"] == pytest.approx((10 * of_wide + 8 * of_high) / 24, abs=1e-4)
    cache = LatentCache(tmp_path / "buckets")
    assert cache.sizes == [WIDE, HIGH, SQUARE] and cache.counts == [10, 8, 6]
    assert cache.latent_shapes == [(16, 6, 10), (16, 10, 6), (16, 8, 8)]
    assert "sizes" not in LatentCache(tmp_path / "square").index


def test_encode_buckets_hold_the_whole_image(raw, tmp_path):
    encode(raw, tmp_path / "buckets", aspect_ratios="buckets")
    encode(raw, tmp_path / "square", aspect_ratios="square")
    wide, square = LatentCache(tmp_path / "buckets"), LatentCache(tmp_path / "square")
    names = {rows[0]["image"]: number for number, rows in enumerate(square.captions(np.arange(24)))}
    one = wide.val_buckets[2] if len(wide.val_buckets[2]) else wide.train_buckets[2]
    name = wide.captions(one[:1])[0][0]["image"]
    no = np.zeros(1, dtype=bool)
    of_bucket, of_square = (cache.read(np.array([k]), np.zeros(1), no) for cache, k in ((wide, one[0]), (square, names[name])))
    assert torch.equal(of_bucket.moments, of_square.moments) and torch.equal(of_bucket.tokens, of_square.tokens)


def test_encode_buckets_resumes_to_the_same_bytes(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "SHARD_BYTES", SHARD_BYTES)
    encode(raw, tmp_path / "whole", aspect_ratios="buckets")
    write, written = encode_module.ShardBuffer.write, []

    def write_three(self, *arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments[1])
        write(self, *arguments)

    monkeypatch.setattr(encode_module.ShardBuffer, "write", write_three)
    with pytest.raises(KeyboardInterrupt):
        encode(raw, tmp_path / "parts", aspect_ratios="buckets")
    monkeypatch.setattr(encode_module.ShardBuffer, "write", write)
    encode(raw, tmp_path / "parts", aspect_ratios="buckets")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_encode_buckets_of_tar_shards_are_those_of_files(raw, tmp_path):
    encode(raw, tmp_path / "of_files", aspect_ratios="buckets")
    encode(write_images(tmp_path / "shards", "shards"), tmp_path / "of_shards", aspect_ratios="buckets")
    assert contents(tmp_path / "of_files") == contents(tmp_path / "of_shards")


def test_encode_buckets_makes_random_crops_of_their_shape(raw, tmp_path):
    encode(raw, tmp_path / "crops", aspect_ratios="buckets", crops=2)
    cache = LatentCache(tmp_path / "crops")
    assert cache.augmentations == 6 and cache.sizes == [WIDE, HIGH, SQUARE]


@pytest.mark.skipif(not (SHARED / "coco-mirror").is_dir(), reason="the folder of real COCO images is not beside this repository")
def test_choose_sizes_of_coco_cut_a_seventh_of_what_squares_cut():
    found = [Image.open(path).size for path in sorted((SHARED / "coco-mirror").glob("*2017/*.jpg"))]
    sizes = choose_sizes(found, 256)
    assert len(sizes) <= MAX_SIZES
    squares = np.mean([cut_share(size, (1, 1)) for size in found])
    assert np.mean([cut_share(size, sizes[nearest_size(size, sizes)]) for size in found]) < squares / 7


def test_cache_reads_images_of_one_bucket(bucket_cache):
    first = bucket_cache.train_buckets[1][:3]
    assert bucket_cache.read(first, np.zeros(3), np.zeros(3, dtype=bool)).moments.shape == (3, 8, 8, 4)
    with pytest.raises(ValueError, match="several buckets"):
        bucket_cache.read(np.array([0, 12]), np.zeros(2), np.zeros(2, dtype=bool))


def test_cache_names_sizes_that_do_not_fit(bucket_cache, tmp_path):
    for path in bucket_cache.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"sizes": index["sizes"][:2]}))
    with pytest.raises(UserError, match=r"index\.json has 2 sizes, the shards 3"):
        LatentCache(tmp_path)


def test_device_cache_reads_the_same_bits(bucket_cache):
    on_device = DeviceLatentCache(bucket_cache, torch.device("cpu"))
    for step in range(8):
        batches = [read_batch(cache, 0, step, 5, True, slice(0, 5)) for cache in (bucket_cache, on_device)]
        for name in vars(batches[0]):
            assert torch.equal(*(getattr(batch, name) for batch in batches))


def test_choose_bucket_of_one_bucket_is_the_step_itself():
    assert [choose_bucket([13], 0, step, 4) for step in range(40)] == [(0, step) for step in range(40)]


def test_choose_bucket_shows_every_image_as_often():
    counts = [50, 23, 7, 0]
    steps = [choose_bucket(counts, 1, step, 4) for step in range(20 * sum(counts) // 4)]
    for bucket, count in enumerate(counts):
        numbers = [number for chosen, number in steps if chosen == bucket]
        assert numbers == list(range(len(numbers)))  # none is left out, none comes twice
        assert abs(len(numbers) - 20 * count / 4) <= 2
    images = np.concatenate([global_batch(np.arange(7), 0, number, 4) for chosen, number in steps if chosen == 2])
    assert max(Counter(images.tolist()).values()) - min(Counter(images.tolist()).values()) <= 1


def test_choose_bucket_mixes_the_buckets_of_an_epoch():
    steps = [choose_bucket([40, 40], 0, step, 4)[0] for step in range(40)]
    assert steps[:20] != steps[20:] and sum(a != b for a, b in zip(steps[:20], steps[1:20], strict=False)) > 5
    assert steps != [choose_bucket([40, 40], 1, step, 4)[0] for step in range(40)]


@pytest.mark.parametrize("train", [{}, {"gradient_accumulation_steps": 3, "batch_size": 2, "early_stopping_patience": 5}])
def test_trainer_of_buckets_resumes_bit_identically(bucket_cache, tmp_path, train):
    whole, summary = run(bucket_cache, tmp_path / "whole", train, {"checkpoint_every": 5})
    assert summary["steps"] == 12
    checkpoint = open_checkpoint(tmp_path / "whole" / "step-00000010.safetensors")
    assert same(run(bucket_cache, tmp_path / "rest", train, resume=checkpoint)[0], whole)


def test_trainer_of_buckets_learns_all_shapes(bucket_cache, tmp_path):
    trained, _ = run(bucket_cache, tmp_path, num_epochs=30, learning_rate=3e-3)
    untrained = build_model(bucket_cache, MODEL, seed=0)
    before, after = (validation_losses(model.eval(), bucket_cache, Flow(), 4)[0] for model in (untrained, trained))
    ends = np.cumsum([len(images) for images in bucket_cache.val_buckets])
    assert len(ends) == 3
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert after[start:end].mean() < before[start:end].mean()


def test_validation_losses_of_some_rows_are_those_of_all_buckets(bucket_cache):
    model = build_model(bucket_cache, MODEL, seed=0).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    whole = validation_losses(model, bucket_cache, Flow(), 4, passes=2)
    assert whole.shape == (2, 6) and len(set(whole.flatten())) == 12
    halves = [validation_losses(model, bucket_cache, Flow(), 1, 2, rows=rows) for rows in np.array_split(np.arange(6), 2)]
    assert np.allclose(np.concatenate(halves, axis=1), whole, rtol=1e-5)


def test_first_val_has_a_share_of_every_bucket(bucket_cache):
    assert [len(images) for images in bucket_cache.first_val(3)] == [1, 1, 1]
    assert sum(len(images) for images in bucket_cache.first_val(600)) == 6


@pytest.fixture
def model(raw, tmp_path):
    """The folder of a random model for the cache of `raw`."""
    encode(raw, tmp_path / "latents", aspect_ratios="buckets")
    cache = LatentCache(tmp_path / "latents")
    torch.manual_seed(0)
    transformer = build_model(cache, MODEL, seed=0)
    torch.nn.init.normal_(transformer.final_layer.linear.weight, std=0.1)
    save_model(tmp_path / "dit", transformer, cache, MODEL, OPTIM, TRAIN)
    return tmp_path / "dit"


def test_pipeline_knows_the_sizes_of_its_training(model, tmp_path):
    pipeline = DiTTextToImagePipeline.from_pretrained(model)
    assert pipeline.trained_sizes == [SQUARE, WIDE, HIGH]
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red circle", num_inference_steps=1).images[0].size == SQUARE
    pipeline.save_pretrained(tmp_path / "export")
    assert DiTTextToImagePipeline.from_pretrained(tmp_path / "export").trained_sizes == [SQUARE, WIDE, HIGH]


def test_pipeline_without_a_square_takes_the_size_of_most_images(model):
    index = json.loads((model / "model_index.json").read_text())
    index["encoders"]["sizes"] = [WIDE, HIGH]
    (model / "model_index.json").write_text(json.dumps(index))
    assert DiTTextToImagePipeline.from_pretrained(model).trained_sizes == [WIDE, HIGH]


def test_sample_generates_captions_at_the_size_of_their_images(model, raw, tmp_path):
    params = load_config(REPO / "params.yaml")
    settings = replace(
        params.sample, num_samples=5, num_inference_steps=1, batch_size=4, prompts=("a blue star",), grid_steps=(1,)
    )
    prompts = choose_prompts(raw, "folder", settings, read_index(model)["encoders"]["sizes"])
    sample(model, prompts, settings, tmp_path / "images", tmp_path / "grids")
    known = {entry.text: Image.open(raw / entry.stored).size for entry in read_metadata(raw)}
    for prompt in prompts:
        width, height = known.get(prompt.text, (1, 1))  # "own" ones have no image
        wanted = SQUARE if width == height else WIDE if width > height else HIGH
        assert Image.open(tmp_path / "images" / prompt.file).size == wanted
    assert len({prompt.size for prompt in prompts}) > 2


@pytest.mark.parametrize("size", [(80, 48), (64, 64)])
def test_labelled_grid_holds_images_of_several_sizes(size):
    colours = [Image.new("RGB", size, "red"), Image.new("RGB", (48, 80), "blue")]
    sheet = labelled_grid(colours, ["one", "two"], columns=2, cell=160)
    found = Counter(sheet.convert("RGB").get_flattened_data())
    factor = 160 // max(size[0], 48)
    assert found[255, 0, 0] == size[0] * size[1] * factor**2 and found[0, 0, 255] == 48 * 80 * factor**2

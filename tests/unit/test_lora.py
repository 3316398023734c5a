"""Adapters: nothing else is trained, a training resumes to the same bits, and the pipeline loads, weighs and merges them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dit import DiTTextToImagePipeline
from dit.errors import UserError
from dit.model.transformer import DiT
from dit.pipeline.lora import apply_loras
from dit.training.checkpoint import Checkpoints
from dit.training.export import export_checkpoint, save_model
from dit.training.init_model import InitModel, load_init
from dit.training.setup import build_trainable
from dit.training.stop import Stopped
from helpers.small_models import save, save_lora
from helpers.training import MODEL, OPTIM, TRAIN, MemoryLogger, run, same

LORA = {"method": "lora", "init_from": "base"}
FILE = "pytorch_lora_weights.safetensors"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def init(cache, tmp_path) -> InitModel:
    model, _ = run(cache, tmp_path / "base_state")
    save_model(tmp_path / "base", model, cache, MODEL, OPTIM, TRAIN)
    return load_init(tmp_path / "base", "base")


def test_lora_trains_adapters_alone_and_saves_both(cache, tmp_path, init):
    logger = MemoryLogger()
    model, summary = run(cache, tmp_path / "state", LORA, init=init, logger=logger)
    save_model(tmp_path / "dit", model, cache, MODEL, OPTIM, replace(TRAIN, **LORA))
    before, merged = load_file(tmp_path / "base" / WEIGHTS), load_file(tmp_path / "dit" / WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    kinds = ("attn.qkv", "cross_attn.kv", "mlp.0")
    assert changed == {f"blocks.{k}.{kind}.weight" for k in range(2) for kind in kinds} and set(merged) == set(before)
    with safe_open(tmp_path / "dit" / "lora" / FILE, "pt") as file:
        adapters, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["lora_adapter_metadata"]  # noqa: SIM118
    assert json.loads(about)["transformer.r"] == 4 and str(tmp_path) not in about
    assert len(adapters) == 12 and all(name.startswith("transformer.blocks.") for name in adapters)
    name = "blocks.1.mlp.0"
    delta = adapters[f"transformer.{name}.lora_B.weight"] @ adapters[f"transformer.{name}.lora_A.weight"]
    assert torch.allclose(merged[f"{name}.weight"], before[f"{name}.weight"] + delta, atol=1e-6)
    assert summary["parameters"] == init.transformer.num_parameters()
    assert any(line.startswith("adapters of rank 4: 0.01 M parameters are trained") for line in logger.lines)


def test_lora_checkpoints_hold_adapters_alone(cache, tmp_path, init):
    run(cache, tmp_path / "state", LORA, init=init)
    names = load_file(tmp_path / "state" / "step-00000008.safetensors")
    assert all(".lora_" in name for name in names if name.startswith(("weights.", "exp_avg", "step.")))
    assert sum(name.startswith("weights.") for name in names) == 12


def test_lora_writes_the_same_bytes_again(cache, tmp_path, init):
    for name in ("one", "two"):
        model, _ = run(cache, tmp_path / f"{name}_state", LORA, init=init)
        save_model(tmp_path / name, model, cache, MODEL, OPTIM, replace(TRAIN, **LORA))
    for path in (f"lora/{FILE}", WEIGHTS, "README.md", "training.json"):
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    assert "as adapters (LoRA) to `base`, which are merged into it," in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "batch_size": 3}])
def test_lora_resumes_to_the_same_bits(cache, tmp_path, init, more):
    whole, _ = run(cache, tmp_path / "whole", LORA | more, init=init)
    stop = MemoryLogger(lambda line: os.kill(os.getpid(), signal.SIGTERM) if line.startswith("step 6/9 loss") else None)
    with pytest.raises(Stopped):
        run(cache, tmp_path / "halves", LORA | more, init=init, logger=stop)
    checkpoint = Checkpoints(tmp_path / "halves", 2).newest(pytest.fail)
    torch.manual_seed(99)
    assert checkpoint.step == 6 and same(run(cache, tmp_path / "halves", LORA | more, init=init, resume=checkpoint)[0], whole)


def test_lora_checkpoint_becomes_a_model(cache, tmp_path, init):
    run(cache, tmp_path / "state", LORA, {"checkpoint_every": 8}, init=init)
    path = tmp_path / "state" / "step-00000008.safetensors"
    export_checkpoint(path, tmp_path / "unfinished")
    found, tensors = load_file(tmp_path / "unfinished" / WEIGHTS), load_file(path)
    a, b = (tensors[f"ema.blocks.0.attn.qkv.lora_{kind}.default.weight"] for kind in "AB")
    base = init.transformer.state_dict()["blocks.0.attn.qkv.weight"]
    assert torch.allclose(found["blocks.0.attn.qkv.weight"], base + b @ a, atol=1e-6) and b.any()
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"train\.init_from: base is not there"):
        export_checkpoint(path, tmp_path / "again")


def test_lora_of_a_layer_that_is_none_names_those_there_are(cache, init):
    train = replace(TRAIN, **LORA, lora=replace(TRAIN.lora, target_modules=("to_q",)))
    with pytest.raises(UserError, match=r"target_modules: to_q is no layer of the transformer; known: x_embedder, .*attn\.qkv"):
        build_trainable(cache, MODEL, train, init)


def test_lora_begins_as_the_model_it_was_given(cache, init):
    begun = build_trainable(cache, MODEL, replace(TRAIN, **LORA), init)
    text = (torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 16))
    inputs = (torch.randn(2, 4, 8, 8), torch.rand(2), *text)
    with torch.no_grad():
        assert torch.equal(begun(*inputs), init.transformer.eval()(*inputs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in `dit`, and adapters of it in `one` and `two`."""
    folder = tmp_path_factory.mktemp("lora")
    save(folder)
    for number, name in enumerate(("one", "two")):
        save_lora(folder / name, seed=number)
    return folder


@pytest.fixture
def pipeline(folder) -> DiTTextToImagePipeline:
    pipeline = DiTTextToImagePipeline.from_pretrained(folder / "dit")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: DiTTextToImagePipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red circle", num_inference_steps=2, generator=generator, output_type="latent").images


def test_pipeline_loads_weighs_and_unloads_adapters(pipeline, folder):
    plain = latents(pipeline)
    pipeline.load_lora_weights(folder / "one", adapter_name="one")
    one = latents(pipeline)
    assert not torch.equal(one, plain)
    pipeline.load_lora_weights(str(folder / "two" / FILE), adapter_name="two")
    pipeline.set_adapters(["one", "two"], [1.0, 0.0])
    assert torch.allclose(latents(pipeline), one, atol=1e-6)
    pipeline.set_adapters(["one", "two"], [0.5, 0.5])
    assert not torch.allclose(latents(pipeline), one, atol=1e-3)
    pipeline.delete_adapters("two")
    pipeline.set_adapters("one")
    assert torch.equal(latents(pipeline), one) and pipeline.get_list_adapters() == {"transformer": ["one"]}
    pipeline.unload_lora_weights()
    assert torch.equal(latents(pipeline), plain) and not pipeline.get_list_adapters().get("transformer")


def test_pipeline_merges_adapters(pipeline, folder):
    plain = latents(pipeline)
    apply_loras(pipeline, [(folder / "one", 0.7), (folder / "two", -1.0)])
    both = latents(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert torch.allclose(latents(pipeline), both, atol=1e-4) and not torch.allclose(both, plain, atol=1e-2)
    assert not any("lora" in name for name in pipeline.transformer.state_dict())


def test_pipeline_takes_alpha_from_the_file(pipeline, folder):
    """Of rank 4 and alpha 8: without the settings in the file, diffusers would take 4."""
    pipeline.load_lora_weights(folder / "one", adapter_name="one")
    layer = pipeline.transformer.blocks[0].attn.qkv
    assert layer.scaling == {"one": 2.0} and layer.lora_alpha == {"one": 8}


def rename(folder: Path, to: Path, change) -> Path:
    to.mkdir()
    save_file({change(name): value for name, value in load_file(folder / "one" / FILE).items()}, to / FILE)
    return to


def test_pipeline_refuses_what_does_not_fit_in_one_line(pipeline, folder, tmp_path):
    plain = latents(pipeline)
    other = rename(folder, tmp_path / "other", lambda name: name.replace("blocks.1.", "blocks.7."))
    foreign = rename(folder, tmp_path / "foreign", lambda name: name.replace("transformer.", "unet."))
    wide = tmp_path / "wide"
    sizes = {"num_layers": 2, "num_heads": 2, "cross_attention_dim": 128, "pooled_projection_dim": 128}
    save_lora(wide, seed=0, transformer=DiT(hidden_size=64, **sizes))
    (tmp_path / "pickle.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    for source, says in {
        other: r"is of another model: this one has no blocks\.7\.attn\.qkv",
        foreign: r"holds unet\..*, which is no adapter of a transformer",
        wide: r"is of another model: its blocks\.0\.\S+ has 64 channels, and this one's 32",
        tmp_path / "pickle.bin": "is no safetensors, and what may hold code is never loaded",
        tmp_path / "empty": f"there is no {FILE} in it",
        tmp_path / "damaged.safetensors": "not readable",
    }.items():
        with pytest.raises(UserError, match=says) as error:
            pipeline.load_lora_weights(source)
        assert "\n" not in str(error.value)
    pipeline.load_lora_weights(folder / "one", adapter_name="one")
    with pytest.raises(UserError, match="adapter_name: one is taken"):
        pipeline.load_lora_weights(folder / "two", adapter_name="one")
    pipeline.unload_lora_weights()
    assert torch.equal(latents(pipeline), plain)


def test_pipeline_that_finds_nothing_says_so(pipeline, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/nothing: no such file or folder, and the Hub has no such adapters"):
        pipeline.load_lora_weights("nobody/nothing")

"""What the page of `dit demo` says of warnings and mistakes, in both languages: every one that users meet has its words."""

from __future__ import annotations

from argparse import Namespace

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio, of the extra demo")

from dit.commands.demo.messages import MESSAGES, on_page
from dit.commands.generate import generation_warnings, merged_already
from dit.commands.inputs import InputImage
from dit.dataset.decode import open_named
from dit.errors import UserError, memory_errors
from dit.model.transformer import DiT
from dit.pipeline.generate import _fewer, load_pipeline
from dit.pipeline.lora import apply_loras
from helpers.small_models import save_lora

CHINESE, ENGLISH = (
    Namespace(headers={"accept-language": language}) for language in ("zh-CN,zh;q=0.9,en;q=0.8", "en-US,en;q=0.9")
)


def is_chinese(line: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in line)


@pytest.fixture(scope="module")
def pipeline(model):
    return load_pipeline(model)


def warnings(pipeline, prompt: str, image: Image.Image | None = None, mask: Image.Image | None = None, **changes) -> list[str]:
    settings = {"negative_prompt": "", "guidance_scale": 1.5, "width": 64, "height": 64} | changes
    inputs = (InputImage(each, "") if each else None for each in (image, mask))
    return list(generation_warnings(pipeline, Namespace(**settings), [prompt], *inputs))


def memory_message(count: int) -> str:
    with pytest.raises(UserError) as error, memory_errors(_fewer(count)):
        raise MemoryError
    return str(error.value)


def image_message(content: bytes) -> str:
    with pytest.raises(UserError) as error:
        open_named(content, "cat.png")
    return str(error.value)


def test_every_warning_and_mistake_of_the_page_has_chinese_words(pipeline, tmp_path):
    noise = Image.effect_noise((96, 64), 90).convert("RGB")
    lines = [
        *warnings(pipeline, "a crimson circle", width=128),
        *warnings(pipeline, "a red crcle " + 90 * "a star and "),
        *warnings(pipeline, "a circle", noise, Image.new("L", (96, 64))),
        *warnings(pipeline, "a circle", noise.resize((128, 128))),
        *warnings(pipeline, "a circle", negative_prompt="a star", guidance_scale=1),
        *merged_already(tmp_path, [(tmp_path / "lora" / "file", 1.0)]),
        *map(memory_message, (4, 1)),
        *map(image_message, (b"", b"nothing", b"<html>", b"\x89PNG\r\n\x1a\n", b"0000ftypheic")),
    ]
    larger = DiT(16, 2, hidden_size=64, num_layers=2, num_heads=2, cross_attention_dim=128, pooled_projection_dim=128)
    save_lora(tmp_path / "other", 0, larger)
    with pytest.raises(UserError) as error:
        apply_loras(pipeline, [(tmp_path / "other", 1.0)])
    lines.append(str(error.value))
    for line in lines:
        said = on_page(CHINESE, line), on_page(ENGLISH, line)
        assert is_chinese(said[0]) and not is_chinese(said[1]), line
        assert not any("--" in words or "batch_size" in words for words in said), said
    assert len(lines) >= 15


def test_numbers_and_names_are_those_of_the_message():
    small = "cat.png: only 9 x 7 pixels; 16 a side are the least"
    assert on_page(CHINESE, small) == "cat.png：只有 9 x 7 像素；每边至少需要 16 像素"
    many = "the GPU ran out of memory; 8 images at once are too many, 4 may fit: --batch_size, in params.yaml sample.batch_size"
    assert on_page(ENGLISH, many) == "the GPU ran out of memory: 8 images at once are too many, 4 may fit"


def test_another_message_is_said_as_it_is_but_for_flags():
    assert on_page(CHINESE, "--output x: no space") == on_page(None, "--output x: no space") == "output x: no space"


def test_messages_are_each_for_one_case():
    assert len({pattern for pattern, _, _ in MESSAGES}) == len(MESSAGES)

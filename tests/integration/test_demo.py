"""`dit demo` in a real browser: draw, change, cancel, compare; two users, two languages, and what users do wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect

from dit.commands.demo.words import ANSWERS, LABELS, reads_chinese
from dit.commands.png import read_facts
from helpers import REPO
from helpers.browser import chromium
from helpers.remotes import free_port
from helpers.small_models import save_lora

PATIENCE = 60_000  # ms
UPLOAD = "input[data-testid$=upload-button]"
# Keeps all that the status of Compare says, one after the other, in window.said.
LISTEN = """() => {
    const status = document.querySelector("#compare_status")
    window.said = []
    new MutationObserver(() => {
        if (window.said.at(-1) !== status.textContent) window.said.push(status.textContent)
    }).observe(status, {childList: true, subtree: true, characterData: true})
}"""


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has this size; its one pixel is never reached."""
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    data, head = content.getvalue(), b"IHDR" + struct.pack(">II", width, height)
    head += data[24:29]  # depth, colour type and three more
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


BOMB = png_of(100_000, 100_000)


class Demo:
    """A running `dit demo`; its images lie in `output`, outside the folder that it was started in and the temporary one."""

    def __init__(self, folder: Path, *models: Path):
        self.folder, self.output, port = folder, folder / "drawings", free_port()
        for name in ("project", "tmp"):
            (folder / name).mkdir()
        save_lora(folder / "project" / "colour" / "lora", seed=3)
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dit.cli", "demo", "--port", str(port), "--no-browser", "--output", str(self.output)]
        for model in models:
            command += ["--checkpoint", str(model)]
        environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")}
        self.log = (folder / "log").open("w")
        background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as a script starts it with &
        places = {"cwd": folder / "project", "stdout": self.log, "stderr": self.log}
        self.process = subprocess.Popen([*background, *command], env=environment, **places)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.address, timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        pytest.fail((folder / "log").read_text())

    def pictures(self) -> set[Path]:
        return set(self.output.glob("*.png"))

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def larger_model(model, tmp_path_factory) -> Path:
    """The same model, which says that it was trained on images of twice the size."""
    folder = tmp_path_factory.mktemp("larger") / "dit"
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["encoders"]["image_size"] *= 2
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def demo(browser, model, larger_model, tmp_path_factory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("demo"), model, larger_model)
    yield demo
    demo.stop()
    assert not list(demo.output.glob(".page-*"))  # what the page has shown and uploaded goes with it
    assert "a request of the page failed" not in (demo.folder / "log").read_text()


def opened(context: BrowserContext, demo: Demo) -> Page:
    page = context.new_page()
    page.goto(demo.address)
    page.wait_for_selector("#draw", timeout=PATIENCE)
    return page


@pytest.fixture
def page(browser, demo) -> Iterator[Page]:
    """The page in a browser of its own, which may speak to nobody but this machine."""
    context = browser.new_context(locale="en-US", viewport={"width": 1280, "height": 1000})
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    yield opened(context, demo)
    context.close()
    assert [url for url in asked if not url.startswith((demo.address, "data:", "blob:"))] == []


def fill(page: Page, name: str, value: str | int) -> None:
    """Fill a field, again where the page takes the value back: in an accordion that has just been opened, it sets its own."""
    field = page.locator(f"#{name} textarea, #{name} input[type=text], #{name} input[type=number]").first
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        field.fill(str(value))
        field.press("Tab")
        if field.input_value() == str(value):
            return
    raise AssertionError(f"{name} is {field.input_value()!r}, and not {value!r}")


def settle(page: Page, words: str = "Done in") -> None:
    expect(page.locator("#status")).to_contain_text(words, timeout=PATIENCE)


def draw(page: Page, demo: Demo, prompt: str, seed: int | None = None, count: int = 1, words: str = "Done in") -> list[Path]:
    """Draw; return the new files, in the order of their names."""
    before = demo.pictures()
    fill(page, "draw-prompt", prompt)
    if seed is not None:
        page.locator("#draw-new_seed input").uncheck()
        fill(page, "draw-seed", seed)
    page.click("#draw")
    deadline = time.monotonic() + PATIENCE / 1000
    while len(demo.pictures() - before) < count and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    settle(page, words)
    return sorted(demo.pictures() - before)


def generated(demo: Demo, model: Path, *arguments: str) -> Path:
    """What `dit generate` writes."""
    path = demo.folder / "by-hand.png"
    command = [sys.executable, "-m", "dit.cli", "generate", "--checkpoint", str(model), *arguments, "--output", str(path)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=demo.folder, env=environment, check=True, capture_output=True)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_draws_saves_and_says_how(page, demo):
    (path,) = draw(page, demo, "a red circle", seed=7)
    facts = read_facts(path)
    assert (facts["prompt"], facts["seed"], facts["width"]) == ("a red circle", "7", "64")
    assert facts["model"].startswith("sha256:")
    page.locator("#gallery button img").first.click()
    expect(page.locator("#facts textarea")).to_have_value(re.compile(r"prompt: a red circle\nseed: 7\n"), timeout=PATIENCE)


@pytest.mark.slow
def test_same_seed_gives_the_picture_that_dit_generate_gives(page, demo, model):
    (first,) = draw(page, demo, "a red circle", seed=7)
    (second,) = draw(page, demo, "a red circle", seed=7)
    (other,) = draw(page, demo, "a red circle", seed=8)
    by_hand = generated(demo, model, "--prompt", "a red circle", "--seed", "7")
    assert (pixels(first) == pixels(second)).all()
    assert (pixels(first) != pixels(other)).any()
    assert (pixels(first) == pixels(by_hand)).all()
    assert read_facts(first) == read_facts(by_hand)


def test_a_new_seed_each_time_gives_another_picture(page, demo):
    (first,), (second,) = draw(page, demo, "a star"), draw(page, demo, "a star")
    assert read_facts(first)["seed"] != read_facts(second)["seed"]


@pytest.mark.slow
def test_shows_the_picture_while_it_is_drawn(page, demo):
    page.click("#draw-settings button")
    fill(page, "draw-steps", 60)
    fill(page, "draw-prompt", "a star")
    page.click("#draw")
    seen = set()
    deadline = time.monotonic() + 60
    while "Done in" not in page.inner_text("#status") and time.monotonic() < deadline:
        images = page.locator("#live img")
        if page.locator("#status progress").count() and images.count():
            seen.add(images.first.get_attribute("src"))
        time.sleep(0.05)
    assert len(seen) >= 3


@pytest.mark.slow
def test_cancel_saves_nothing_and_the_next_one_is_whole(page, demo, model):
    page.click("#draw-settings button")
    fill(page, "draw-steps", 100)
    fill(page, "draw-prompt", "a star")
    before = demo.pictures()
    page.click("#draw")
    expect(page.locator("#status progress")).to_be_visible(timeout=PATIENCE)
    page.click("#draw-cancel")
    settle(page, "Cancelled")
    fill(page, "draw-steps", 12)
    (path,) = draw(page, demo, "a heart")  # at once, and whole: of nothing that the other one has left
    assert demo.pictures() == before | {path}
    again = ["--prompt", "a heart", "--seed", read_facts(path)["seed"], "--num_inference_steps", "12"]
    assert (pixels(path) == pixels(generated(demo, model, *again))).all()


def test_several_pictures_have_consecutive_seeds(page, demo):
    fill(page, "draw-count", 3)
    paths = draw(page, demo, "a star", seed=20, count=3)
    assert [read_facts(path)["seed"] for path in paths] == ["20", "21", "22"]
    expect(page.locator("#gallery button img")).to_have_count(3)


@pytest.mark.slow
def test_draws_again_what_was_chosen(page, demo):
    (first,) = draw(page, demo, "a blue heart", seed=5)
    draw(page, demo, "a star", seed=6)
    page.locator("#gallery button img").nth(1).click()  # the newest is first
    expect(page.locator("#facts textarea")).to_have_value(re.compile("a blue heart"), timeout=PATIENCE)
    before = demo.pictures()
    page.click("#again")
    expect(page.locator("#draw-prompt textarea")).to_have_value("a blue heart", timeout=PATIENCE)
    expect(page.locator("#gallery button img")).to_have_count(3, timeout=PATIENCE)
    (again,) = demo.pictures() - before
    assert (pixels(again) == pixels(first)).all()


@pytest.mark.slow
def test_changes_what_the_brush_has_painted_alone(page, demo, tmp_path):
    source = tmp_path / "source.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(source)
    page.click("#change > button")
    page.set_input_files(UPLOAD, source)
    expect(page.locator("#editor button[aria-label=Pan]")).to_be_enabled(timeout=PATIENCE)  # the picture is there
    box = page.locator("#editor canvas").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.45, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.55, middle, steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    (path,) = draw(page, demo, "a red circle", seed=3)
    facts = read_facts(path)
    assert "image" in facts and "mask" in facts and facts["strength"] == "1.0"
    changed = (pixels(path) != pixels(source)).any(-1)
    assert 20 < changed.sum() < 1000
    assert not changed[:16].any() and not changed[-16:].any()
    before = demo.pictures()
    page.click("#again")  # with the image and the paint that it was made from
    expect(page.locator("#gallery button img")).to_have_count(2, timeout=PATIENCE)
    (again,) = demo.pictures() - before
    assert (pixels(again) == pixels(path)).all() and read_facts(again) == facts


@pytest.mark.slow
def test_chosen_picture_goes_into_the_editor(page, demo):
    draw(page, demo, "a red circle", seed=7)
    page.locator("#gallery button img").first.click()
    page.click("#edit")
    expect(page.locator("#editor button[aria-label=Pan]")).to_be_enabled(timeout=PATIENCE)
    (path,) = draw(page, demo, "a green circle", seed=7)
    facts = read_facts(path)
    assert facts["strength"] == "0.6" and "mask" not in facts


def test_compares_two_settings_from_the_same_seed(page, demo):
    before = demo.pictures()
    page.get_by_role("tab", name="Compare").click()
    fill(page, "compare-prompt", "a star")
    fill(page, "a-steps", 4)
    fill(page, "b-steps", 12)
    page.evaluate(LISTEN)
    page.click("#draw_both")
    expect(page.locator("#compare_status")).to_contain_text("Done in", timeout=PATIENCE)
    one, two = (read_facts(path) for path in sorted(demo.pictures() - before))
    assert (one["num_inference_steps"], two["num_inference_steps"]) == ("4", "12")
    assert one["seed"] == two["seed"]
    assert page.locator("#result_a img").get_attribute("src") != page.locator("#result_b img").get_attribute("src")
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#gallery button img")).to_have_count(2)
    expect(page.locator("#facts textarea")).to_have_value(re.compile("num_inference_steps: 12"))  # the newest
    assert sum("Done in" in words for words in page.evaluate("window.said")) == 1


@pytest.mark.slow
def test_another_model_brings_its_size(page, demo):
    page.click("#draw-settings button")
    page.locator("#draw-model input").click()
    page.get_by_role("option").nth(1).click()
    expect(page.locator("#draw-width input[type=number]")).to_have_value("128", timeout=PATIENCE)
    (path,) = draw(page, demo, "a star", seed=1)
    assert pixels(path).shape == (128, 128, 3)
    assert page.locator("[data-testid=toast-body]").count() == 0  # it was trained on this size


def test_adapters_are_in_a_picture_as_strongly_as_asked_and_not_in_the_next(page, demo, model):
    (plain,) = draw(page, demo, "a star", seed=2)
    page.click("#draw-settings button")
    page.locator("#draw-lora input").click()
    page.get_by_role("option", name="colour/lora").click()
    fill(page, "draw-lora_scale", 0.5)
    (changed,) = draw(page, demo, "a star", seed=2)
    by_hand = generated(demo, model, "--prompt", "a star", "--seed", "2", "--lora", "project/colour/lora:0.5")
    assert read_facts(changed) == read_facts(by_hand) and read_facts(changed)["lora"].endswith(":0.5")
    assert (pixels(changed) == pixels(by_hand)).all() and (pixels(changed) != pixels(plain)).any()
    page.locator("#gallery button img").nth(1).click()
    before = demo.pictures()
    page.click("#again")  # the one without
    expect(page.locator("#gallery button img")).to_have_count(3, timeout=PATIENCE)
    (again,) = demo.pictures() - before
    assert (pixels(again) == pixels(plain)).all() and read_facts(again) == read_facts(plain)


@pytest.mark.slow
def test_two_users_do_not_see_each_others_pictures(browser, demo):
    contexts = [browser.new_context(locale="en-US") for _ in range(2)]
    first, second = (opened(context, demo) for context in contexts)
    before = demo.pictures()
    for page, prompt in ((first, "a red circle"), (second, "a blue star")):
        fill(page, "draw-prompt", prompt)
        page.click("#draw")
    for page in (first, second):
        settle(page)
        expect(page.locator("#gallery button img")).to_have_count(1)
    paths = demo.pictures() - before
    assert {read_facts(path)["prompt"] for path in paths} == {"a red circle", "a blue star"}
    for path in paths:  # nor can one be fetched by its name
        for folder in ("", "drawings/", f"{demo.output}/"):
            assert first.request.get(f"{demo.address}/gradio_api/file={folder}{path.name}").status in (403, 404)
    for context in contexts:
        context.close()


def test_page_and_answers_are_chinese_for_a_chinese_browser(browser, demo):
    context = browser.new_context(locale="zh-CN")
    page = opened(context, demo)
    for name, key in (("draw", "draw"), ("draw-cancel", "cancel")):
        expect(page.locator(f"#{name}")).to_have_text(LABELS[key][1])
    expect(page.locator("#draw-prompt")).to_contain_text(LABELS["prompt"][1])
    (path,) = draw(page, demo, "一个红色的圆", words="完成，用时")
    assert read_facts(path)["prompt"] == "一个红色的圆"
    context.close()


def test_says_which_words_the_model_does_not_know(page, demo):
    draw(page, demo, "a crimson circle", seed=1)
    expect(page.locator("[data-testid=toast-body]").first).to_contain_text("does not know 'crimson'", timeout=PATIENCE)


def test_reload_starts_afresh_and_loses_no_picture(page, demo):
    (path,) = draw(page, demo, "a star")
    page.reload()
    page.wait_for_selector("#draw", timeout=PATIENCE)
    assert page.locator("#gallery button img").count() == 0
    assert path.is_file()
    assert len(draw(page, demo, "a star")) == 1


def test_works_by_keyboard_alone(page, demo):
    before = demo.pictures()
    expect(page.locator("#draw-prompt textarea")).to_be_focused()
    page.keyboard.type("a green cross")
    page.keyboard.press("Enter")
    settle(page)
    assert {read_facts(path)["prompt"] for path in demo.pictures() - before} == {"a green cross"}


def test_fits_a_narrow_window(browser, demo):
    context = browser.new_context(locale="en-US", viewport={"width": 390, "height": 800})
    page = opened(context, demo)
    draw(page, demo, "a star")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    context.close()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("draw-prompt", " ", "Write a prompt first."),
        ("draw-width", 60, "multiples of 16"),
    ],
)
def test_bad_input_is_answered_in_words(page, demo, name, value, words):
    before = demo.pictures()
    fill(page, "draw-prompt", "a star")
    if "prompt" not in name:
        page.click("#draw-settings button")
    fill(page, name, value)
    page.click("#draw")
    expect(page.locator(".toast-body, [data-testid=toast-body]").first).to_contain_text(words, timeout=PATIENCE)
    assert demo.pictures() == before


@pytest.mark.slow
def test_a_picture_of_50_megapixels_is_made_small_first(page, demo, tmp_path):
    source = tmp_path / "huge.png"
    Image.new("RGB", (8000, 6250), (255, 0, 0)).save(source)
    page.click("#change > button")
    page.set_input_files(UPLOAD, source)
    expect(page.locator("#editor button[aria-label=Pan]")).to_be_enabled(timeout=PATIENCE)
    (path,) = draw(page, demo, "a star", seed=1)
    assert pixels(path).shape == (64, 64, 3) and "image" in read_facts(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"GIF89a, or so it says", "image"), (b"", "empty"), (BOMB, "pixels")],
    ids=["other", "empty", "bomb"],
)
def test_a_file_that_is_no_picture_is_refused_in_words(page, tmp_path, content, words):
    source = tmp_path / "file.png"
    source.write_bytes(content)
    page.click("#change > button")
    page.set_input_files(UPLOAD, source)
    expect(page.locator("[data-testid=toast-body]").first).to_contain_text(words, timeout=PATIENCE)


@pytest.mark.slow
def test_a_killed_server_loses_no_picture(browser, model, tmp_path):
    demo = Demo(tmp_path, model)
    context = browser.new_context(locale="en-US")
    page = opened(context, demo)
    (path,) = draw(page, demo, "a star", seed=1)
    page.click("#draw-settings button")
    fill(page, "draw-steps", 100)
    page.click("#draw")
    expect(page.locator("#status progress")).to_be_visible(timeout=PATIENCE)
    demo.stop(signal.SIGKILL)
    context.close()
    assert demo.pictures() == {path} and pixels(path).shape == (64, 64, 3)
    assert list(demo.output.glob("*.part")) == []
    assert {one.name for one in demo.folder.iterdir()} == {"drawings", "log", "project", "tmp"}
    assert [path.name for path in (demo.folder / "project").iterdir()] == ["colour"]  # its adapters: nothing is written elsewhere


@pytest.mark.parametrize(
    ("header", "chinese"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", True),
        ("en-US,en;q=0.9,zh;q=0.5", False),
        ("", False),
        ("de,zh;q=0.4", True),
        ("zh;q=x", False),
    ],
)
def test_language_is_the_one_that_the_browser_prefers(header, chinese):
    assert reads_chinese(header) is chinese


def test_both_languages_say_all():
    assert all(len(words) == 2 and all(words) for words in [*LABELS.values(), *ANSWERS.values()])
    for english, chinese in ANSWERS.values():
        assert set(re.findall(r"{(\w+)", english)) == set(re.findall(r"{(\w+)", chinese))

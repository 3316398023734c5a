"""`dit sweep`: every setting samples the same prompts from the same seeds, and is compared with the best prompt by prompt."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from dit import cli
from dit.commands.sampler_sweep import Setting, cheapest, interval, plot, sweep
from dit.config import load_config
from dit.encoders.loading import EncoderSource
from dit.errors import UserError
from dit.sources import fetch
from dit.utils.files import write_json
from helpers import REPO
from helpers.cache import write_cache

PARAMS = replace(load_config(REPO / "params.yaml"), recipe="shapes")


@pytest.fixture(scope="module")
def project(model, tmp_path_factory):
    """A project that has been run, with a model of random weights."""
    root = tmp_path_factory.mktemp("project")
    values = yaml.safe_load((REPO / "params.yaml").read_text()) | {"recipe": "shapes"}
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(model, root / "models" / "dit")
    fetch(replace(PARAMS.shapes.data, num_samples=40, val_fraction=0.25), root / "data" / "raw", PARAMS.runtime)
    cache = write_cache(root / "data" / "latents")
    index = cache.index | {"clip": EncoderSource("builtin").to_dict()}
    write_json(root / "data" / "latents" / "index.json", index)
    return root


def run(project, settings, params=PARAMS, count=12) -> pd.DataFrame:
    return sweep(params, project / "models" / "dit", project / "data" / "latents", project / "data" / "raw", settings, count)


def test_sweep_compares_settings_prompt_by_prompt(project):
    params = replace(PARAMS, recipe="folder")
    same, other = Setting("euler", 2, 1.0), Setting("euler", 4, 3.0)
    captions = project / "data" / "raw" / "metadata.json"
    before = captions.read_text()
    captions.write_text(before.replace("circle", "cat").replace("square", "dog").replace("star", "sun").replace("heart", "house"))
    try:
        table = run(project, [same, other, same], params, count=6)  # captions that only CLIP can score
    finally:
        captions.write_text(before)
    assert list(table["clip_score"].rank()) in ([1.5, 3, 1.5], [2.5, 1, 2.5])
    assert table["difference"].max() == 0 and table["difference"].min() < 0
    assert table["clip_score"][0] == table["clip_score"][2]
    best = table["clip_score"].idxmax()
    assert np.allclose(table["difference"], table["clip_score"] - table["clip_score"][best])
    assert list(table["evaluations"]) == [2, 8, 2] and (table["seconds"] > 0).all()


def test_sweep_scores_shapes_by_prompt_accuracy(project):
    table = run(project, [Setting("dpm++", 2, 1.0)])
    assert 0 <= table["prompt_accuracy_low"][0] <= table["prompt_accuracy"][0] <= table["prompt_accuracy_high"][0] <= 1
    assert "clip_score" not in table


def test_sweep_prints_that_captions_are_fewer(project, capsys):
    table = run(project, [Setting("euler", 1, 1.0)], replace(PARAMS, recipe="folder"), count=20)
    assert list(table["prompts"]) == [10]
    assert "the validation set has captions for 10 of 20 prompts" in capsys.readouterr().out


def test_sweep_times_settings_in_turns(project, monkeypatch):
    """Each batch takes half as long again as the one before it, were both of as many steps."""
    now, sampled = [0.0], []

    def sample(_pipeline, prompts, steps, scale):
        now[0] += steps * len(prompts) * 1.5 ** len(sampled)
        sampled.append((len(prompts), steps))
        return [Image.new("RGB", (64, 64))] * len(prompts)

    monkeypatch.setattr("dit.commands.sampler_sweep.generate_prompts", sample)
    monkeypatch.setattr("dit.commands.sampler_sweep.time", SimpleNamespace(perf_counter=lambda: now[0]))
    settings = [Setting("euler", 20, 1.0), Setting("euler", 10, 1.0)]
    table = run(project, settings, replace(PARAMS, sample=replace(PARAMS.sample, batch_size=4)), count=11)
    assert sampled == [(4, 1), (4, 20), (4, 10), (4, 20), (4, 10), (3, 20), (3, 10)]
    assert list(table["seconds"]) == pytest.approx([100 * 20 * 1.5, 100 * 10 * 1.5**2])


def test_sweep_makes_batches_of_one_size(project, monkeypatch):
    sizes = []

    def sample(_pipeline, prompts, _steps, _scale):
        sizes.append(len(prompts))
        return [Image.new("RGB", (64, 64))] * len(prompts)

    monkeypatch.setattr("dit.commands.sampler_sweep.generate_prompts", sample)
    run(project, [Setting("euler", 1, 1.0)], replace(PARAMS, sample=replace(PARAMS.sample, batch_size=8)), count=10)
    assert sizes == [5, 5, 5]  # of which the first is for warming up


def test_sweep_refuses_one_caption(tmp_path):
    fetch(replace(PARAMS.shapes.data, num_samples=10, val_fraction=0.1), tmp_path / "raw", PARAMS.runtime)
    with pytest.raises(UserError, match="one validation caption, where two are needed; a larger folder.data.val_fraction helps"):
        sweep(replace(PARAMS, recipe="folder"), tmp_path, tmp_path, tmp_path / "raw", [Setting("euler", 1, 1.0)], 20)


def test_interval_of_paired_difference_is_narrower():
    rng = np.random.default_rng(0)
    first = (rng.random(1000) < 0.9).astype(float)
    second = first.copy()
    second[:10] = 1 - second[:10]
    low, high = interval(first - second, False, 0.95)
    apart = sum(np.ptp(interval(one, True, 0.95)) for one in (first, second))
    assert high - low < apart / 2
    assert low <= (first - second).mean() <= high
    assert high - low == pytest.approx(2 * 1.96 * np.std(first - second, ddof=1) / 1000**0.5, rel=1e-3)


def table_of(*rows) -> pd.DataFrame:
    columns = ["num_inference_steps", "evaluations", "seconds", "prompt_accuracy"]
    table = pd.DataFrame(rows, columns=columns).assign(scheduler="euler", guidance_scale=1.5)
    table["difference"] = table["prompt_accuracy"] - table["prompt_accuracy"].max()
    return table.assign(prompt_accuracy_low=table["prompt_accuracy"] - 0.1, prompt_accuracy_high=table["prompt_accuracy"] + 0.1)


def test_cheapest_has_fewest_evaluations_within_tolerance():
    table = table_of((5, 10, 1.0, 0.90), (10, 20, 9.0, 0.951), (20, 40, 3.0, 0.97), (40, 80, 6.0, 0.968))
    assert cheapest(table, 0.02)["num_inference_steps"] == 10
    assert cheapest(table, 0.0)["num_inference_steps"] == 20
    assert cheapest(table, 0.5)["num_inference_steps"] == 5


def test_plot_has_a_line_for_each_scheduler_and_scale():
    table = pd.concat([table_of((5, 10, 1.0, 0.9), (10, 20, 2.0, 0.95)), table_of((5, 10, 1.0, 0.8)).assign(scheduler="heun")])
    (axes,) = plot(table.reset_index(drop=True)).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["euler, guidance 1.5", "heun, guidance 1.5"]
    assert sorted(text.get_text() for text in axes.texts) == ["10", "5", "5"]


def test_plot_numbers_do_not_overlap():
    """Beside the error bars and apart, also where two lines have points in the same place."""
    rows = table_of((5, 10, 1.0, 0.9), (10, 20, 2.0, 0.95))
    figure = plot(pd.concat([rows, rows.assign(scheduler="heun")], ignore_index=True))
    (axes,) = figure.axes
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    cap = 3 * figure.dpi / 72
    for bar in axes.transData.transform([(seconds, 0.9) for seconds in (1.0, 2.0)])[:, 0]:
        assert all(box.x0 > bar + cap or box.x1 < bar - cap for box in boxes)
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_sweep_command_writes_table_and_plot(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    command = ["sweep", "--num_samples", "6", "--num_inference_steps", "1", "2", "--guidance_scale", "1", "--output", "out/sweep"]
    assert cli.main(command) == 0
    table = pd.read_csv("out/sweep.csv")
    assert list(table["num_inference_steps"]) == [1, 2]
    assert Image.open("out/sweep.png").width > 800
    printed = capsys.readouterr().out
    assert "within 0.02 of the best, the cheapest: stochastic," in printed and "out/sweep.csv" in printed
    assert "6 prompts leave a margin of error" in printed and "the validation set has" not in printed


def test_sweep_output_may_have_a_dot(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    name = tmp_path / "sweep-1.5"
    command = ["--num_samples", "2", "--num_inference_steps", "1", "--guidance_scale", "1", "--output", str(name)]
    assert cli.main(["sweep", *command]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep-1.5.csv", "sweep-1.5.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance_scale", "0.5"], "dit: --guidance_scale: 0.5 is not a number from 1 (which is without guidance) on"),
        (["--guidance_scale", "1.5", "inf"], "dit: --guidance_scale: inf is not a number from 1"),
        (["--guidance_scale", "1.5", "nan"], "dit: --guidance_scale: nan is not a number from 1"),
        (["--tolerance", "nan"], "dit: --tolerance: nan is not a number from 0 on"),
        (["--tolerance", "-0.1"], "dit: --tolerance: -0.1 is not a number from 0 on"),
        (["--output", "."], "dit: --output .: is a folder; name a file in it, such as name"),
        (["--output", "data"], "dit: --output data: is a folder; name a file in it, such as data/name"),
        (["--output", "params.yaml/sweep"], "dit: --output params.yaml/sweep: params.yaml cannot be made: "),
        (["--num_inference_steps", "0"], "dit: --num_inference_steps: 0 is not a positive number"),
        (["--num_samples", "1"], "dit: --num_samples: 1 is not at least 2"),
        (["--checkpoint", "nowhere"], "dit: nowhere: no such folder"),
        (["--scheduler", "ddim"], "dit: scheduler: ddim is for train.objective ddpm"),
    ],
)
def test_sweep_refuses_impossible_flags(project, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(project)
    if flags[0] not in ("--scheduler", "--checkpoint"):
        monkeypatch.setattr("dit.commands.sweep.read_index", None)  # nothing is read before this is refused
    assert cli.main(["sweep", *flags]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit:")]
    assert len(lines) == 1 and lines[0].startswith(message)

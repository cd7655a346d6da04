"""The systems' scripts as a user runs them, on small random pipelines, and the stages that they tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import imageio.v3 as iio
import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import lightcache_fx as lc
from examples import animatediff, animatediff_lightning, easyanimate, modelscope, stable_video_diffusion
from examples.random_pipelines import SMALL
from examples.systems import Video
from lightcache_fx.cli.stages import STAGES, Stopwatch, denoiser_of, watched
from lightcache_fx.measure import measure_peak, measure_stages

# imageio's ffmpeg plugin leaves the pipes of its reader to the garbage collector.
READS_MP4 = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SCRIPTS = {
    script.SYSTEM.name: script
    for script in (stable_video_diffusion, animatediff_lightning, animatediff, modelscope, easyanimate)
}


def run(script: Any, *arguments: object) -> Result:
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@READS_MP4
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("svd-xt", ("--no-chunk", "--no-slice", "--interval", 2), ["one step in 2 full", "swapped to disk"]),
        ("animatediff-lightning", ("--no-chunk", "--no-swap"), ["one step in 2 full"]),
        ("animatediff", ("--plain",), []),
        ("modelscope", ("--no-chunk", "--no-slice", "--no-swap", "--branch", 1), ["one step in 2 full", "branch 1"]),
        ("easyanimate", ("--no-swap", "--no-slice"), ["transformer_blocks.1", "transformer_blocks.2", "peak after"]),
        pytest.param("svd-xt", (), ["one step in 8 full", "swapped to disk", "peak after"], marks=pytest.mark.slow),
        pytest.param("easyanimate", (), ["one step in 2 full", "swapped to", "peak after"], marks=pytest.mark.slow),
    ],
)
def test_each_script_writes_a_video_and_says_what_it_took(name, options, expected, tmp_path):
    script, out = SCRIPTS[name], tmp_path / "new" / "video.mp4"
    frames = script.SYSTEM.small.frames
    result = run(script, "--small", "--steps", 2, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert len(iio.imread(out, plugin="FFMPEG")) == frames
    for text in (script.SYSTEM.title, "random weights", *STAGES, *expected):
        assert text in result.stdout, text
    for absent, option in (("swapped to", "--no-swap"), ("peak after", "--no-chunk"), ("one step in", "--plain")):
        assert option not in options or absent not in result.stdout


def test_scripts_are_published_systems_with_their_sizes():
    assert {name: str(script.SYSTEM.published) for name, script in SCRIPTS.items()} == {
        "svd-xt": "25 x 576 x 1024, 25 steps",
        "animatediff-lightning": "25 x 512 x 512, 8 steps",
        "animatediff": "16 x 512 x 512, 25 steps",
        "modelscope": "25 x 256 x 256, 25 steps",
        "easyanimate": "25 x 512 x 512, 50 steps",
    }


def test_mistakes_are_told_in_a_line():
    missing = run(stable_video_diffusion, "--device", "cpu")
    assert missing.exit_code == 2
    assert "expected a first frame" in missing.output
    impossible = run(animatediff_lightning, "--small", "--interval", 0)
    assert impossible.exit_code == 2
    assert impossible.stdout.startswith("animatediff-lightning: Cache: interval: ")


def test_a_script_loads_what_it_is_told(monkeypatch):
    """Without --random-weights the published weights are asked for, by id and in the device's dtype."""
    asked: list[tuple[str, torch.dtype]] = []

    def load(model: str, **settings: Any) -> Any:
        asked.append((model, settings["dtype"]))
        raise OSError("there is no such model")

    monkeypatch.setattr(modelscope.TextToVideoSDPipeline, "from_pretrained", load)
    result = run(modelscope, "a box", "--device", "cpu")
    assert result.exit_code == 2
    assert result.stdout == "modelscope: there is no such model\n"
    assert asked == [("ali-vilab/text-to-video-ms-1.7b", torch.float32)]


def test_a_transformers_range_ends_before_its_own_last_block():
    pipe = easyanimate.SYSTEM.build(SMALL)
    cut = easyanimate.SYSTEM.policy(pipe, swap=False).cache.cut
    assert cut == lc.Residual(first="transformer_blocks.1", last="transformer_blocks.2")
    assert len(denoiser_of(pipe).transformer_blocks) == 4


@pytest.mark.parametrize("name", ["svd-xt", "modelscope"])
def test_stages_are_told_in_order_whatever_the_pipeline_calls_back(name):
    system = SCRIPTS[name].SYSTEM
    pipe = system.build(SMALL)
    pipe.set_progress_bar_config(disable=True)
    plain = system.generate(pipe, Video(32, 32, 2, 3))
    told: list[str] = []
    pipe.scheduler = watched(pipe.scheduler, told.append)
    again = system.generate(pipe, Video(32, 32, 2, 3))
    assert told == ["denoise", "decode"]
    assert (plain == again).all()


def test_peaks_of_stages_are_those_of_the_whole_and_count_weights():
    system = modelscope.SYSTEM
    pipe = system.build(SMALL)
    pipe.set_progress_bar_config(disable=True)
    watch = Stopwatch(pipe, torch.device("cpu"))

    def generate() -> Any:
        return system.generate(pipe, Video(32, 32, 2, 2))

    generate()
    whole, stages = measure_peak(generate).peak_bytes, watch.peaks(generate)
    weights = sum(w.nbytes for name in ("unet", "vae", "text_encoder") for w in pipe.components[name].parameters())
    assert tuple(stages) == STAGES
    assert max(stages.values()) == whole + weights
    assert set(watch.seconds) == set(STAGES)


def test_memory_is_counted_stage_by_stage():
    def work(begin: Callable[[str], None]) -> torch.Tensor:
        begin("one")
        kept = torch.empty(1000, dtype=torch.uint8)
        begin("two")
        _ = torch.empty(5000, dtype=torch.uint8)
        del _
        begin("three")
        return kept

    found = measure_stages(work)
    assert list(found) == ["one", "two", "three"]
    assert found["one"] == found["three"]
    assert found["two"] - found["one"] == pytest.approx(5000, abs=64)
    assert 1000 <= found["one"] < 1100

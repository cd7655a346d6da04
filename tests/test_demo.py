"""The demo as a user runs it: its files, the figures in them, and what it says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import typer
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from typer.testing import CliRunner, Result

from examples import demo, stable_video_diffusion
from examples.small_model import config
from examples.small_model.sample import first_frame, heldout_clip
from examples.small_model.sprites import NUM_FRAMES
from lightcache_fx.cli.app import app
from lightcache_fx.cli.demo_report import BUSY_CORES
from lightcache_fx.cli.pictures import HEADER, LOOPS, MARGIN, PANEL
from lightcache_fx.cli.stages import STAGES, Meter

STEPS = 4
# imageio's ffmpeg plugin leaves the pipes of its reader to the garbage collector.
READS_MP4 = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SIZE = (PANEL, PANEL)
SHEET = (4 * MARGIN + 3 * PANEL, HEADER + PANEL + MARGIN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of the shipped model's shape, narrower and with random weights."""
    torch.manual_seed(0)
    narrow = config.ModelConfig(vae_channels=(32, 32, 32), unet_channels=(32,))
    unet = config.make_unet(narrow)
    for weight in unet.parameters():
        if not weight.any():  # it starts training from residual branches that are zero; then nothing would differ
            torch.nn.init.normal_(weight, std=0.05)
    folder = tmp_path_factory.mktemp("model")
    StableVideoDiffusionPipeline(
        vae=config.make_vae(narrow),
        image_encoder=config.make_image_encoder(narrow),
        unet=unet,
        scheduler=config.make_scheduler(),
        feature_extractor=config.make_feature_extractor(),
    ).save_pretrained(folder)
    first_frame(heldout_clip(0)).save(folder / "first_frame.png")
    (folder / "example.yaml").write_text("{image: first_frame.png, height: 32, width: 32}\n")
    return folder


def _run(*arguments: object, main: Any = None) -> Result:
    if main is None:
        return CliRunner().invoke(app, ["demo", *(str(argument) for argument in arguments)])
    script = typer.Typer()
    script.command()(main)
    return CliRunner().invoke(script, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run of the demo: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = _run("--model", model, "--out", out, "--steps", STEPS, "--repeats", 2)
    assert result.exit_code == 0, result.output
    return out, result.stdout


@pytest.fixture(scope="module")
def report(results: tuple[Path, str]) -> Any:
    return json.loads((results[0] / "report.json").read_text())


@pytest.fixture(scope="module")
def frames(results: tuple[Path, str]) -> dict[str, np.ndarray]:
    with np.load(results[0] / "frames.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("name", "size"), [("plain.gif", SIZE), ("accelerated.gif", SIZE), ("side_by_side.gif", SHEET)]
)
def test_gifs(results: tuple[Path, str], name: str, size: tuple[int, int]) -> None:
    with Image.open(results[0] / name) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (NUM_FRAMES, size, 0)


def test_gif_shows_the_frames(results: tuple[Path, str], frames: dict[str, np.ndarray]) -> None:
    shown = iio.imread(results[0] / "accelerated.gif")[:, ::8, ::8] / 255
    assert np.abs(shown - frames["accelerated"]).mean() < 0.05  # 256 colours a frame


def test_contact_sheet(results: tuple[Path, str]) -> None:
    with Image.open(results[0] / "contact_sheet.png") as sheet:
        assert sheet.size == (MARGIN + NUM_FRAMES * (PANEL + MARGIN), MARGIN + 3 * (HEADER + PANEL + MARGIN))


@READS_MP4
def test_mp4(results: tuple[Path, str]) -> None:
    video = iio.imread(results[0] / "side_by_side.mp4", plugin="FFMPEG")
    assert video.shape == (LOOPS * NUM_FRAMES, *SHEET[::-1], 3)
    paper = video[:, : HEADER // 4]
    assert paper.min() > 200, "the labels reach the upper edge, or the margin is not bright"


def test_plot_is_a_picture(results: tuple[Path, str]) -> None:
    with Image.open(results[0] / "stages.png") as plot:
        assert plot.size == (1080, 432)


def test_times_and_ratios_agree(report: Any) -> None:
    seconds = report["seconds"]
    for name, runs in report["runs_seconds"].items():
        assert len(runs) == 2
        for stage in STAGES:
            assert seconds[name][stage] == pytest.approx(np.median([run[stage] for run in runs]))
        assert seconds[name]["total"] == pytest.approx(sum(seconds[name][stage] for stage in STAGES))
    for ratio, stage in (("pipeline", "total"), ("denoise", "denoise")):
        assert report["speedup"][ratio] == pytest.approx(seconds["plain"][stage] / seconds["accelerated"][stage])
        flops = [report["flops"][name][stage] for name in ("plain", "accelerated")]
        assert report["flop_bound_speedup"][ratio] == pytest.approx(flops[0] / flops[1])


def test_a_busy_machine_is_noted(results: tuple[Path, str], report: Any) -> None:
    busy = min(report["cores"].values()) < BUSY_CORES
    assert len(report["notes"]) == busy
    assert ("note:" in results[1]) == busy
    assert ("Note:" in (results[0] / "report.md").read_text()) == busy


def test_the_steps_and_what_they_keep(report: Any) -> None:
    assert report["steps"] == {"full": 2, "reuse": 2}
    assert report["cache"]["slots"] == 1
    assert (
        report["cache"]["kept_bytes"] == 2 * NUM_FRAMES * 32 * 8 * 8 * 4
    )  # guidance, frames, channels, latent, float32
    assert report["cache"]["hoisted_bytes"] > 0
    assert set(report["peak_bytes"]["plain"]) == set(STAGES)


def test_decoding_takes_less_and_makes_the_same_frames(report: Any) -> None:
    peaks = report["peak_bytes"]
    assert peaks["accelerated"]["decode"] < 0.75 * peaks["plain"]["decode"]
    assert peaks["accelerated"]["encode"] == peaks["plain"]["encode"]
    assert report["decode_difference"] <= 1e-5


def test_quality_is_that_of_the_saved_frames(report: Any, frames: dict[str, np.ndarray]) -> None:
    quality = report["quality"]
    plain, accelerated = frames["plain"], frames["accelerated"]
    assert quality["psnr_db"] == pytest.approx(peak_signal_noise_ratio(plain, accelerated, data_range=1.0))
    assert quality["max_difference"] == pytest.approx(np.abs(plain - accelerated).max())
    assert 0 < quality["ssim"] < 1
    assert not quality["identical"]


def test_the_table_shows_what_the_report_says(results: tuple[Path, str], report: Any) -> None:
    out, printed = results
    markdown = (out / "report.md").read_text()
    for text in (f"{report['quality']['psnr_db']:.2f} dB", "2 full, 2 reuse", f"{report['speedup']['denoise']:.2f}×"):
        assert text in printed
        assert text in markdown


def test_interval_1_gives_identical_frames(model: Path, tmp_path: Path) -> None:
    assert _run("--model", model, "--out", tmp_path, "--steps", 2, "--repeats", 1, "--interval", 1).exit_code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    quality = {"psnr_db": None, "ssim": 1.0, "max_difference": 0.0, "identical": True, "data_range": 1.0}
    assert report["quality"] == quality
    assert report["steps"] == {"full": 2, "reuse": 0}
    assert "identical frames" in (tmp_path / "report.md").read_text()
    with np.load(tmp_path / "frames.npz") as arrays:
        assert arrays["plain"].tobytes() == arrays["accelerated"].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "there is no folder nowhere, and it is no model id"),
        (["--interval", 0], "interval: Input should be greater than or equal to 1, got 0"),
        (["--steps", 0], "--steps must be at least 1, got 0"),
        (["--repeats", -1], "--repeats must be at least 1, got -1"),
        (["--policy", "nowhere.yaml"], "no policy file nowhere.yaml"),
        (["--policy", "bad.yaml"], "unknown key 'cashe'; did you mean 'cache'?"),
    ],
)
def test_mistakes_give_one_line(
    arguments: list[object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("cashe: {cut: 0, interval: 3}\n")
    result = _run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("lightcache-fx: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_broken_weights_and_impossible_cuts_give_one_line(model: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("cache: {cut: up_blocks.0.attention, interval: 3}\n")
    cut = _run("--model", model, "--out", tmp_path, "--policy", policy)
    assert (cut.exit_code, cut.stderr.count("\n")) == (2, 1), cut.stderr
    assert "up_blocks.0.attention" in cut.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text((model / "model_index.json").read_text())
    missing = _run("--model", broken, "--out", tmp_path)
    assert (missing.exit_code, missing.stderr.count("\n")) == (2, 1), missing.stderr
    assert missing.stderr.startswith("lightcache-fx: cannot load the pipeline in ")


def test_the_script_gives_the_command_a_held_out_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def command(arguments: list[str], prog_name: str) -> None:
        given.extend(arguments)
        with Image.open(arguments[arguments.index("--image") + 1]) as image:
            assert (np.asarray(image) == np.asarray(first_frame(heldout_clip(3)))).all()

    monkeypatch.setattr(demo, "app", command)
    demo.main(["--clip", "3", "--steps", "4"])
    assert given[0] == "demo"
    assert given[given.index("--argument") + 1] == f"motion_bucket_id={heldout_clip(3).motion_bucket_id}"
    assert given[-2:] == ["--steps", "4"]


def test_meter_counts_bytes_alive_at_once() -> None:
    weight = torch.ones(1000)
    with Meter() as meter:
        meter.stage("encode")
        a = weight.view(10, 100) + 1  # 4000 bytes; the weight itself is not counted
        b = a.t() * 2  # 4000 more
        del a
        meter.stage("denoise")
        c = torch.relu_(b[:5])
        del b, c
        meter.stage("decode")
        torch.mm(torch.ones(4, 8), torch.ones(8, 2))
        meter.stage("done")
    assert meter.peak_bytes == {"encode": 8000, "denoise": 4000, "decode": 4 * (4 * 8 + 8 * 2 + 4 * 2)}
    assert meter.flops == {"encode": 0, "denoise": 0, "decode": 2 * 4 * 8 * 2}


def test_meter_counts_attention_on_a_cpu() -> None:
    query = torch.randn(1, 2, 64, 32)
    with Meter() as meter:
        meter.stage("denoise")
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        meter.stage("done")
    assert meter.flops == {"denoise": 2 * 2 * 2 * 64 * 64 * 32}


@READS_MP4
def test_the_stable_video_diffusion_example(model: Path, tmp_path: Path) -> None:
    image, out = tmp_path / "first.png", tmp_path / "video.mp4"
    first_frame(heldout_clip(0)).save(image)
    size = ("--height", 32, "--width", 32, "--num-frames", NUM_FRAMES)
    result = _run(image, "--model", model, "--out", out, *size, "--steps", 2, main=stable_video_diffusion.main)
    assert result.exit_code == 0, result.output
    assert len(iio.imread(out, plugin="FFMPEG")) == NUM_FRAMES
    assert "one step in 8 full" in result.stdout

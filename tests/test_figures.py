"""The figures' script measures what it draws, and draws anew what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablations, schedulers
from benchmarks.figures import memory, quality
from benchmarks.figures.__main__ import FIGURES, main
from examples.random_pipelines import SMALL
from examples.small_model import sample, sprites
from examples.small_model.measures import psnr_db
from examples.systems import Video
from lightcache_fx.measure import MemoryMoment


def arguments(tmp_path: Path, *given: str) -> list[str]:
    return [*given, "--results", str(tmp_path), "--out", str(tmp_path), "--work", str(tmp_path / "work")]


def read(tmp_path: Path, figure: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / f"figures-{figure}.json").read_text())
    with Image.open(tmp_path / f"{figure}.png") as picture:
        assert min(picture.size) > 400
    assert (tmp_path / f"{figure}.svg").read_text().startswith("<?xml")
    return found


def test_similarity(tmp_path: Path) -> None:
    main(arguments(tmp_path, "similarity", "--clips", "1"))
    result = read(tmp_path, "similarity")
    matrices = result["models"]["unet"]["similarity"]
    assert list(matrices) == [f"{side}_blocks.{i}" for side in ("down", "up") for i in range(3)]
    for matrix in matrices.values():
        assert len(matrix) == 25
        assert matrix[3][3] == 1
        assert matrix[3][7] == matrix[7][3]
        assert matrix[3][4] > matrix[3][20]  # what caching lives on


@pytest.mark.slow
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "BENCH", SMALL)
    monkeypatch.setattr(memory, "VIDEO", Video(32, 32, 3, 2))
    main(arguments(tmp_path, "memory", "--steps", "2"))
    ways = read(tmp_path, "memory")["ways"]
    assert list(ways) == ["plain", "DeepCache", "ours"]
    for way in ways.values():
        assert list(way["begins"]) == list(way["peaks"]) == ["encode", "denoise", "decode"]
        assert max(way["bytes"]) == max(way["peaks"].values()) > way["resident"]
    assert ways["ours"]["resident"] < ways["plain"]["resident"] == ways["DeepCache"]["resident"]


def test_a_curve_keeps_every_peak() -> None:
    moments = [
        MemoryMoment(0.0, 5, None), MemoryMoment(1.0, 7, "encode"), MemoryMoment(2.0, 900, "denoise"),
        MemoryMoment(2.0001, 8, "denoise"), MemoryMoment(5.0, 60, "decode"), MemoryMoment(7.0, 6, "decode"),
    ]  # fmt: skip
    found = memory.curve(moments, resident=100)
    assert found["seconds"] == 6
    assert found["begins"] == {"encode": 0, "denoise": 1, "decode": 4}
    assert found["peaks"] == {"encode": 107, "denoise": 1000, "decode": 160}
    heights = found["bytes"]
    assert len(heights) == memory.BINS
    assert max(heights) == heights[100] == 1000
    assert set(heights[:100]) == {107}
    assert set(heights[101:400]) == {108}
    assert set(heights[400:599]) == {160}
    assert heights[599] == 160  # the last interval begins with it


@pytest.mark.slow
def test_quality_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "INTERVALS", (2,))
    monkeypatch.setattr(quality, "STEPS", 4)
    main(arguments(tmp_path, "quality", "--clips", "2"))
    result = read(tmp_path, "quality")
    rows = result["scores"]["ours"]["2"]
    assert [sorted(row) for row in rows] == [sorted(quality.MEASURES)] * 2
    assert rows[0] != rows[1]
    assert all(15 < row["psnr"] < 60 for row in rows)
    assert result["flop_speedup"]["2"] > 1.2
    kept = tmp_path / "work" / "ours-2-2.json"
    kept.write_text(json.dumps([{**row, "psnr": 1.5} for row in rows]))
    main(arguments(tmp_path, "quality", "--clips", "2"))
    again = json.loads((tmp_path / "figures-quality.json").read_text())["scores"]
    assert [row["psnr"] for row in again["ours"]["2"]] == [1.5, 1.5]
    assert again["DeepCache"] == result["scores"]["DeepCache"]


@pytest.mark.parametrize("figure", FIGURES)
def test_drawn_anew_from_what_is_kept(figure: str, tmp_path: Path) -> None:
    main([figure, "--draw", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {f"{figure}.png", f"{figure}.svg"}


def test_schedulers_of_discrete_times_make_the_videos_of_those_of_continuous_ones() -> None:
    """At the same noise levels DDIM's step without noise is Euler's, so only the way in which time is told differs."""
    clips = []
    for name in ("Euler", "DDIM"):
        pipe = schedulers.with_scheduler(sample.load_pipeline(), name)
        clips.append(schedulers.MODELS["svd-sprites"].generate(pipe, 0, 6).astype(float))
    assert np.abs(clips[0] - clips[1]).mean() < 1
    real = sprites.render_clip(sample.heldout_clip(0)).transpose(0, 2, 3, 1)
    assert psnr_db(clips[0], real) > 20


@pytest.mark.slow
def test_ablations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "BENCH", SMALL)
    monkeypatch.setattr(ablations, "VIDEO", Video(32, 32, 3, 2))
    some = {name: ablations.PARTS[name] for name in ("plain", "cache", "cache, swap, chunk, slice")}
    monkeypatch.setattr(ablations, "PARTS", some)
    monkeypatch.setattr(ablations, "LEAST", "70%")
    out = tmp_path / "ablations.json"
    small = ["--steps", "3", "--rounds", "2", "--clips", "1", "--frames", "2", "4", "--intervals", "1", "2"]
    main = [*small, "--branches", "0", "--out", str(out), "--pictures", str(tmp_path)]
    ablations.main(["parts", *main])
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == list(some)
    assert parts["plain"]["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0, "count": 2}
    peaks = {name: max(way["peak_bytes"].values()) for name, way in parts.items()}
    assert peaks["cache, swap, chunk, slice"] < peaks["plain"]
    ablations.main(["frames", "settings", "schedulers", "--schedulers", "Euler", "Heun", *main])
    result = json.loads(out.read_text())
    assert result["parts"] == parts  # what was not asked for is kept
    plain = result["frames"]["plain"]
    assert max(plain["4"].values()) > max(plain["2"].values())
    one, two = result["settings"]["rows"]
    assert (one["identical"], one["flop_speedup"]) == (True, 1)
    assert two["psnr"] > 15
    assert two["flop_speedup"] > 1.2
    assert set(result["schedulers"]) == {"svd-sprites", "latte-sprites"}
    for of in result["schedulers"].values():
        assert of["Euler"][0]["calls_per_step"] == 1
        assert of["Heun"][0]["calls_per_step"] == (2 * 3 - 1) / 3
        assert all(row["psnr"] > 10 for rows in of.values() for row in rows)
    page = out.with_suffix(".md").read_text()
    assert "| branch 0 | same, 1.00x | " in page
    assert "| cache, swap, chunk, slice | " in page
    assert (tmp_path / "ablations.png").stat().st_size > 10_000

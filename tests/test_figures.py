"""The figures' script measures what it draws, and draws anew what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.common import RESULTS
from benchmarks.figures import quality
from benchmarks.figures.__main__ import FIGURES, main


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
    assert (RESULTS / f"figures-{figure}.json").exists()

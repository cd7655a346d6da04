"""The report's page: self-contained, every section there, text escaped, and its controls in Chromium where that is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from lightcache_fx.cli.app import app
from lightcache_fx.cli.report_page import by_module, page

VOID = {"meta", "input", "rect", "line", "polygon", "polyline"}
SECTIONS = ["videos", "stages", "memory", "plan", "diff", "quality"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DIFF = ["--- full", "+++ reuse", "@@ -1 +1 @@", "-%a = add(%x)  # up.0.conv", " %b = mul(%x)  # up.0.norm",
        "-%c = add(%x)  # down.1.x", "+%d = slot  # up.0"]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, of three frames."""
    seconds = {"encode": 1.0, "denoise": 2.0, "decode": 1.0, "total": 4.0}
    report = {
        "settings": {"steps": 4, "seed": 0, "torch": "x", "policy": "<script>alert(1)</script>"},
        "speedup": {"pipeline": 2.0},
        "notes": ["a <b>note</b>"],
        "seconds": {"plain": seconds, "accelerated": {name: value / 2 for name, value in seconds.items()}},
    }
    memory = {
        "bytes": [10, 300, 20],
        "begins": {"encode": 0.0, "denoise": 0.3, "decode": 0.6},
        "stage": "denoise",
        "alive": [{"operator": "aten.add.Tensor", "shape": "2 × 3", "bytes": 300}],
    }
    details = {"fps": 8, "memory": {"plain": memory, "accelerated": memory}, "plan": "full & reuse", "diff": DIFF}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "details.json").write_text(json.dumps(details))
    plain = np.random.default_rng(0).random((3, 8, 8, 3), dtype=np.float32)
    np.savez(tmp_path / "frames.npz", plain=plain, accelerated=plain * np.float32(0.9))
    return tmp_path


class Reader(HTMLParser):
    """Ids of sections, and that what is opened is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.sections = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(dict(attrs)["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID


def test_the_page_holds_every_section_and_needs_nothing_else(folder):
    text = page(folder)
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.sections == SECTIONS
    assert not re.search(r"https?:|//[a-z]+\.|<link|src=", text)
    assert text.count("url(data:image/png;base64,") == 3


def test_text_is_escaped(folder):
    text = page(folder)
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    assert "a &lt;b&gt;note" in text


def test_the_diff_is_gathered_by_module():
    assert [(group["name"], group["gone"], group["new"]) for group in by_module(DIFF)] == [
        ("up.0", 1, 1),
        ("down.1", 1, 0),
    ]


def test_what_is_missing_or_damaged_is_said_in_one_line(folder):
    def refused():
        result = CliRunner().invoke(app, ["report", str(folder / "page.html"), "--run", str(folder)])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        return result.stderr

    (folder / "details.json").write_text("{}")
    assert "not as the demo writes them" in refused()
    (folder / "details.json").unlink()
    assert "has no details.json" in refused()
    assert not (folder / "page.html").exists()


def test_identical_videos(folder):
    frames = np.full((1, 8, 8, 3), 0.5, np.float32)
    np.savez(folder / "frames.npz", plain=frames, accelerated=frames)
    assert "Both videos are identical" in page(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_controls_work_in_chromium(folder, tmp_path):
    probe = """<script>
    slider.value = 2; slider.dispatchEvent(new Event("input"));
    const shown = [document.getElementById("number").textContent];
    for (const video of document.querySelectorAll(".video")) shown.push(video.style.backgroundPositionY);
    button.click(); shown.push(button.textContent); button.click(); shown.push(button.textContent);
    document.title = shown.join("|");
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page(folder).replace("</body>", probe), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    done = subprocess.run(
        [CHROMIUM, *flags, "--enable-logging=stderr", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>3 of 3|100%|100%|100%|Pause|Play</title>" in done.stdout
    assert "CONSOLE" not in done.stderr

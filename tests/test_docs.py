"""Code in the docs runs as it stands, block after block, and its assertions hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


def code_blocks(path: Path) -> list[tuple[int, str]]:
    """`(line, text)` of each block fenced as python."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


@pytest.mark.parametrize(("name", "num_blocks"), [("writing_a_pass.md", 3)])
def test_code_runs(name: str, num_blocks: int) -> None:
    blocks = code_blocks(DOCS / name)
    assert len(blocks) == num_blocks
    namespace: dict[str, object] = {"__name__": "docs"}
    for line, code in blocks:
        exec(compile("\n" * line + code, str(DOCS / name), "exec"), namespace)


def test_caches_of_the_page_can_be_made() -> None:
    (line, code), *_ = code_blocks(DOCS / "caching.md")
    exec(compile("\n" * line + code, "caching.md", "exec"), {"ratios": [1.0, 0.98]})


def test_every_pass_has_a_test_file() -> None:
    root = DOCS.parent
    passes = {path.stem for path in (root / "passes").glob("*.py")} - {"__init__", "normalize"}
    tests = {path.stem.removeprefix("test_") for path in (root / "tests" / "passes").glob("test_*.py")}
    assert passes - tests == set()

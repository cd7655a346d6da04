"""Golden files: text recorded beside the tests, compared exactly, recorded anew only on request.

`UPDATE_GOLDEN=1` (or `make golden`) writes what the tests produce into the files; what changed is then for `git diff`
and its reader. Where CI is set, recording is refused: a pipeline compares and never accepts.
"""

import difflib
import os
from pathlib import Path

import pytest

_OFF = {"", "0", "false", "no"}


def check_golden(text: str, name: str, request_file: str | Path) -> None:
    """Compare `text` with `golden/<name>.txt` beside the test file, or record it.

    Args:
        text: what the test produced; a newline is added at its end.
        name: the golden file's name without suffix.
        request_file: the calling test's `__file__`.
    """
    __tracebackhide__ = True
    path = Path(request_file).parent / "golden" / f"{name}.txt"
    shown = f"{path.parent.parent.name}/golden/{path.name}"
    produced = text + "\n"
    recorded = path.read_text(encoding="utf-8") if path.exists() else None
    if _is_on("UPDATE_GOLDEN"):
        if _is_on("CI"):
            pytest.fail(
                f"{shown}: UPDATE_GOLDEN is refused where CI is set; record golden files by hand", pytrace=False
            )
        if recorded != produced:
            path.parent.mkdir(exist_ok=True)
            path.write_text(produced, encoding="utf-8")
        return
    if recorded is None:
        pytest.fail(f"{shown} is not recorded; if this is right, run with UPDATE_GOLDEN=1:\n{text}", pytrace=False)
    if recorded != produced:
        lines = difflib.unified_diff(
            recorded.splitlines(), produced.splitlines(), f"{shown} (recorded)", "this run", lineterm="", n=10
        )
        message = "\n".join(["the text differs; if this run is right, record it with UPDATE_GOLDEN=1", *lines])
        pytest.fail(message, pytrace=False)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in _OFF

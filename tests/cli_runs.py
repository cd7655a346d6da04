"""The command line, run in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from lightcache_fx.cli.app import app


def run(*arguments: Any, code: int = 0, env: Mapping[str, str | None] | None = None) -> Result:
    """Run a command, which must end with this exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def mistake(*arguments: Any) -> str:
    """The one line of a mistake; nothing else is printed."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("lightcache-fx: ")
    return result.stderr.removeprefix("lightcache-fx: ").rstrip("\n")

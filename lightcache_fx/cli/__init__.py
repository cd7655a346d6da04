"""The command line `lightcache-fx`, also `python -m lightcache_fx`. Needs the extra `cli`."""

from __future__ import annotations

import os
import sys
import warnings

_NEEDED = ("typer", "click", "typing_extensions", "shellingham")


def main() -> None:
    """Run the command that `sys.argv` names; exits with 0, 1 where a comparison failed, or 2 for a mistake."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns as it is imported, if torchvision is not there
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler, by which peaks are measured, tells each use
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' own, which are nothing to a user
    try:
        from lightcache_fx.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        message = f"the command line needs {error.name}, which is not installed: pip install 'lightcache-fx[cli]'"
        print(f"lightcache-fx: {message}", file=sys.stderr)
        sys.exit(2)
    app(prog_name="lightcache-fx")

"""One video, plain and accelerated: `python examples/demo.py --help`.

The command `lightcache-fx demo`, of the small trained model of this folder and a first frame that it has never seen:
held-out clip number `--clip`. All other options are the command's own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples` is a package of the repository
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns as it is imported, if torchvision is not there

import tempfile

from examples.small_model.sample import MODEL_FOLDER, first_frame, heldout_clip
from lightcache_fx.cli.app import app


def main(given: Sequence[str] | None = None) -> None:
    """Make the clip's first frame, and hand over to the command."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--clip", type=int, default=0)
    options, others = parser.parse_known_args(given)
    clip = heldout_clip(options.clip)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / f"clip_{options.clip}.png"
        first_frame(clip).save(image)
        own = ["--model", MODEL_FOLDER, "--image", image, "--argument", f"motion_bucket_id={clip.motion_bucket_id}"]
        app(["demo", *map(str, own), *others], prog_name="demo.py")


if __name__ == "__main__":
    main()

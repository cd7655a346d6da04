"""A saved module in another process, which has neither the model's class nor diffusers, and unpickles nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCRIPT = """
import pickle, sys
import torch
from torch.utils import _pytree as pytree

BLOCKED = {"diffusers", "transformers", "accelerate", "safetensors", "toys", "zoo", "elsewhere"}


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not here", name=name)


def no_pickle(*args, **kwargs):
    raise AssertionError("something is unpickled")


sys.meta_path.insert(0, Blocker())
folder, exchange, method, weights = sys.argv[1:]
torch.set_num_threads(1)
runs = torch.load(f"{exchange}/calls.pt", weights_only=True)
import lightcache_fx as lc

torch.load = pickle.load = pickle.loads = no_pickle
module = lc.load(folder, weights=weights or None)
results = []
for calls in runs:
    lc.reset(module)
    for args, kwargs in calls:
        output = getattr(module, method)(*args, **kwargs)
        results.append([leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)])
counts = dict(lc.inspect(module, method).counts)
assert not BLOCKED & set(sys.modules)
torch.save({"results": results, "counts": counts}, f"{exchange}/results.pt")
"""

Calls = Sequence[tuple[Sequence[Any], dict[str, Any]]]


def run_elsewhere(
    folder: Path, exchange: Path, runs: Sequence[Calls], *, method: str = "forward", weights: str = ""
) -> tuple[list[list[torch.Tensor]], dict[str, int]]:
    """The tensors that every call of every run returned there, and how often each program ran."""
    torch.save([[(tuple(args), kwargs) for args, kwargs in calls] for calls in runs], exchange / "calls.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(exchange), method, weights],
        cwd=exchange,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(exchange / "results.pt", weights_only=True)
    return found["results"], found["counts"]

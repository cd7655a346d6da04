"""What is told of the programs and steps that have run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightcache_fx.compiled import Compiled
from lightcache_fx.stores import Stores


class ProgramRun(NamedTuple):
    """One program of a run.

    Attributes:
        step: the denoising step's index in the run.
        branch: the guidance branch's place in the step.
        program: its name.
        begin: on the clock of `time.perf_counter`.
        seconds: that the host spent in it; a CUDA device may still be at work afterwards.
        kept_bytes: of all branches' slots behind it.
    """

    step: int
    branch: int
    program: str
    begin: float
    seconds: float
    kept_bytes: int


class Observed(NamedTuple):
    """A full step that has run.

    Attributes:
        compiled: what it ran by.
        stores: what its branch keeps now.
        branch: the guidance branch's place in the step.
        step: the denoising step's index in the run.
        tensors: of the call.
        outputs: of the model, as tensors.
    """

    compiled: Compiled
    stores: Stores
    branch: int
    step: int
    tensors: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]

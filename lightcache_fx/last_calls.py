"""A model's last call before another model's, which fetches for that one as well: its plan and its program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightcache_fx.capture import Capture
from lightcache_fx.compiled import Compiled, LastCall
from lightcache_fx.handover import plan_hand_over
from lightcache_fx.ledger import Stretch
from lightcache_fx.liveness import CUDA_BLOCK
from lightcache_fx.policy import Policy
from lightcache_fx.program import BoundProgram, build_last
from lightcache_fx.program_log import log_programs


def make_last(
    compiled: Compiled, index: int, expected: Stretch, module: nn.Module, policy: Policy, device: torch.device
) -> LastCall:
    """What a call does as the last one before another model's; its program is made where it fetches anything.

    Args:
        compiled: takes it, and its program.
        index: the call of the plan's period.
        expected: what the other model runs next.
        module: that the program is bound to.
        policy: of the module.
        device: that the module computes on.
    """
    swap, before = compiled.plan.swap, tuple(expected.first)
    assert swap is not None
    base, name = swap.names[index], f"{swap.names[index]}_last_{index + 1}"
    needs = {weight: like for weight, like in first_needs(before).items() if like.device == device}
    plan = plan_hand_over(swap, index, {weight: _device_bytes(like) for weight, like in needs.items()})
    if not plan.sizes:
        compiled.last[index] = LastCall(before, None, name)
        return compiled.last[index]
    captured = compiled.capture
    assert isinstance(captured, Capture)
    program = build_last(captured, compiled.plan, base, name, plan.transfers, needs)
    log_programs(compiled.plan, {name: program})
    user_names = [leaf.name for leaf in captured.layout.leaves]
    compiled.programs[name] = program
    compiled.bound[name] = BoundProgram(program, module, captured.constants, user_names, settings=policy.compile)
    compiled.last[index] = LastCall(before, plan, name)
    compiled.note_places()
    return compiled.last[index]


def first_needs(programs: Sequence[BoundProgram]) -> dict[str, torch.Tensor]:
    """Fake tensors like the weights that programs in a row find on the device as the first begins, in order of need."""
    first, *others = programs
    needs = first.first_needs()
    for program in others:
        needs |= {name: like for name, like in program.first_needs().items() if name in first.wanted}
    return needs


def _device_bytes(like: torch.Tensor) -> int:
    """Bytes of a tensor as its device's allocator rounds them."""
    rounding = CUDA_BLOCK if like.device.type == "cuda" else 1
    return -(-like.numel() * like.element_size() // rounding) * rounding

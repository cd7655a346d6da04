"""Bodies that are the same are built once; what is remembered of them is what another build gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from axis_rules.vaes import VAES
from graphs import captured
from lightcache_fx import chunk_bodies
from lightcache_fx.axes import Axis
from lightcache_fx.chunk_bodies import Bodies, region_key
from lightcache_fx.chunk_memory import Memory
from lightcache_fx.chunk_planner import Request, plan_program
from lightcache_fx.chunked import build_region
from lightcache_fx.in_place import Overwrite
from lightcache_fx.liveness import timeline
from lightcache_fx.regions import Region, trace_region

AXIS = Axis(0, 8)


def regions(model: Callable[[torch.Tensor], torch.Tensor], *, length: int = 1) -> list[Region]:
    """Every run of `length` calls of a function of 8 x 6 numbers, cut along the 8."""
    order = Memory(captured(model, torch.randn(8, 6)).graph_module.graph).order
    return [trace_region(order[begin : begin + length], AXIS) for begin in range(0, len(order) - length + 1, length)]


def block(sample: torch.Tensor) -> torch.Tensor:
    return sample + F.gelu(sample)


def test_blocks_that_repeat_have_one_key() -> None:
    first, second, third = regions(lambda x: block(block(block(x))), length=2)
    assert region_key(first) == region_key(second) == region_key(third)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x.mul(2).mul(3),  # another number
        lambda x: x.mul(1).mul(True),  # equal, but of another type
        lambda x: x.double().mul(2).mul(2).float().mul(2),  # another type
        lambda x: x.sin().cos(),  # another call
        lambda x: x.reshape(8, 2, 3).transpose(1, 2).sin().contiguous().sin(),  # another layout
    ],
)
def test_what_differs_has_another_key(model: Callable[[torch.Tensor], torch.Tensor]) -> None:
    first, *_, last = regions(model)
    assert region_key(first) != region_key(last)


def test_a_key_says_how_a_region_is_cut_and_what_it_returns() -> None:
    order = Memory(captured(lambda x: (y := x.sin(), y.cos()), torch.randn(8, 8)).graph_module.graph).order
    both, last = trace_region(order, Axis(0, 8)), trace_region(order[1:], Axis(0, 8))
    assert len({region_key(region) for region in (both, last, trace_region(order, Axis(1, 8)))}) == 3


def test_a_body_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Region] = []

    def build(region: Region, *args: object, **options: object) -> object:
        built.append(region)
        return build_region(region, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(chunk_bodies, "build_region", build)
    bodies = Bodies()
    first, second = regions(lambda x: block(block(x)), length=2)
    found = [bodies.peak(region, count, (), 1)[0] for region in (first, second) for count in (2, 4)]
    assert built == [first, first]
    value = 8 * 6 * 4  # of the two that a body makes, it writes the last where it belongs
    assert found == [value // 2, value // 4] * 2


class Checked(Bodies):
    """Builds again what it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: list[int] = []

    def peak(
        self, region: Region, count: int, candidates: Sequence[tuple[int, int]], rounding: int
    ) -> tuple[int, tuple[Overwrite, ...]]:
        found = super().peak(region, count, candidates, rounding)
        module = build_region(region, count, {}, candidates=candidates, rounding=rounding)
        assert found == (module.memory_peak(rounding), module.overwrites)
        self.peaks.append(found[0])
        return found


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("name", ["kl", "svd"])
def test_a_search_remembers_what_is_so(name: str, cuda: bool) -> None:
    graph = captured(VAES[name].decoder(), torch.randn(VAES[name].latent)).graph_module.graph
    bodies = Checked()
    plan_program(graph, Request(int(0.7 * timeline(graph, cuda=cuda).peak_bytes), cuda=cuda), bodies)
    assert len(bodies.peaks) > len(bodies._known) > 1

"""A full step also returns the cut; a slot owns its storage and exactly its own bytes."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

from golden import check_golden
from graphs import Captured, captured
from lightcache_fx import diff
from lightcache_fx.cuts import CutChoice, module_cut, residual_cut
from lightcache_fx.passes.remove_marks import remove_marks
from lightcache_fx.passes.write_cache import write_cache

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor(7)


class Blocks(nn.Module):
    """A stack with a residual stream, a module that returns a view, one that returns its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = Block()
        self.front = Half()
        self.same = nn.Identity()
        self.last = nn.Linear(2, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.first(self.same(sample)) * timestep)
        return self.last(self.front(hidden).cos()) + sample


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.layer(hidden).sin()


class Half(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.chunk(2, dim=-1)[0]


torch.manual_seed(0)
MODEL = Blocks().eval().requires_grad_(False)


def _value(*paths: str) -> tuple[Captured, CutChoice]:
    given = captured(MODEL, X, T, mark=paths)
    return given, module_cut(given.facts, paths, MODEL)


def _residual() -> tuple[Captured, CutChoice]:
    given = captured(MODEL, X, T, mark=["block"])
    return given, residual_cut(given.facts, "block", "block", MODEL)


@pytest.mark.parametrize(
    ("name", "make"),
    [("value", partial(_value, "block")), ("residual", _residual), ("shared_storage", partial(_value, "last"))],
)
def test_golden(name: str, make: partial[tuple[Captured, CutChoice]]) -> None:
    given, cut = make()
    after, _ = given.apply(partial(write_cache, slots=cut.slots), remove_marks, keeps_outputs=False)
    before, _ = given.apply(remove_marks)
    check_golden(diff(before, after), f"write_cache_{name}", __file__)


def test_numbers_of_a_value() -> None:
    given, cut = _value("block", "first")
    after, _ = given.apply(partial(write_cache, slots=cut.slots), remove_marks, keeps_outputs=False)
    result, block, first = given.run(after)
    assert torch.equal(result, given.eager()[0])
    assert torch.equal(first, MODEL.first(X))
    assert torch.equal(block, MODEL.block(MODEL.first(X) * T))


def test_numbers_of_a_residual() -> None:
    given, cut = _residual()
    after, _ = given.apply(partial(write_cache, slots=cut.slots), remove_marks, keeps_outputs=False)
    result, residual = given.run(after)
    entered = MODEL.first(X) * T
    assert torch.equal(result, given.eager()[0])
    assert torch.equal(residual, MODEL.block(entered) - entered)


@pytest.mark.parametrize("path", ["block", pytest.param("front"), pytest.param("same"), "last"])
def test_a_slot_owns_exactly_its_bytes(path: str) -> None:
    """Views, handed-through inputs and returned tensors are copied."""
    given, cut = _value(path)
    after, _ = given.apply(partial(write_cache, slots=cut.slots), remove_marks, keeps_outputs=False)
    result, slot = given.run(after)
    others = [tensor.untyped_storage().data_ptr() for tensor in (X, result)]
    assert slot.untyped_storage().data_ptr() not in others
    assert slot.untyped_storage().nbytes() == cut.kept_bytes == slot.nbytes


def test_two_slots_do_not_share_memory_with_the_result() -> None:
    layers = {"a": nn.Linear(4, 4), "b": nn.Sequential(OrderedDict(c=nn.Linear(4, 4)))}
    nested = nn.Sequential(OrderedDict(layers)).eval().requires_grad_(False)
    given = captured(nested, X, mark=["b.c", "b"])
    cut = module_cut(given.facts, ["b.c", "b"], nested)
    after, _ = given.apply(partial(write_cache, slots=cut.slots), remove_marks, keeps_outputs=False)
    storages = {tensor.untyped_storage().data_ptr() for tensor in given.run(after)}
    assert len(storages) == 3


def test_not_without_slots() -> None:
    given, _ = _value("block")
    after, result = given.apply(partial(write_cache, slots=()))
    assert not result.modified
    assert diff(given.graph_module, after) == ""

"""Types say the strides that a run gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from golden import check_golden
from graphs import Captured, captured
from lightcache_fx import diff
from lightcache_fx.passes.record_layouts import record_layouts


def one_image() -> Captured:
    """Tokens made an image again, in a batch of one: fake kernels take it for channels-last, real ones do not."""

    def model(sample: torch.Tensor) -> torch.Tensor:
        return F.group_norm(sample.transpose(1, 2).reshape(1, 16, 8, 8), 4).sin()

    return captured(model, torch.randn(1, 64, 16), normalized=False)


def test_golden() -> None:
    given = one_image()
    after, result = given.apply(record_layouts)
    assert result.modified
    check_golden(diff(given.graph_module, after), "record_layouts", __file__)


def test_types_are_those_of_real_tensors() -> None:
    after, _ = one_image().apply(record_layouts)
    seen = {}

    class Interpreter(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, torch.Tensor):
                seen[n.name] = (value.stride(), n.meta["val"].stride())
            return value

    Interpreter(after).run(*one_image().call.tensors)
    assert len(seen) == 4
    assert all(real == recorded for real, recorded in seen.values()), seen


def test_a_second_application_does_nothing() -> None:
    _, result = one_image().apply(record_layouts, record_layouts)
    assert not result.modified
    assert result.counts == {"layouts": 0}


def test_numbers_and_shapes_stay() -> None:
    given = one_image()
    after, _ = given.apply(record_layouts)
    assert torch.equal(given.run(after)[0], given.run()[0])


def test_symbolic_sizes_are_left_alone() -> None:
    given = captured(lambda sample: sample[sample > 0].exp(), torch.randn(7), normalized=False)
    _, result = given.apply(record_layouts)
    assert not result.modified

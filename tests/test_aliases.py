"""What a value's storage really is, where the operator's own annotation says only what it may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphs import captured
from lightcache_fx.graphs import alias_root, calls, is_view, outputs, placeholders, storage_root

aten = torch.ops.aten
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")

VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t(),
    "chain": lambda x: x.t().unsqueeze(0).expand(3, 6, 4)[1],
    "split": lambda x: x.split([1, 3])[1],
    "chunk": lambda x: x.chunk(2)[1].t(),
    "reshape that is one": lambda x: x.reshape(2, 12),
    "contiguous already": lambda x: x.contiguous(),
    "its own dtype": lambda x: x.to(torch.float32),
    "its own device": lambda x: aten.to.device(x, CPU, torch.float32),
    "its own device and dtype by name": lambda x: aten.to.dtype_layout(x, dtype=torch.float32, device=CPU),
    "detached": lambda x: x.detach(),
    "its bits as another dtype": lambda x: x.view(torch.int32),
}
COPIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "computed": lambda x: x.exp(),
    "reshape that copies": lambda x: x.t().reshape(24),
    "contiguous, of a view that is not": lambda x: x.t().contiguous(),
    "another dtype": lambda x: x.to(torch.float64),
    "told to copy": lambda x: aten.to.dtype(x, torch.float32, False, True),
    "told to copy to its own device": lambda x: aten.to.device(x, CPU, torch.float32, False, True),
    "another layout": lambda x: aten.to.device(x.view(1, 2, 3, 4), CPU, torch.float32, False, False,
                                               torch.channels_last),
    "a part of results that are not its": lambda x: x.topk(2)[0],
}  # fmt: skip


@pytest.mark.parametrize("name", [*VIEWS, *COPIES])
def test_the_root_is_where_the_memory_is(name: str) -> None:
    given = captured((VIEWS | COPIES)[name], X, normalized=False)
    (result,) = outputs(given.graph_module.graph)
    (source,) = placeholders(given.graph_module.graph)
    really = given.run()[0].untyped_storage()._cdata == X.untyped_storage()._cdata
    assert really == (name in VIEWS)
    assert (alias_root(result) is source) == really


def test_the_root_of_a_copys_view_is_the_copy() -> None:
    graph = captured(lambda x: x.t().reshape(24)[2:].view(11, 2), X).graph_module.graph
    (result,) = outputs(graph)
    assert alias_root(result).target is aten.reshape.default
    assert storage_root(result) is placeholders(graph)[0]  # what it may be


def test_what_takes_two_tensors_is_no_view() -> None:
    graph = captured(lambda x, y: x.expand_as(y), X, X, normalized=False).graph_module.graph
    for node in calls(graph):
        assert alias_root(node) is (node if len(node.all_input_nodes) > 1 else placeholders(graph)[0])


def test_sizes_that_depend_on_data_are_as_annotated() -> None:
    graph = captured(lambda x: x.nonzero().t().unsqueeze(0), X, normalized=False).graph_module.graph
    views = [node for node in calls(graph) if is_view(node)]
    assert views
    assert {alias_root(node).target for node in views} == {aten.nonzero.default}


def test_results_without_any_tensor() -> None:
    graph = captured(lambda x: (x.sum(), x[:, :0].unbind(1)), X, normalized=False).graph_module.graph
    for node in calls(graph):
        alias_root(node)

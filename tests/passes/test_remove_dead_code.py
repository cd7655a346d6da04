"""What no output depends on goes, attention included, which torch marks as impure."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from golden import check_golden
from graphs import apply_to, captured, operators
from lightcache_fx import diff
from lightcache_fx.graphs import placeholders
from lightcache_fx.passes.remove_dead_code import remove_dead_code

X = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))


def _dead_attention(sample: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
    hidden = sample * 2
    attention = F.scaled_dot_product_attention(hidden, hidden, encoder_hidden_states)
    attention = F.dropout(attention.sin(), 0.5, training=True)
    attention.cos().chunk(2, dim=1)
    return hidden + 1


def _alive(sample: torch.Tensor) -> torch.Tensor:
    first, _ = F.scaled_dot_product_attention(sample, sample, sample).chunk(2, dim=1)
    return first


def test_golden() -> None:
    given = captured(_dead_attention, X, X, normalized=False)
    after, result = given.apply(remove_dead_code)
    assert result.modified
    check_golden(diff(given.graph_module, after), "remove_dead_code", __file__)


def test_numbers_and_inputs_that_stay() -> None:
    given = captured(_dead_attention, X, X, normalized=False)
    after, _ = given.apply(remove_dead_code)
    assert torch.equal(given.run(after)[0], X * 2 + 1)
    assert [node.name for node in placeholders(after.graph)] == ["sample", "encoder_hidden_states"]


def test_not_what_the_output_needs() -> None:
    given = captured(_alive, X, normalized=False)
    clean, _ = given.apply(remove_dead_code)  # export itself leaves the unused half of a chunk
    assert torch.equal(given.run(clean)[0], _alive(X))
    assert "aten.scaled_dot_product_attention.default" in operators(clean)


def test_not_a_write() -> None:
    """Where a graph writes in place (tracing keeps that), the write stays, though nobody reads its result."""
    from torch import fx

    from lightcache_fx.graphs import GraphInput

    graph = fx.Graph()  # by hand: export makes writes functional
    x = graph.placeholder("x")
    x.meta = {"val": X, "lightcache_input": GraphInput("user", "x", "latent")}
    copy = graph.call_function(torch.ops.aten.clone.default, (x,))
    write = graph.call_function(torch.ops.aten.add_.Tensor, (copy, 1))
    copy.meta = write.meta = {"val": X}
    graph.output((copy,))
    assert not apply_to(fx.GraphModule(torch.nn.Module(), graph), remove_dead_code).modified
    assert write in graph.nodes


def test_second_application_does_nothing() -> None:
    after, _ = captured(_dead_attention, X, X, normalized=False).apply(remove_dead_code)
    assert not apply_to(after, remove_dead_code).modified

"""A step split behind what it decides by: the two graphs, and that they compute what the whole one does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import fx

from golden import check_golden
from graphs import captured
from lightcache_fx import diff
from lightcache_fx.caching import Adaptive
from lightcache_fx.cuts import depth_cut, module_cut
from lightcache_fx.errors import PassError
from lightcache_fx.graphs import copy_graph, outputs
from lightcache_fx.passes.split_probe import probe_of, split_probe
from lightcache_fx.printer import format_graph
from lightcache_fx.probing import plan_probe
from toys import Denoiser, latent, prompt

MODEL = Denoiser()
CALL = (latent(0), torch.tensor(900), prompt(0))


def test_golden() -> None:
    given = captured(MODEL, *CALL)
    plan = plan_probe(given.facts, Adaptive(threshold=0.1), depth_cut(given.facts, 0), MODEL)
    after, result = given.apply(partial(split_probe, plan=plan))
    check_golden(diff(given.graph_module, after), "split_probe", __file__)
    assert result.modified
    check_golden(format_graph(probe_of(given.graph_module.graph, plan=plan)), "probe_of", __file__)


def test_the_graph_that_is_probed_is_left_as_it_is() -> None:
    given = captured(MODEL, *CALL)
    plan = plan_probe(given.facts, Adaptive(threshold=0.1), depth_cut(given.facts, 0), MODEL)
    graph, _ = copy_graph(given.graph_module.graph)
    probe = probe_of(graph, plan=plan)
    assert format_graph(graph) == format_graph(given.graph_module.graph)
    assert len(outputs(probe)) == 2 + len(plan.handed)


@pytest.mark.parametrize("residual", [False, True])
def test_numbers(residual: bool) -> None:
    """Probe and rest compute what the whole graph does, and the change is what the papers' formula says."""
    given = captured(MODEL, *CALL, mark=["inner", "middle"])
    cut = module_cut(given.facts, ["middle"], MODEL)
    plan = plan_probe(given.facts, Adaptive(threshold=0.1, indicator="inner"), cut, MODEL)
    if residual:  # what `outer` is given beside it, for a base
        plan = replace(plan, base=plan.node)
    rest, _ = given.apply(partial(split_probe, plan=plan))
    probe = fx.GraphModule(given.graph_module, probe_of(given.graph_module.graph, plan=plan))
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(2, 8, generator=generator)
    with torch.no_grad():
        now = MODEL.inner(CALL[0]) * (0 if residual else 1)
    change, indicator, *handed = given.run(probe, state={"indicator": before})
    assert torch.equal(indicator, now)
    assert torch.equal(change, (now - before).abs().mean() / before.abs().mean())
    state = dict(zip((value.node for value in plan.handed), handed, strict=True))
    assert state
    assert torch.equal(given.run(rest, state=state)[0], given.eager()[0])


def test_a_second_application_finds_nothing() -> None:
    given = captured(MODEL, *CALL)
    plan = plan_probe(given.facts, Adaptive(threshold=0.1), depth_cut(given.facts, 0), MODEL)
    once, first = given.apply(partial(split_probe, plan=plan))
    twice, second = given.apply(partial(split_probe, plan=plan), partial(split_probe, plan=plan))
    assert first.modified
    assert not second.modified
    assert format_graph(once.graph) == format_graph(twice.graph)


def test_a_plan_that_hands_nothing_over_changes_nothing() -> None:
    given = captured(MODEL, *CALL)
    plan = plan_probe(given.facts, Adaptive(threshold=0.1), depth_cut(given.facts, 0), MODEL)
    _, result = given.apply(partial(split_probe, plan=replace(plan, handed=())))
    assert not result.modified


def test_a_plan_for_another_graph() -> None:
    given = captured(MODEL, *CALL)
    plan = plan_probe(given.facts, Adaptive(threshold=0.1), depth_cut(given.facts, 0), MODEL)
    with pytest.raises(PassError, match="split_probe: the graph has no node %nowhere"):
        probe_of(given.graph_module.graph, plan=replace(plan, node="nowhere"))

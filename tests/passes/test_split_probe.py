"""A step split behind what it decides by: the two graphs, and that they compute what the whole one does."""

from __future__ import annotations

from functools import partial

import torch

from golden import check_golden
from graphs import captured
from lightcache_fx import diff
from lightcache_fx.caching import Adaptive
from lightcache_fx.cuts import depth_cut
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

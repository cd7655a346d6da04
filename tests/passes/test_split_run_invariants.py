"""What depends on the prompt alone leaves the step; the prologue computes it."""

from __future__ import annotations

from functools import partial

import torch

from golden import check_golden
from graphs import apply_to, captured, operators
from lightcache_fx import diff, format_graph
from lightcache_fx.graphs import input_of, placeholders
from lightcache_fx.hoisting import HoistPlan, plan_hoisting
from lightcache_fx.passes.split_run_invariants import prologue_of, split_run_invariants
from toys import Denoiser, latent, prompt

MODEL = Denoiser()
CALL = (latent(0), torch.tensor(900), prompt(0))


def test_golden() -> None:
    given = captured(MODEL, *CALL)
    plan = plan_hoisting(given.facts, None)
    after, result = given.apply(partial(split_run_invariants, plan=plan))
    assert result.counts == {"values": 1}
    check_golden(diff(given.graph_module, after), "split_run_invariants", __file__)
    check_golden(format_graph(prologue_of(given.graph_module.graph, plan=plan)), "prologue_of", __file__)


def test_numbers() -> None:
    given = captured(MODEL, *CALL)
    plan = plan_hoisting(given.facts, None)
    after, _ = given.apply(partial(split_run_invariants, plan=plan))
    prologue = prologue_of(given.graph_module.graph, plan=plan)
    (held,) = given.run(torch.fx.GraphModule(given.graph_module, prologue))
    assert torch.equal(held, MODEL.middle.embed(CALL[2]))
    assert held.nbytes == plan.num_bytes
    other = (latent(1), torch.tensor(800), CALL[2])
    assert torch.equal(given.run(after, other, {plan.values[0].node: held})[0], MODEL(*other))


def test_the_step_no_longer_reads_the_prompt() -> None:
    given = captured(MODEL, *CALL)
    after, _ = given.apply(partial(split_run_invariants, plan=plan_hoisting(given.facts, None)))
    bindings = [input_of(node) for node in placeholders(after.graph)]
    assert [b.name for b in bindings if b.kind == "user"] == ["sample", "timestep"]
    assert not any(b.name.startswith("middle.embed") for b in bindings)


def test_not_with_an_empty_plan() -> None:
    given = captured(MODEL, *CALL)
    after, result = given.apply(partial(split_run_invariants, plan=HoistPlan()))
    assert not result.modified
    assert operators(after) == operators(given.graph_module)


def test_nothing_is_planned_where_the_prompt_is_of_latent_rate() -> None:
    given = captured(MODEL, *CALL, rates={"encoder_hidden_states": "latent"})
    assert plan_hoisting(given.facts, None) == HoistPlan()


def test_second_application_does_nothing() -> None:
    given = captured(MODEL, *CALL)
    apply = partial(split_run_invariants, plan=plan_hoisting(given.facts, None))
    after, _ = given.apply(apply)
    assert not apply_to(after, apply).modified

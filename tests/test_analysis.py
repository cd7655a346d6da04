"""What is known of a graph before anything is changed: rates, FLOPs, joins, what to hoist, where to cut."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lightcache_fx as lc
from graphs import Captured, captured
from lightcache_fx.cut_search import search_cuts
from lightcache_fx.cuts import measure_cut
from lightcache_fx.errors import CutError
from lightcache_fx.graphs import calls, input_of, module_path, num_bytes, outputs, placeholders
from lightcache_fx.hoisting import plan_hoisting
from lightcache_fx.joins import find_joins
from lightcache_fx.rates import changes_within_run, rates_of
from oracle import assert_bitwise, plain_step
from toys import Denoiser, latent, prompt
from zoo import ZOO

DENOISER = Denoiser()
CALL = (latent(0), torch.tensor(900), prompt(0))
U_NETS = ["sd", "sdxl", "svd"]
TRANSFORMERS = ["dit", "pixart", "sd3"]


@cache
def zoo(name: str) -> Captured:
    model, make_inputs = ZOO[name].build()
    return captured(model, **make_inputs(0))


# Rates ------------------------------------------------------------------------------------------------------------


def test_rates_of_every_node() -> None:
    given = captured(DENOISER, *CALL)
    rates = {node.name: rate for node, rate in rates_of(given.graph_module.graph).items()}
    assert {rates[name] for name in ("inner_weight", "middle_embed_0_bias")} == {"const"}
    assert {rates[name] for name in ("encoder_hidden_states", "linear_1", "silu", "linear_2")} == {"run"}
    assert {rates[name] for name in ("timestep", "to", "div", "sin")} == {"step"}
    assert {rates[name] for name in ("sample", "linear", "mul", "tanh", "cat", "linear_4")} == {"latent"}


def test_declared_rates_come_first() -> None:
    given = captured(DENOISER, *CALL, rates={"encoder_hidden_states": "step", "timestep": "run"})
    rates = {node.name: rate for node, rate in rates_of(given.graph_module.graph).items()}
    assert (rates["silu"], rates["sin"], rates["tanh"]) == ("step", "run", "latent")


def test_random_numbers_count_as_latent() -> None:
    given = captured(
        lambda sample, encoder_hidden_states: sample + torch.randn_like(encoder_hidden_states), *CALL[::2][:1], CALL[0],
        normalized=False,
    )  # fmt: skip
    rates = {str(node.target): rate for node, rate in rates_of(given.graph_module.graph).items()}
    assert rates["aten.randn_like.default"] == "latent"


def test_attention_draws_no_random_numbers() -> None:
    def model(sample: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        keys = encoder_hidden_states.view(1, 1, 2, 4)
        return sample + torch.nn.functional.scaled_dot_product_attention(keys, keys, keys).view(2, 4)

    given = captured(model, latent(0), latent(1))
    rates = {str(node.target): rate for node, rate in rates_of(given.graph_module.graph).items()}
    assert rates["aten.scaled_dot_product_attention.default"] == "run"


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_rates_never_fall_along_an_edge(name: str) -> None:
    order = ("const", "run", "step", "latent")
    rates = rates_of(zoo(name).graph_module.graph)
    for node, rate in rates.items():
        assert all(order.index(rates[source]) <= order.index(rate) for source in node.all_input_nodes)


# FLOPs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", pytest.param("svd", marks=pytest.mark.slow), "dit", "sd3", "pixart"])
def test_flops_are_those_of_torchs_counter(name: str) -> None:
    """In eager with attention spelt out: torch counts the fused attention of CPUs as nothing."""
    given = zoo(name)
    args, kwargs = given.call.layout.rebuild(given.call.tensors)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        given.module(*args, **kwargs)
    assert given.facts.total_flops() == counter.get_total_flops() > 0


class ReadsANumber(nn.Module):
    """Indexes by a tensor without dimensions, whose value is read from it while the graph runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(5.0))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.linear(x) * self.table[step]


def test_reading_a_number_costs_no_flops() -> None:
    x = torch.randn(3, 4)
    given = captured(ReadsANumber().eval(), x, torch.tensor(2))
    assert any(isinstance(node.meta["val"], torch.SymInt) for node in calls(given.graph_module.graph))
    assert given.facts.total_flops() == 2 * 3 * 4 * 4


def test_flops_of_a_cut_program_are_those_of_the_hooked_modules() -> None:
    given = captured(DENOISER, *CALL)
    batch, inner, outer = 2, 2 * 4 * 8, 2 * 16 * 4
    cut = measure_cut(
        given.facts, "branch 0", [(find_joins(given.graph_module.graph, given.facts.flops, given.facts.rates)[0], None)]
    )
    assert cut.reuse_flops == batch * (inner + outer)
    assert cut.reuse_weight_bytes == 4 * (4 * 8 + 8 + 16 * 4 + 4)


# Joins ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", U_NETS)
def test_every_skip_connection_is_found(name: str) -> None:
    given = zoo(name)
    joins = find_joins(given.graph_module.graph, given.facts.flops, given.facts.rates)
    assert len(joins) == _num_skips(given.module)
    order = list(given.graph_module.graph.nodes)
    positions = [order.index(node) for node in joins]
    assert positions == sorted(positions, reverse=True), "the outermost, executed last, comes first"


def _num_skips(unet: Any) -> int:
    """One of the first convolution, one a layer, one a downsampling: what the up path's layers take in."""
    return sum(len(block.resnets) for block in unet.up_blocks)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_no_joins(name: str) -> None:
    given = zoo(name)
    assert find_joins(given.graph_module.graph, given.facts.flops, given.facts.rates) == []


# Hoisting ---------------------------------------------------------------------------------------------------------


def test_the_keys_and_values_of_the_prompt_are_hoisted_from_a_unet() -> None:
    given = zoo("sd")
    hoisted = {value.node for value in plan_hoisting(given.facts, None).values}
    nodes = {node.name: node for node in given.graph_module.graph.nodes}
    makers = {next(iter(reversed(nodes[name].meta["nn_module_stack"].values())))[0] for name in hoisted}
    expected = {path for path, _ in given.module.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))}
    assert makers - {"time_proj"} == expected  # that one is a table of frequencies


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_hoisting_is_bitwise_and_lowers_the_step(name: str) -> None:
    given = zoo(name)
    transformed = lc.transform(given.module, lc.Policy())
    args, kwargs = given.call.layout.rebuild(given.call.tensors)
    assert not args or not kwargs
    with torch.no_grad():
        make_inputs = ZOO[name].build()[1]
        for seed in range(2):
            lc.reset(transformed)
            inputs = make_inputs(seed)
            assert_bitwise(plain_step(transformed, **inputs), plain_step(given.module, **inputs))
    report = lc.inspect(transformed)
    assert report.plan.hoist.values
    assert report.programs["prologue"].flops == report.plan.hoist.flops
    assert report.programs["full"].flops == report.plan.full_flops
    assert report.plan.full_flops + report.plan.hoist.flops == given.facts.total_flops()
    assert report.hoisted_bytes == report.plan.hoist.num_bytes


def test_only_what_pays_is_hoisted() -> None:
    """A scaled prompt costs less than it would take to hold."""

    def model(sample: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return sample @ (encoder_hidden_states * 2)

    given = captured(model, torch.randn(4, 64), torch.randn(64, 64))
    assert plan_hoisting(given.facts, None).values == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_marked_prompt_is_not_hoisted(dtype: torch.dtype) -> None:
    """A mark is no work: the module's argument is the prompt itself, which is held anyway."""
    model = Denoiser().to(dtype)
    given = captured(model, latent(0).to(dtype), torch.tensor(900), prompt(0).to(dtype), mark=["middle"])
    assert len(plan_hoisting(given.facts, None).values) == 1


def test_the_limit_on_hoisted_bytes_is_kept() -> None:
    given = zoo("sd")
    everything = plan_hoisting(given.facts, None)
    half = plan_hoisting(given.facts, everything.num_bytes // 2)
    assert 0 < half.num_bytes <= everything.num_bytes // 2
    assert plan_hoisting(given.facts, 1).values == ()


def test_nothing_is_hoisted_where_the_policy_says_so() -> None:
    transformed = lc.transform(DENOISER, lc.Policy(hoist=False))
    assert torch.equal(transformed(*CALL), DENOISER(*CALL))
    assert list(lc.inspect(transformed).programs) == ["full"]


class JoinsInItsMidst(nn.Module):
    """A block of Stable Cascade: what it is given goes around the layer that the skip is joined to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.deep = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 8))
        self.depthwise, self.channelwise = nn.Linear(8, 8), nn.Linear(16, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        skip = self.inner(sample * timestep)
        given = self.deep(skip)
        return given + self.channelwise(torch.cat([self.depthwise(given), skip], dim=-1))


def test_a_block_that_joins_in_its_midst_is_left_in() -> None:
    given = captured(JoinsInItsMidst().eval(), sample=torch.randn(2, 4), timestep=torch.tensor(9.0))
    (join,) = find_joins(given.graph_module.graph, given.facts.flops, given.facts.rates)
    assert module_path(join) == "deep.2"
    choice = measure_cut(given.facts, "branch 0", [(join, None)])
    assert choice.reuse_flops == 2 * 2 * (4 * 8 + 8 * 8 + 16 * 8)


# The search -------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Narrow and wide stages around one skip, so that kept bytes and FLOPs trade off."""

    def __init__(self, widths: tuple[int, ...] = (8, 32, 4, 16)) -> None:
        super().__init__()
        sizes = (4, *widths, 4)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.outer = nn.Linear(8, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = sample * timestep
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return self.outer(torch.cat([hidden, sample], dim=-1))


def _brute_force(given: Captured) -> list[tuple[int, int]]:
    """`(reuse FLOPs, kept bytes)` of every value after which a reuse step reads the latent and saves something."""
    facts = given.facts
    returned = set(outputs(given.graph_module.graph))
    found = []
    for node in calls(given.graph_module.graph):
        if not changes_within_run(facts.rates[node]) or not isinstance(node.meta["val"], torch.Tensor):
            continue
        try:
            cut = measure_cut(facts, node.name, [(node, None)])
        except CutError:
            continue
        if cut.reads_latent and cut.reuse_flops < facts.total_flops():
            assert node not in returned
            found.append((cut.reuse_flops, cut.kept_bytes))
    return found


@pytest.mark.parametrize("widths", [(8, 32, 4, 16), (4, 8), pytest.param((16,) * 9 + (2, 16, 16) + (16,) * 9)])
def test_auto_picks_the_minimum_under_every_limit(widths: tuple[int, ...]) -> None:
    model = Deep(widths).eval().requires_grad_(False)
    given = captured(model, latent(0), torch.tensor(3))
    singles = _brute_force(given)
    for limit in [None, *sorted({kept for _, kept in singles})]:
        best, table = search_cuts(given.facts, model, limit)
        assert limit is None or best.kept_bytes <= limit
        assert best.reuse_flops <= min(flops for flops, kept in singles if limit is None or kept <= limit)
        assert [c.reuse_flops for c in table] == sorted(c.reuse_flops for c in table)
        assert best in table
    smallest = min(kept for _, kept in singles)
    with pytest.raises(CutError, match=f"max_kept_bytes={smallest - 1} is below the smallest cut, {smallest} bytes"):
        search_cuts(given.facts, model, smallest - 1)


def test_auto_through_the_policy() -> None:
    model = Deep().eval().requires_grad_(False)
    policy = lc.Policy(cache=lc.Cache(cut=lc.Auto(max_kept_bytes=64), interval=2))
    plan = lc.plan(model, (latent(0), torch.tensor(3)), policy=policy)
    assert plan.kept_bytes <= 64
    assert len(plan.candidates) > 2
    text = str(plan)
    assert "candidate cuts, by reuse FLOPs" in text
    assert all(candidate.label.split()[0] in text for candidate in plan.candidates)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_auto_on_the_zoo_is_no_worse_than_its_candidates(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    plan = lc.plan(model, (), make_inputs(0), lc.Policy(cache=lc.Cache(cut="auto", interval=2)))
    assert plan.cut is not None
    assert plan.cut.reads_latent
    assert plan.cut.reuse_flops == min(c.reuse_flops for c in plan.candidates) < plan.full_flops


# Plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [0, "middle", "middle.layer", ["inner", "middle"], lc.Residual(first="middle", last="middle")]
)
def test_kept_bytes_are_exactly_the_cuts(cut: Any) -> None:
    transformed = lc.transform(DENOISER, lc.Policy(cache=lc.Cache(cut=cut, interval=3)))
    transformed(*CALL)
    report = lc.inspect(transformed)
    expected = 2 * 8 * 4 * (2 if isinstance(cut, list) else 1)
    assert report.kept_bytes == report.plan.kept_bytes == expected
    full = report.programs["full"].graph_module.graph
    kept = outputs(full)[report.programs["full"].num_outputs :]
    assert sum(map(num_bytes, kept)) == expected
    reuse = report.programs["reuse"].graph_module.graph
    assert sum(num_bytes(n) for n in placeholders(reuse) if input_of(n).kind == "slot") == expected


def _meta(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), tree)


@pytest.mark.parametrize(("name", "cut"), [("dit", "auto"), ("pixart", "transformer_blocks.1"), ("sd", 0)])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_a_plan_from_no_weights_equals_the_plan_from_real_ones(name: str, cut: Any, kind: str) -> None:
    policy = lc.Policy(cache=lc.Cache(cut=cut, interval=3))
    model, make_inputs = ZOO[name].build()
    inputs = make_inputs(0)
    expected = lc.plan(model, (), inputs, policy)
    if kind == "meta":
        with torch.device("meta"):
            empty = ZOO[name].create().eval().requires_grad_(False)
        found = lc.plan(empty, (), _meta(inputs), policy)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            empty = ZOO[name].create().eval().requires_grad_(False)
            fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs)
        found = lc.plan(empty, (), fake, policy)
    assert found.as_dict() == expected.as_dict()
    assert found == expected


def test_the_plan_says_what_the_schedule_can_gain() -> None:
    plan = lc.plan(DENOISER, CALL, policy=lc.Policy.deepcache(interval=4))
    full, reuse = plan.full_flops, plan.reuse_flops()
    assert plan.flop_bound_speedup(8) == pytest.approx(8 * full / (2 * full + 6 * reuse))
    assert lc.plan(DENOISER, CALL).flop_bound_speedup(8) == 1.0
    assert "one step in 4 full" in str(plan)


def test_a_cut_that_discards_the_latent_is_noted() -> None:
    plan = lc.plan(DENOISER, CALL, policy=lc.Policy(cache=lc.Cache(cut="outer", interval=2)))
    assert any("does not read the current latent" in text and "Residual" in text for text in plan.notes)


class Beside(nn.Module):
    """Most work is beside a small module, whose result changes with the latent too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.body = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.body(sample) * self.gate(sample * timestep)


@pytest.mark.parametrize(("cut", "told"), [("gate", True), ("body", False)])
def test_a_cut_that_saves_next_to_nothing_is_told_of(cut: str, told: bool) -> None:
    """As a DeepCache branch of Stable Cascade, whose blocks work around what is joined."""
    plan = lc.plan(
        Beside().eval(), (torch.randn(2, 4), torch.tensor(9.0)), policy=lc.Policy(cache=lc.Cache(cut=cut, interval=2))
    )
    share = 4 * 4 / (4 * 4 + 2 * 4 * 64)
    expected = f"cut gate saves only {share:.1%} of a step's FLOPs; cut='auto' finds where more is saved"
    assert (expected in plan.notes) == told

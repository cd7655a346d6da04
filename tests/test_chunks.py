"""Chunked programs: equal to the whole ones, within the budget, and refused with reasons where they cannot be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import lightcache_fx as lc
from axis_rules.vaes import VAES
from graphs import Captured, captured
from lightcache_fx import budgets
from lightcache_fx.axes import Axis
from lightcache_fx.caching import Cache, Residual
from lightcache_fx.chunk_planner import ChunkPlan, Request, plan_program
from lightcache_fx.errors import ArgumentError, BudgetError, PolicyError, RegionError
from lightcache_fx.graphs import copy_graph
from lightcache_fx.liveness import timeline
from lightcache_fx.measure import measure_peak
from lightcache_fx.module import capture_and_plan
from lightcache_fx.passes.chunk_regions import Chunking, PlannedRegion, chunked_copy, find_region
from lightcache_fx.passes.split_group_norm import group_norms
from lightcache_fx.policy import Chunk, Decode, Layers, Policy, Region, Swap
from lightcache_fx.program import build_programs, whole_programs
from zoo import ZOO

TOLERANCE = 1e-5
"""Largest error, as a share of the output's largest element."""


def chunked(given: Captured, budget: int, *, at_floor: bool = False) -> tuple[fx.GraphModule, ChunkPlan]:
    """The captured graph cut to a budget; with `at_floor` to the least that is reached where the budget is not."""
    plan = plan_program(given.graph_module.graph, Request(budget))
    assert plan.fits or at_floor, f"the least reached is {plan.peak_after} of {plan.peak_before}, not {budget}"
    graph, _ = copy_graph(given.graph_module.graph)
    plan.chunking.apply(graph)
    modules = {
        str(node.target): node.meta.get("lightcache_region") or given.graph_module.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    return fx.GraphModule(modules, graph), plan


def error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest, over the scale of what is expected."""
    assert len(found) == len(expected)
    return max(
        float((a.double() - b.double()).abs().max() / max(b.double().abs().max(), 1e-30))
        for a, b in zip(found, expected, strict=True)
    )


def assert_equal_at_two_budgets(given: Captured, shares: tuple[float, float] = (0.85, 0.6)) -> None:
    """Equal to the whole program, whether the budget is reached or not, and the predicted peak is the graph's own."""
    whole, peak = given.run(), timeline(given.graph_module.graph).peak_bytes
    for share in shares:
        module, plan = chunked(given, int(share * peak), at_floor=True)
        assert plan.regions, "nothing was cut"
        assert error(given.run(module), whole) <= TOLERANCE
        assert timeline(module.graph).peak_bytes <= 1.05 * plan.peak_after


def zoo_capture(name: str) -> Captured:
    model, make_inputs = ZOO[name].build(torch.float32)
    return captured(model, **make_inputs(seed=0, step=3))


FEW = ("svd", "modelscope", "easyanimate")


@pytest.mark.parametrize("name", FEW)
def test_models(name: str) -> None:
    assert_equal_at_two_budgets(zoo_capture(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in FEW])
def test_every_other_model(name: str) -> None:
    assert_equal_at_two_budgets(zoo_capture(name))


FEW_VAES = ("kl", "svd")


@pytest.mark.parametrize("name", FEW_VAES)
def test_decoders(name: str) -> None:
    assert_equal_at_two_budgets(captured(VAES[name].decoder(), torch.randn(VAES[name].latent)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VAES if name not in FEW_VAES])
def test_every_other_decoder(name: str) -> None:
    assert_equal_at_two_budgets(captured(VAES[name].decoder(), torch.randn(VAES[name].latent)))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VAES))
def test_encoders(name: str) -> None:
    assert_equal_at_two_budgets(captured(VAES[name].encoder(), torch.randn(VAES[name].video)))


# Toys --------------------------------------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """A GEGLU feed-forward with its norm and residual: B L C."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 128), nn.Linear(64, 16)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(self.norm(sample)).chunk(2, dim=-1)
        return sample + self.down(value * F.gelu(gate))


class Resnet(nn.Module):
    """GroupNorm, SiLU and convolution twice, with a residual: N C H W."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = sample
        for norm, conv in zip(self.norms, self.convs, strict=True):
            hidden = conv(F.silu(norm(hidden)))
        return sample + hidden


def given_of(module: nn.Module, *shape: int) -> Captured:
    torch.manual_seed(1)
    return captured(module.eval(), torch.randn(shape) * 2 + torch.arange(shape[-1]))


@pytest.mark.parametrize("length", [64, 101, 97])
def test_uneven_chunks(length: int) -> None:
    given = given_of(FeedForward(), 3, length, 16)
    module, plan = chunked(given, timeline(given.graph_module.graph).peak_bytes // 4)
    assert plan.regions
    assert error(given.run(module), given.run()) <= TOLERANCE


def test_measured_as_predicted() -> None:
    given = given_of(FeedForward(), 4, 500, 16)
    module, plan = chunked(given, 400_000)
    given.run(module)
    real = measure_peak(lambda: given.run(module)).peak_bytes
    assert abs(real / plan.peak_after - 1) <= 0.05
    assert real <= 1.05 * 400_000 < timeline(given.graph_module.graph).peak_bytes / 3


def test_group_norm_is_over_the_whole_value() -> None:
    """Statistics of a strip alone would be wrong by far: the input has a gradient along its rows."""
    given = given_of(Resnet(), 1, 8, 64, 64)
    graph, _ = copy_graph(given.graph_module.graph)
    norms = tuple(group_norms(graph))
    Chunking(norms).apply(graph)
    scaled = [n.name for n in graph.nodes if n.target is torch.ops.aten.addcmul.default]
    convs = [n.name for n in graph.nodes if n.target is torch.ops.aten.conv2d.default]
    rows = Axis(2, 64)
    Chunking(regions=tuple(PlannedRegion(*ends, rows, 5) for ends in zip(scaled, convs, strict=True))).apply(graph)
    regions = {n.name: n.meta["lightcache_region"] for n in graph.nodes if n.op == "call_module"}
    assert any(n.target is torch.ops.aten.addcmul.default for r in regions.values() for n in r.body(0).graph.nodes)
    whole = given.run()
    assert error(given.run(fx.GraphModule(regions, graph)), whole) <= TOLERANCE
    (sample,) = given.call.tensors
    strips = torch.cat([given.module(strip) for strip in sample.chunk(4, dim=3)], dim=3)
    assert error((strips.detach(),), whole) > 1000 * TOLERANCE, "the test could not fail"


def test_frames_come_before_strips() -> None:
    """Where images are independent, whole images are cut before space is, which needs no second pass."""
    given = given_of(Resnet(), 6, 8, 32, 32)
    peak = timeline(given.graph_module.graph).peak_bytes
    module, plan = chunked(given, int(0.7 * peak))
    assert not plan.split_norms
    assert 0 in {region.axis.dim for region in plan.regions}
    assert error(given.run(module), given.run()) <= TOLERANCE


def test_bodies_are_cut_in_turn() -> None:
    given, one = given_of(Resnet(), 6, 8, 64, 64), given_of(Resnet(), 1, 8, 64, 64)
    frame = timeline(one.graph_module.graph).peak_bytes
    module, plan = chunked(given, given.run()[0].nbytes + int(0.1 * frame), at_floor=True)
    assert any(region.bodies for region in plan.regions)
    assert error(given.run(module), given.run()) <= TOLERANCE


def test_two_runs_in_a_row_and_other_inputs() -> None:
    given = given_of(Resnet(), 2, 8, 32, 32)
    module, _ = chunked(given, 1, at_floor=True)
    first = given.run(module)
    other = (torch.randn(2, 8, 32, 32),)
    assert error(given.run(module, other), given.run(tensors=other)) <= TOLERANCE
    assert torch.equal(given.run(module)[0], first[0])


def test_only_batch_like_cuts_of_pointwise_work_are_bitwise() -> None:
    given = captured(lambda sample: (sample.abs() * 3 + 1).clamp(max=2) * sample, torch.randn(40, 30))
    module, plan = chunked(given, 1, at_floor=True)
    assert plan.regions
    assert torch.equal(given.run(module)[0], given.run()[0])


def test_self_attention_keeps_keys_whole() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            query, key, value = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(sample).split(16, dim=-1))
            hidden = F.scaled_dot_product_attention(query, key, value)
            return self.out(hidden.transpose(1, 2).flatten(2)) + sample

    assert_equal_at_two_budgets(given_of(Attention(), 1, 200, 16))


# The public surface -------------------------------------------------------------------------------------------------


def test_transform_keeps_a_budget() -> None:
    module = FeedForward().eval()
    sample = torch.randn(4, 300, 16)
    transformed = lc.transform(module, Policy(chunk=Chunk(budget="250kB")))
    assert error((transformed(sample).detach(),), (module(sample).detach(),)) <= TOLERANCE
    plan = lc.inspect(transformed).plan
    assert plan.chunks["full"].peak_after <= 250_000 < plan.chunks["full"].peak_before
    assert "250" not in str(plan.as_dict()["chunks"]["full"]["regions"])
    assert "chunks" in str(plan)
    assert torch.equal(transformed(sample), transformed(sample))


def test_a_budget_is_a_share_of_what_the_program_takes() -> None:
    module, sample = FeedForward().eval(), torch.randn(4, 300, 16)
    peak = lc.plan(module, (sample,), policy=Policy(chunk=Chunk(budget="100%"))).chunks["full"].peak_before
    chunk = lc.plan(module, (sample,), policy=Policy(chunk=Chunk(budget="40%"))).chunks["full"]
    assert (chunk.peak_before, chunk.budget) == (peak, int(0.4 * peak))
    assert chunk.peak_after <= chunk.budget
    assert chunk.regions


class Scale(nn.Module):
    """Of a number that numpy reads, so that its calls stay opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * float(self.factor.numpy())


def test_a_share_of_a_program_that_calls_a_module() -> None:
    module = nn.Sequential(FeedForward(), Scale()).eval()
    sample = torch.randn(4, 300, 16)
    transformed = lc.transform(module, Policy(chunk=Chunk(budget="60%")))
    assert error((transformed(sample).detach(),), (module(sample).detach(),)) <= TOLERANCE
    report = lc.inspect(transformed)
    assert report.route == "export with 1 opaque"
    assert report.plan.chunks["full"].regions
    assert report.plan.chunks["full"].fits


def test_a_share_is_one_of_what_steps_take_and_refuses_no_prologue() -> None:
    """Most of a prologue's peak are the values that it hands on, which no chunk makes smaller."""
    model, make_inputs = ZOO["animatediff"].build()
    policy = Policy(cache=Cache(cut=0, interval=2), chunk=Chunk(budget="60%"), max_hoisted_bytes="16MiB")
    chunks = lc.plan(model, kwargs=make_inputs(seed=0), policy=policy).chunks
    highest = max(chunks["full"].peak_before, chunks["reuse"].peak_before)
    assert {chunks[name].budget for name in ("full", "reuse")} == {int(0.6 * highest)}
    assert all(chunk.fits for chunk in chunks.values())
    within = Policy(chunk=Chunk(budget=chunks["prologue"].peak_after // 2))
    with pytest.raises(BudgetError, match="prologue"):  # bytes are bytes
        lc.plan(model, kwargs=make_inputs(seed=0), policy=within)


def test_transfers_find_the_nodes_of_regions_by_the_names_that_they_were_planned_with() -> None:
    """The graph that is chunked has given names to nodes that are gone; the planner's copy of it has not."""
    model, make_inputs = ZOO["easyanimate"].build()
    cut = Residual(first="transformer_blocks.1", last="transformer_blocks.2")
    policy = Policy(cache=Cache(cut=cut, interval=2), chunk=Chunk(budget="60%"), swap=Swap())
    captured, plan = capture_and_plan(
        model, (), make_inputs(seed=0), policy, method=None, device=None, hardware=None, takes_turns=True
    )
    built = build_programs(captured, plan)
    for name, whole in whole_programs(captured, plan).items():
        planned = {node.name for node in chunked_copy(whole.graph, plan.chunks[name].chunking).graph.nodes}
        transfers = ("_arriving", "_here", "_leaving", "_gone", "_copy", "_home", "_later")
        assert plan.chunks[name].regions or name == "prologue"
        found = {n.name for n in built[name].graph_module.graph.nodes if n.op == "call_function"}
        assert {n for n in found if not any(part in n for part in transfers)} <= planned


def test_a_share_for_decoding_leaves_encoding_whole() -> None:
    vae = VAES["kl"].build()
    policy = Policy(decode=Decode(budget="70%"))
    encode = lc.plan(vae, (torch.randn(VAES["kl"].video),), policy=policy, method="encode")
    decode = lc.plan(vae, (torch.randn(VAES["kl"].latent),), policy=policy, method="decode")
    assert not encode.chunks
    assert decode.chunks["full"].regions


def test_a_plan_that_was_too_hopeful_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is held against the finished graph, not against the planner's estimate."""
    goals: list[int | None] = []

    def hopeful(graph: fx.Graph, request: Request) -> ChunkPlan:
        goals.append(request.budget)
        if len(goals) > 1:
            return plan_program(graph, request)
        return replace(plan_program(graph, Request(None)), peak_after=1, budget=250_000)

    monkeypatch.setattr(budgets, "plan_program", hopeful)
    transformed = lc.transform(FeedForward().eval(), Policy(chunk=Chunk(budget=250_000)))
    transformed(torch.randn(4, 300, 16))
    assert len(goals) > 1
    assert goals[1] is not None
    assert goals[1] < 250_000
    assert lc.inspect(transformed).plan.chunks["full"].peak_after <= 250_000


def test_chunks_and_cache_together() -> None:
    model, make_inputs = ZOO["svd"].build(torch.float32)
    plain = lc.transform(model, Policy.deepcache(2, 0))
    peak = None
    outputs = []
    for policy in (Policy.deepcache(2, 0), None):
        if policy is None:
            peak = timeline(lc.inspect(plain).programs["full"].graph_module.graph).peak_bytes
            policy = Policy(cache=Policy.deepcache(2, 0).cache, chunk=Chunk(budget=int(0.8 * peak)))
            plain = lc.transform(model, policy)
        with lc.marked_run():
            for step in range(3):
                outputs.append(plain(**make_inputs(seed=0, step=step))[0])
                lc.step_done()
    assert lc.inspect(plain).plan.chunks["full"].regions
    assert lc.inspect(plain).counts["reuse"] == 1
    assert error(tuple(outputs[3:]), tuple(outputs[:3])) <= TOLERANCE


def test_an_explicit_region() -> None:
    module = nn.Sequential(FeedForward(), FeedForward()).eval()
    sample = torch.randn(2, 100, 16)
    transformed = lc.transform(module, Policy(chunk=Chunk(regions=[Region(module="1", axis=1, size=30)])))
    assert error((transformed(sample).detach(),), (module(sample).detach(),)) <= TOLERANCE
    (region,) = lc.inspect(transformed).plan.chunks["full"].regions
    assert (region.axis.dim, region.count) == (1, 4)
    text = lc.format_graph(lc.inspect(transformed).programs["full"])
    assert "region_0" in text
    assert "[100] in 4 chunks" in text


def small_vae() -> tuple[nn.Module, torch.Tensor]:
    return VAES["kl"].decoder().vae, torch.randn(5, *VAES["kl"].latent[1:])


def test_an_autoencoder_decodes_frame_by_frame() -> None:
    vae, latents = small_vae()
    with torch.no_grad():
        whole = vae.decode(latents)
        transformed = lc.transform(vae, Policy(decode=Decode()))
        sliced = transformed.decode(latents)
        assert type(sliced) is type(whole)
        assert error((sliced.sample,), (whole.sample,)) <= TOLERANCE
        assert torch.equal(lc.transform(vae).decode(latents, return_dict=False)[0], whole.sample)
        one = measure_peak(lambda: vae.decode(latents[:1])).peak_bytes
        real = measure_peak(lambda: transformed.decode(latents)).peak_bytes
        assert real <= 1.1 * (one + whole.sample.nbytes)
    assert lc.restore(transformed) is vae


def test_an_autoencoder_encodes() -> None:
    vae, _ = small_vae()
    images = torch.randn(3, *VAES["kl"].video[1:])
    with torch.no_grad():
        whole = vae.encode(images).latent_dist
        for policy in (Policy(), Policy(decode=Decode(frames=1))):
            transformed = lc.transform(vae, policy)
            found = transformed.encode(images).latent_dist
            assert error((found.mean, found.std), (whole.mean, whole.std)) <= TOLERANCE
    assert lc.inspect(transformed, "encode").plan.chunks["full"].regions


def test_frames_that_depend_on_each_other_are_refused_frame_by_frame() -> None:
    vae = VAES["svd"].decoder().vae
    latents = torch.randn(VAES["svd"].latent)
    transformed = lc.transform(vae, Policy(decode=Decode(frames=1)))
    with pytest.raises(RegionError, match=r"decode: frames.*depend on each other.*budget"):
        transformed.decode(latents, num_frames=len(latents))


@pytest.mark.parametrize(
    ("policy", "told"), [(Decode(), True), (Decode(frames=2), True), (Decode(budget="80%"), False)]
)
def test_a_video_that_is_decoded_whole_is_told_of(policy: Decode, told: bool) -> None:
    vae = VAES["hunyuanvideo"].build()
    latents = torch.randn(VAES["hunyuanvideo"].latent)
    plan = lc.plan(vae, (latents,), policy=Policy(decode=policy), method="decode")
    frames = latents.shape[2]
    assert any(f"the {frames} frames of 1 video(s) depend on each other" in note for note in plan.notes) == told
    assert bool(plan.chunks["full"].regions) != told
    assert not lc.plan(
        vae, (torch.randn(VAES["hunyuanvideo"].video),), policy=Policy(decode=policy), method="encode"
    ).notes


# Bad input ----------------------------------------------------------------------------------------------------------


def transformed_call(policy: Policy) -> Callable[[], Any]:
    module = nn.Sequential(FeedForward()).eval()
    return lambda: lc.transform(module, policy)(torch.randn(2, 100, 16))


def test_a_budget_below_the_floor_names_the_floor_and_its_node() -> None:
    with pytest.raises(BudgetError, match=r"cannot be cut to 1000 B; the least.* KiB.*set by %\w+.*raise the budget"):
        transformed_call(Policy(chunk=Chunk(budget=1000)))()


@pytest.mark.parametrize("budget", [1000, "5%"])
def test_best_effort_takes_what_is_reached_and_says_so(budget: int | str) -> None:
    model, inputs = FeedForward().eval(), (torch.randn(2, 100, 16),)
    with pytest.raises(BudgetError):
        lc.plan(model, inputs, policy=Policy(chunk=Chunk(budget=budget)))
    plan = lc.plan(model, inputs, policy=Policy(chunk=Chunk(budget=budget, best_effort=True)))
    (chunk,) = plan.chunks.values()
    assert chunk.regions
    assert chunk.fits
    assert chunk.peak_after < 0.5 * chunk.peak_before
    (note,) = (note for note in plan.notes if "best effort" in note)
    assert re.search(
        r"full: its activations take [\d.]+ KiB, by best effort, not the [\d.]+ K?i?B .*; whole they", note
    )
    assert note in str(plan).replace("\n", "")
    fast = lc.transform(model, plan.policy)
    with torch.no_grad():
        assert error((fast(*inputs),), (model(*inputs),)) <= TOLERANCE
        assert measure_peak(lambda: fast(*inputs)).peak_bytes <= 1.05 * chunk.peak_after


def test_a_best_effort_that_is_enough_is_as_without() -> None:
    model, inputs = FeedForward().eval(), (torch.randn(2, 100, 16),)
    plans = [
        lc.plan(model, inputs, policy=Policy(chunk=Chunk(budget="60%", best_effort=effort))) for effort in (True, False)
    ]
    assert plans[0].chunks == plans[1].chunks
    assert plans[0].notes == plans[1].notes


def test_best_effort_of_one_thing_excuses_no_other() -> None:
    """All memory on the device is a limit; within it, chunks come as near to theirs as they can."""
    model, inputs = FeedForward().eval(), (torch.randn(2, 100, 16),)
    chunk = Chunk(budget=1000, best_effort=True)
    plan = lc.plan(model, inputs, policy=Policy(chunk=chunk))
    floor = plan.weight_bytes + plan.chunks["full"].peak_after
    within = lc.plan(model, inputs, policy=Policy(chunk=chunk, memory_budget=int(1.2 * floor)))
    assert within.chunks["full"].peak_after <= 1.2 * floor - within.weight_bytes
    with pytest.raises(BudgetError):
        lc.plan(model, inputs, policy=Policy(chunk=chunk, memory_budget=int(0.5 * floor)))


def test_what_best_effort_leaves_above_a_limit_is_searched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With best effort the least is not looked for, and so may be more than a limit of memory that could be kept."""
    model, inputs = FeedForward().eval(), (torch.randn(2, 100, 16),)
    floor = lc.plan(model, inputs, policy=Policy(chunk=Chunk(budget=1000, best_effort=True)))
    limit = int(1.5 * (floor.weight_bytes + floor.chunks["full"].peak_after))
    policy = Policy(chunk=Chunk(budget=1000, best_effort=True), memory_budget=limit, swap=Swap(weights=False))
    plan_program, efforts = budgets.plan_program, []

    def poor(graph: fx.Graph, request: Request) -> ChunkPlan:
        efforts.append(request.best_effort)
        return plan_program(graph, Request(None) if request.best_effort else request)

    monkeypatch.setattr(budgets, "plan_program", poor)
    plan = lc.plan(model, inputs, policy=policy)
    assert set(efforts) == {True, False}
    assert plan.chunks["full"].regions
    assert plan.weight_bytes + plan.chunks["full"].peak_after <= limit


def test_best_effort_of_nothing() -> None:
    for settings_of in (
        lambda: Chunk(layers=Layers(spatial=2, temporal=2), best_effort=True),
        lambda: Decode(best_effort=True),
    ):
        with pytest.raises(PolicyError, match="best_effort=True is about a budget"):
            settings_of()
    policy = Policy(decode=Decode(budget="50%", best_effort=True))
    assert policy.of_autoencoder("decode").chunk == Chunk(budget="50%", best_effort=True)


def test_a_memory_budget_below_the_weights() -> None:
    with pytest.raises(
        BudgetError, match=r"memory_budget: 1000 B is less than the .* KiB that .* needs.* call %\w+ sets it"
    ):
        transformed_call(Policy(memory_budget=1000))()


def test_a_memory_budget_leaves_room_for_weights() -> None:
    model = FeedForward().eval()
    sample = torch.randn(4, 300, 16)
    weights = sum(p.nbytes for p in model.parameters())
    transformed = lc.transform(model, Policy(memory_budget=weights + 300_000))
    transformed(sample)
    plan = lc.inspect(transformed).plan
    assert plan.swap is None
    assert plan.chunks["full"].peak_after <= 300_000


def test_a_region_that_does_not_exist() -> None:
    with pytest.raises(RegionError, match=r"no module '0.upp'; did you mean '0.up'"):
        transformed_call(Policy(chunk=Chunk(regions=[Region(module="0.upp", axis=0, size=1)])))()


def test_an_axis_that_cannot_be_cut_names_the_operation() -> None:
    with pytest.raises(RegionError, match=r"axis 2 cannot be cut: %layer_norm .*aten.layer_norm"):
        transformed_call(Policy(chunk=Chunk(regions=[Region(module="0.norm", axis=2, size=4)])))()


def test_an_axis_that_is_not_there() -> None:
    with pytest.raises(RegionError, match=r"axis 7 .*expected one of 0, 1, 2"):
        transformed_call(Policy(chunk=Chunk(regions=[Region(module="0", axis=7, size=4)])))()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chunk(budget=0), "budget: expected bytes such as .* got 0"),
        (lambda: Chunk(budget=-5), "budget: expected bytes such as .* got -5"),
        (lambda: Chunk(budget="much"), "expected a number of bytes"),
        (Chunk, "a budget such as .* or regions, or layers; got none of them"),
        (lambda: Region(module="a", axis=0, size=0), "size: .*greater than or equal to 1"),
        (lambda: Chunk(budgett=5), "unknown key 'budgett'.*budget"),
        (lambda: Decode(frames=0), "frames: .*greater than or equal to 1"),
        (lambda: Policy(chunk=5), "chunk: expected a Chunk"),
        (lambda: Policy(decode=5), "decode: expected a Decode"),
    ],
)
def test_impossible_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


def test_settings_survive_yaml() -> None:
    policy = Policy(
        chunk=Chunk(budget="1MiB", regions=[Region(module="a.b", axis=-1, size=3)]),
        decode=Decode(frames=2),
        memory_budget="2GiB",
    )
    assert Policy.from_yaml(policy.to_yaml()) == policy


# Any graph ----------------------------------------------------------------------------------------------------------

few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@given(st.data())
@few
def test_random_graphs_at_random_budgets(data: st.DataObject) -> None:
    """Convolutions, norms, up- and downsampling, skips and reshapes in any order, at any budget."""
    channels, size = 4, data.draw(st.integers(9, 20))
    kinds = data.draw(st.lists(st.sampled_from(["conv", "norm", "act", "up", "skip", "flat", "half"]), max_size=7))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in kinds)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs, self.norm = convs, nn.GroupNorm(2, channels)
            self.mix = nn.Linear(channels, channels)

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            hidden, kept = sample * 1.5, []
            for kind, conv in zip(kinds, self.convs, strict=True):
                match kind:
                    case "conv":
                        hidden = conv(hidden)
                    case "norm":
                        hidden = self.norm(hidden)
                    case "act":
                        hidden = F.silu(hidden)
                    case "up":
                        hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")[..., :24, :24]
                    case "half":
                        hidden = F.conv2d(hidden, conv.weight, stride=2, padding=1)
                    case "flat":
                        hidden = self.mix(hidden.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(hidden.shape)
                    case "skip":
                        hidden = hidden + next((k for k in reversed(kept) if k.shape == hidden.shape), hidden)
                kept.append(hidden)
            return hidden.sin() + hidden

    given = given_of(Model(), data.draw(st.integers(1, 3)), channels, size, size + 3)
    peak = timeline(given.graph_module.graph).peak_bytes
    module, plan = chunked(given, int(peak * data.draw(st.floats(0.2, 1.0))), at_floor=True)
    assert error(given.run(module), given.run()) <= TOLERANCE
    assert math.isfinite(plan.overhead)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, r"plan: device must be 'cpu' or 'cuda'.*got 'tpu'"),
        ({"method": "encodee"}, r"plan: FeedForward has no method 'encodee'"),
    ],
)
def test_a_plan_for_what_there_is_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        lc.plan(FeedForward().eval(), (torch.randn(1, 4, 16),), **options)


def test_a_report_of_a_method_that_is_not_run_by_programs() -> None:
    with pytest.raises(ArgumentError, match=r"inspect: FeedForward runs forward by programs, not 'decode'"):
        lc.inspect(lc.transform(FeedForward().eval()), "decode")


# Layer by layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spatial", "temporal"),
    [
        ("svd", 7, 3),
        pytest.param("svd", 4, 5, marks=pytest.mark.slow),
        pytest.param("animatediff", 4, 7, marks=pytest.mark.slow),
    ],
)
def test_every_layer_in_so_many_chunks(name: str, spatial: int, temporal: int) -> None:
    """Equal to the whole model though chunks are uneven; norms that frames share are never cut across."""
    given = zoo_capture(name)
    graph = given.graph_module.graph
    plan = plan_program(graph, Request(None, layers=Layers(spatial=spatial, temporal=temporal)))
    module = chunked_copy(graph, plan.chunking)
    assert error(given.run(module), given.run()) <= TOLERANCE
    assert timeline(module.graph).peak_bytes < 0.75 * plan.peak_before
    counts = {region.axis.size: region.count for region in plan.regions if region.axis.dim == 0}
    assert counts[6] == -(-6 // -(-6 // spatial))  # 2 videos of 3 frames
    assert {c for size, c in counts.items() if size > 6} == {
        -(-size // -(-size // temporal)) for size in counts if size > 6
    }
    for planned in plan.regions:
        region = find_region(graph, planned)
        norms = [node for node in region.body if node.target is torch.ops.aten.group_norm.default]
        assert all(region.axes[node].dim == 0 for node in norms)


def test_layers_of_a_convolution_over_frames_are_cut_by_width() -> None:
    class Temporal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample + self.conv(F.silu(self.norm(sample)))

    given = given_of(nn.Sequential(Temporal(), Temporal()), 1, 4, 5, 6, 9)
    graph = given.graph_module.graph
    plan = plan_program(graph, Request(None, layers=Layers(spatial=2, temporal=4)))
    cut = {(region.first, region.axis.dim, region.count) for region in plan.regions}
    assert {("conv3d", 4, 3), ("conv3d_1", 4, 3)} <= cut
    assert not any(first.startswith("group_norm") for first, _, _ in cut)
    assert error(given.run(chunked_copy(graph, plan.chunking)), given.run()) <= TOLERANCE


def test_told_regions_come_before_layers() -> None:
    module = FeedForward().eval()
    sample = torch.randn(4, 12, 16)
    chunk = Chunk(regions=[Region(module="0.up", axis=1, size=5)], layers=Layers(spatial=2, temporal=2))
    transformed = lc.transform(nn.Sequential(module).eval(), Policy(chunk=chunk))
    torch.testing.assert_close(transformed(sample), module(sample))
    found = lc.inspect(transformed).plan.chunks["full"].regions
    assert (1, 3) in {(region.axis.dim, region.count) for region in found}
    assert len(found) > 1


def test_the_preset_of_fme() -> None:
    policy = Policy.fme(num_temporal_chunk=5)
    assert policy.chunk is not None
    assert policy.chunk.layers == Layers(spatial=7, temporal=5)
    assert policy.decode == Decode()
    assert Policy.from_yaml(policy.to_yaml()) == policy
    with pytest.raises(PolicyError, match=r"spatial: Input should be greater than or equal to 1, got 0"):
        Policy.fme(num_spatial_chunk=0)
    with pytest.raises(PolicyError, match="unknown key 'time'"):
        Policy.from_yaml("chunk: {layers: {spatial: 7, temporal: 7, time: 1}}")

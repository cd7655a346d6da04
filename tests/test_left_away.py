"""Models larger than the device: captured, compared with eager and run with their weights in host memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

import lightcache_fx as lc
from lightcache_fx import capture as capture_module
from lightcache_fx import compiler, placement, verify
from lightcache_fx.caching import Cache
from lightcache_fx.calls import CallReader
from lightcache_fx.capture import Capture, capture
from lightcache_fx.errors import ArgumentError, CaptureError, CaptureMismatchError, SwapError
from lightcache_fx.fetching import WeightsAway
from lightcache_fx.graphs import input_of, placeholders
from lightcache_fx.homes import Homes
from lightcache_fx.ledger import Ledger
from lightcache_fx.module import transform_component
from lightcache_fx.module_state import weight_slots
from lightcache_fx.placement import Placement
from lightcache_fx.policy import Policy, Swap
from lightcache_fx.stand_ins import stand_ins
from pipelines import PIPELINES
from pretend_device import CPU, DEVICE, PretendDevice, pretended, to_device
from test_swapping import HARDWARE
from toys import Tower, latent, prompt
from zoo import ZOO, run_inputs

NUM_STEPS = 6
CACHE = Cache(cut=0, interval=3)
CAPACITY = 250_000
"""Bytes of the device; `Tower` has 471056 of weights."""
BUDGET = 200_000


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightcache_fx.swap_periods.hardware_of", lambda *_, **__: HARDWARE)


@pytest.fixture
def make_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[PretendDevice]]:
    return partial(pretended, monkeypatch)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    with pretended(monkeypatch, CAPACITY) as device, torch.no_grad():
        yield device


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[WeightsAway | None]:
    """What each capture left away."""
    found: list[WeightsAway | None] = []

    def noted(*args: Any, away: WeightsAway | None = None, **kwargs: Any) -> Capture:
        found.append(away)
        return capture(*args, away=away, **kwargs)

    monkeypatch.setattr(compiler, "capture", noted)
    return found


def inputs(step: int = 0, batch: int = 2) -> list[torch.Tensor]:
    return [latent(step, batch), torch.tensor(900.0 - 100 * step), prompt(0, batch)]


def generate(
    model: nn.Module, on: torch.device = CPU, batch: int = 2, prompts: Sequence[int] = (0,)
) -> list[torch.Tensor]:
    conditions = [prompt(number, batch).to(on) for number in prompts]
    outputs = []
    with torch.no_grad(), lc.marked_run(NUM_STEPS):
        for step in range(NUM_STEPS):
            call = [tensor.to(on) for tensor in inputs(step, batch)[:2]]
            outputs += [model(*call, condition) for condition in conditions]
            lc.step_done()
    return outputs


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert all(tensor.device == DEVICE for tensor in found)
    assert [tensor.cpu().tolist() for tensor in found] == [tensor.tolist() for tensor in expected]


def expected_of(model: nn.Module, **asked: Any) -> list[torch.Tensor]:
    return generate(lc.transform(copy.deepcopy(model), Policy(cache=CACHE)), **asked)


def capture_away(model: nn.Module, *tensors: torch.Tensor) -> Capture:
    """With every weight away; the module is as it was afterwards, whatever happens."""
    before = {name: (id(table), id(table[key]), list(table)) for name, (table, key) in weight_slots(model).items()}
    values = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        return capture(model, CallReader(model, rates={}).read(tensors, {}), away=WeightsAway(DEVICE))
    finally:
        after = {name: (id(table), id(table[key]), list(table)) for name, (table, key) in weight_slots(model).items()}
        assert after == before
        assert all(weight.device == CPU for weight in (*model.parameters(), *model.buffers()))
        assert all(torch.equal(weight, values[name]) for name, weight in model.state_dict().items())
        assert not any("forward" in vars(module) for module in model.modules())


# Capturing ---------------------------------------------------------------------------------------------------------


def test_a_capture_takes_one_weight_at_a_time_and_is_that_of_a_model_on_the_device(device: PretendDevice) -> None:
    model, call = Tower(), to_device(inputs())
    before, device.peak_bytes = device.num_bytes, 0
    found = capture_away(model, *call)
    largest = max(weight.nbytes for weight in model.parameters())
    assert largest <= device.peak_bytes - before <= largest + 16 * 1024
    assert device.num_bytes == before
    plain = capture(model, CallReader(model, rates={}).read(inputs(), {}))
    assert (found.route, found.verified) == ("export", True)
    assert found.graph_module.code == plain.graph_module.code
    values = {node: node.meta["val"] for node in found.graph_module.graph.nodes if node.op != "output"}
    assert all(isinstance(value, FakeTensor) and value.device == DEVICE for value in values.values())


def test_from_a_file_on_a_cpu(tmp_path: Path) -> None:
    """No second device is needed to leave weights where they are."""
    model = Tower()
    homes = Homes(weight_slots(model), "disk", tmp_path)
    homes.adopt(weight_slots(model))
    call = CallReader(model, rates={}).read(inputs(), {})
    found = capture(model, call, away=WeightsAway(CPU, homes.is_home))
    assert found.verified
    assert found.graph_module.code == capture(model, call).graph_module.code
    assert all(map(homes.is_home, model.parameters()))


class NotExported(nn.Module):
    """A forward that fails on fake tensors. Shapes: hidden (B, 64) -> (B, 64)."""

    def __init__(self, num_layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(num_layers))
        self.eval().requires_grad_(False)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        if isinstance(sample, FakeTensor):
            raise TypeError("no fake tensors here")
        for layer in self.layers:
            sample = layer(sample)
        return sample


def hidden(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))


def test_real_tensors_are_traced_where_export_fails(device: PretendDevice) -> None:
    """One weight at a time, too."""
    torch.manual_seed(0)
    model, (sample,) = NotExported(), to_device((hidden(),))
    before, device.peak_bytes = device.num_bytes, 0
    found = capture_away(model, sample)
    assert device.peak_bytes - before <= 2 * 64 * 64 * 4
    assert found.route == "trace"
    assert "fetch" not in found.graph_module.code
    weights = [node for node in placeholders(found.graph_module.graph) if input_of(node).kind == "weight"]
    assert {input_of(node).name for node in weights} == set(dict(model.named_parameters()))
    assert all(node.meta["val"].device == DEVICE for node in weights)
    plain = capture(model, CallReader(model, rates={}).read((hidden(),), {}))
    assert found.graph_module.code == plain.graph_module.code


class ReadsViews(NotExported):
    """Views of weights, where only a trace of real tensors gets through."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        first, second = self.layers[0].weight.t().chunk(2)
        sample = super().forward(sample)
        return sample[:, :32] @ first + sample[:, 32:] @ second


def test_views_of_weights_in_a_trace_of_real_tensors(device: PretendDevice) -> None:
    torch.manual_seed(0)
    found = capture_away(ReadsViews(), *to_device((hidden(),)))
    assert found.route == "trace"
    assert all(
        leaf.device == DEVICE
        for node in found.graph_module.graph.nodes
        for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val"))
        if isinstance(leaf, torch.Tensor)
    )


class Partly(nn.Module):
    """One submodule that no tracer follows."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.odd, self.behind = nn.Linear(4, 64), NotExported(), nn.Linear(64, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.behind(self.odd(self.before(sample))) * timestep


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the opaque route was to do")

    monkeypatch.setattr(capture_module, "trace_real_tensors", refuse)


def test_a_submodule_that_no_tracer_follows(device: PretendDevice, no_trace: None) -> None:
    """It stays a call of the module itself, whose operations fetch what they read in every run."""
    torch.manual_seed(0)
    model = Partly().eval().requires_grad_(False)
    expected = model(latent(0), torch.tensor(2.0))
    transformed = lc.transform(model, Policy(swap=Swap(budget="100%")))
    for _ in range(2):
        assert_same([transformed(*to_device((latent(0), torch.tensor(2.0))))], [expected])
    assert lc.inspect(transformed).route == "export with odd opaque"
    assert all(weight.device == CPU for weight in model.parameters())


class TracedOtherwise(nn.Module):
    """Computes something else while it is traced, by whichever route."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        traced = isinstance(sample, FakeTensor) or get_proxy_mode() is not None
        return self.layer(sample) * (1 + 1e-6 * traced)


def test_what_differs_from_eager_is_refused(device: PretendDevice) -> None:
    torch.manual_seed(0)
    model = TracedOtherwise().eval().requires_grad_(False)
    expected = r"captured by export differs from eager by .*captured by trace differs from eager by .*e-0[67] on"
    with pytest.raises(CaptureMismatchError, match=expected):
        capture_away(model, *to_device((latent(0),)))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_graph_with_another_weight_is_refused(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The last bits of one weight, in one of the runs that are compared."""
    model, other, runs = Tower(), Tower(), Counter[str]()
    other.outer.bias.add_(2**-20)
    original = verify.run_graph

    def perturbed(captured: Capture, module: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        runs[captured.route] += 1
        with WeightsAway(DEVICE).fetched(other):
            return original(captured, other if runs[captured.route] == seed + 1 else module, tensors)

    monkeypatch.setattr(verify, "run_graph", perturbed)
    with pytest.raises(CaptureMismatchError, match=r"by export differs from eager by 9.54e-07"):
        capture_away(model, *to_device(inputs()))


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.weight.mul_(2)
        return sample * self.weight


def test_a_model_that_writes_to_its_weights_is_refused(device: PretendDevice) -> None:
    with pytest.raises(CaptureError, match="Writes writes to its weight weight; a step must be pure"):
        capture_away(Writes().eval(), *to_device((torch.ones(3, 4),)))


class Alias(nn.Module):
    """Reads its weight under a name that no table has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)
        self.again = [self.weight.data]

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * self.again[0]


def test_a_weight_that_is_read_under_another_name_is_refused(device: PretendDevice) -> None:
    with pytest.raises(
        CaptureError, match="Alias reads a weight through a tensor that is no parameter or buffer of it"
    ):
        capture_away(Alias().eval(), *to_device((torch.ones(3, 4),)))


class Asks(nn.Module):
    """Asks its weights for the device, and makes constants there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        where = next(self.parameters()).device
        ramp = torch.linspace(0, 1, 4, device=self.layer.weight.device)
        return self.layer(sample) * ramp + timestep + torch.ones(4, device=where)


def test_a_model_that_asks_its_weights_for_the_device(device: PretendDevice) -> None:
    torch.manual_seed(0)
    model = Asks().eval().requires_grad_(False)
    expected = model(latent(0), torch.tensor(2.0))
    found = capture_away(model, *to_device((latent(0), torch.tensor(2.0))))
    assert (found.route, found.verified) == ("export", True)
    swapped = lc.transform(model, Policy(swap=Swap()))
    assert_same([swapped(*to_device((latent(0), torch.tensor(2.0))))], [expected])


class Lazy(nn.Module):
    """Fills a cache, and makes a buffer, in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.cache: torch.Tensor | None = None

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = self.layer.weight.sum(0)
            self.register_buffer("late", self.layer.bias * 2)
        return self.layer(sample) * self.cache + self.late


def test_what_only_the_first_call_makes_stays_with_the_capture() -> None:
    torch.manual_seed(0)
    model = Lazy().eval().requires_grad_(False)
    call = CallReader(model, rates={}).read((latent(0),), {})
    found = capture(model, call, away=WeightsAway(CPU, lambda _: True))
    assert (model.cache, "late" in model._buffers) == (None, False)
    plain = capture(model, call)
    assert found.graph_module.code == plain.graph_module.code
    assert {name: value.tolist() for name, value in found.constants.items()} == {
        name: value.tolist() for name, value in plain.constants.items()
    }
    assert len(found.constants) == 2


def test_the_module_is_as_it_was_after_an_interrupt(device: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("trace_by_export", "check_against_eager"):
        with monkeypatch.context() as patch:
            patch.setattr(capture_module, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                capture_away(Tower(), *to_device(inputs()))


def test_an_operation_that_does_not_fit_says_so(
    make_device: Callable[..., AbstractContextManager[PretendDevice]],
) -> None:
    with make_device(50_000), torch.no_grad():
        call = to_device(inputs())
        with pytest.raises(SwapError, match=r"no memory on privateuseone:0 for prompt.2.weight"):
            capture_away(Tower(), *call)


def test_no_room_in_the_midst_of_the_check(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch, no_trace: None
) -> None:
    """While other inputs are tried, which a model may refuse: an error of its own, and no word about these inputs."""
    original = verify.vary

    def less_room(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        device.capacity = 50_000
        return original(*args, **kwargs)

    monkeypatch.setattr(verify, "vary", less_room)
    with pytest.raises(SwapError, match="no memory on"):
        capture_away(Tower(), *to_device(inputs()))


def test_stand_ins_are_like_what_they_stand_for() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(4, 3).t())
    model.tied = model.weight
    model.fixed = nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("absent", None)
    own = dict(weight_slots(model))
    before = {name: table[key] for name, (table, key) in own.items()}
    with stand_ins(model, (torch.ones(2, 3).t(), torch.tensor(1)), DEVICE) as fakes:
        assert [(fake.shape, fake.stride(), fake.device) for fake in fakes] == [((3, 2), (1, 3), CPU), ((), (), CPU)]
        for name, old in before.items():
            table, key = own[name]
            new = table[key]
            if old is None:
                assert new is None
                continue
            assert isinstance(new.data, FakeTensor)
            assert (new.shape, new.stride(), new.dtype, new.device) == (old.shape, old.stride(), old.dtype, DEVICE)
            assert (isinstance(new, nn.Parameter), new.requires_grad) == (
                isinstance(old, nn.Parameter),
                old.requires_grad,
            )
        assert model.tied is model.weight
        model.register_buffer("made", torch.ones(1))
    assert {name: id(table[key]) for name, (table, key) in own.items()} == {k: id(v) for k, v in before.items()}
    assert "made" not in model._buffers


# Running -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"memory_budget": BUDGET},
        {"swap": Swap(budget=BUDGET)},
        {"swap": Swap(budget="40%", to="disk")},
        {"swap": Swap(budget="40%", prefetch=False)},
    ],
    ids=["memory_budget", "bytes", "disk", "when needed"],
)
def test_a_model_larger_than_the_device(device: PretendDevice, settings: dict[str, Any]) -> None:
    model = Tower()
    assert sum(weight.nbytes for weight in model.parameters()) > CAPACITY
    expected = expected_of(model)
    swapped = lc.transform(model, Policy(cache=CACHE, **settings))
    for _ in range(3):
        assert_same(generate(swapped, DEVICE), expected)
    swap = lc.inspect(swapped).plan.swap
    assert swap is not None
    assert swap.moves
    lc.reset(swapped)
    device.peak_bytes = before = device.num_bytes
    found = generate(swapped, DEVICE)
    kept = sum(output.nbytes for output in found)
    assert 0.98 * swap.plan.peak_bytes <= device.peak_bytes - before <= swap.plan.peak_bytes + kept
    del found
    lc.reset(swapped)
    assert device.num_bytes == before


def test_guidance_in_several_calls(device: PretendDevice) -> None:
    """Planned anew from the capture that was made first, whose weights are at home by then."""
    model = Tower()
    expected = {prompts: expected_of(model, prompts=prompts) for prompts in ((0,), (0, 1))}
    swapped = lc.transform(model, Policy(cache=CACHE, memory_budget=BUDGET))
    for prompts in ((0,), (0, 1), (0,), (0, 1)):
        assert_same(generate(swapped, DEVICE, prompts=prompts), expected[prompts])
        assert lc.inspect(swapped).plan.branches == len(prompts)
    (found,) = swapped._lightcache.runtime.repertoire.compiled.values()
    assert sorted(found.signature.compiled) == [1, 2]


def test_its_module_stays_in_host_memory(device: PretendDevice) -> None:
    model = Tower()
    before = copy.deepcopy(model.state_dict())
    swapped = lc.transform(model, Policy(cache=CACHE, memory_budget=BUDGET))
    generate(swapped, DEVICE)
    homes = swapped._lightcache.runtime.homes
    assert all(map(homes.is_home, model.parameters())), (
        "page-locked, small ones too, so that copies run beside computing"
    )
    assert lc.restore(swapped) is model
    assert all(weight.device == CPU for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(*inputs()), Tower()(*inputs()))


def test_what_was_kept_in_a_file_comes_back_to_memory(device: PretendDevice) -> None:
    swapped = lc.transform(model := Tower(), Policy(cache=CACHE, swap=Swap(budget=BUDGET, to="disk")))
    generate(swapped, DEVICE)
    homes = swapped._lightcache.runtime.homes
    assert homes.is_home(model.blocks[0][0].weight)
    lc.restore(swapped)
    assert not any(map(homes.is_home, model.parameters()))


def test_new_sizes_are_captured_and_old_ones_are_not(device: PretendDevice, captures: list[WeightsAway | None]) -> None:
    model = Tower()
    expected = {batch: expected_of(model, batch=batch) for batch in (2, 4)}
    swapped = lc.transform(model, Policy(cache=CACHE, memory_budget=BUDGET))
    for batch in (2, 4, 2, 4):
        assert_same(generate(swapped, DEVICE, batch), expected[batch])
    assert [away for away in captures if away is not None] == [WeightsAway(DEVICE)] * 2  # others are of the expected


def test_weights_that_change_are_fetched_anew(device: PretendDevice) -> None:
    model = Tower()
    swapped = lc.transform(model, Policy(cache=CACHE, memory_budget=BUDGET))
    generate(swapped, DEVICE)
    for weight in model.parameters():
        weight.mul_(1.5)
    assert_same(generate(swapped, DEVICE), expected_of(model))


def test_a_weight_that_is_replaced_is_no_reason_to_capture_again(
    device: PretendDevice, captures: list[WeightsAway | None]
) -> None:
    """Neither is that some weights are at home by then and others are not yet."""
    swapped = lc.transform(model := Tower(), Policy(cache=CACHE, memory_budget=BUDGET))
    generate(swapped, DEVICE)
    model.blocks[2][0].weight = nn.Parameter(model.blocks[2][0].weight * 2, requires_grad=False)
    found = generate(swapped, DEVICE)
    assert captures == [WeightsAway(DEVICE)]
    assert_same(found, expected_of(model))


def test_everything_fits_and_stays_as_long_as_the_run(
    make_device: Callable[..., AbstractContextManager[PretendDevice]],
) -> None:
    model, total = Tower(), sum(weight.nbytes for weight in Tower().parameters())
    expected = expected_of(model)
    with make_device(2**22) as device:
        swapped = lc.transform(model, Policy(cache=CACHE, memory_budget=2**21))
        for _ in range(2):
            assert_same(generate(swapped, DEVICE), expected)
        assert lc.inspect(swapped).plan.swap is None
        assert device.peak_bytes >= total
        lc.reset(swapped)
        assert device.num_bytes < 1024
        assert all(weight.device == CPU for weight in model.parameters())


def test_the_same_module_on_the_cpu_and_on_the_device(device: PretendDevice) -> None:
    model = Tower()
    expected = expected_of(model)
    swapped = lc.transform(model, Policy(cache=CACHE, memory_budget=BUDGET))
    runtime_ = swapped._lightcache.runtime
    for on in (CPU, DEVICE, CPU, DEVICE):
        found = generate(swapped, on)
        assert [tensor.cpu().tolist() for tensor in found] == [tensor.tolist() for tensor in expected]
        assert {tensor.device for tensor in found} == {on}
        assert (runtime_.homes.device, runtime_.homes.tier) == (on, "disk" if on == CPU else "host")
    assert len(runtime_.repertoire.compiled) == 2


def test_tensors_on_several_devices(device: PretendDevice) -> None:
    swapped = lc.transform(Tower(), Policy(memory_budget=BUDGET))
    sample, timestep, _ = inputs()
    with FakeTensorMode():
        elsewhere = torch.empty(2, 3, device="cuda:0")
    with pytest.raises(ArgumentError, match=r"^Tower: expected the call's tensors on one device"):
        swapped(sample.to(DEVICE), timestep, elsewhere)
    assert_same([swapped(*to_device(inputs()))], [Tower()(*inputs())])


def test_a_plan_of_a_model_in_host_memory(device: PretendDevice) -> None:
    plan = lc.plan(Tower(), to_device(inputs()), policy=Policy(cache=CACHE, memory_budget=BUDGET))
    assert plan.swap is not None
    assert plan.swap.plan.peak_bytes <= BUDGET
    assert device.peak_bytes < CAPACITY


def put_on_device(model: nn.Module) -> None:
    """As `.to(DEVICE)`."""
    for table, key in weight_slots(model).values():
        if (weight := table[key]) is not None:
            there = weight.to(DEVICE)
            table[key] = nn.Parameter(there, requires_grad=False) if isinstance(weight, nn.Parameter) else there


def test_a_device_that_is_named(device: PretendDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_device_of", lambda _: DEVICE)
    model = Tower()
    swapped = lc.transform(model, Policy(cache=CACHE, swap=Swap(budget=BUDGET, device="cuda")))
    assert swapped._lightcache.runtime.homes.device == DEVICE, "before any call"
    with pytest.raises(
        ArgumentError, match=r"^Tower: expected the call's tensors on privateuseone:0, .* got tensors on cpu"
    ):
        swapped(*inputs())
    assert_same(generate(swapped, DEVICE), expected_of(model))


def test_a_pipeline_in_host_memory_asks_where_it_computes(
    device: PretendDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_device_of", lambda _: DEVICE)
    pipe = PIPELINES["svd"].build()
    assert lc.transform_pipeline(pipe, Policy(swap=Swap()))._execution_device == CPU
    swapping = lc.transform_pipeline(pipe, Policy(memory_budget="1GiB", swap=Swap(device="cuda")))
    assert swapping.device == swapping._execution_device == DEVICE
    assert pipe.device == CPU


def test_a_module_that_cannot_be_captured_still_says_where_tensors_must_be(device: PretendDevice) -> None:
    """A call with tensors in the wrong places is no reason to run by eager from then on."""
    model = Tower()
    swapped = transform_component(model, Policy(cache=CACHE, memory_budget=BUDGET), Ledger(), may_stay_eager=True)
    with FakeTensorMode():
        elsewhere = torch.empty(2, 3, device="cuda:0")
    with pytest.raises(ArgumentError, match="expected the call's tensors on one device"):
        swapped(latent(0).to(DEVICE), torch.tensor(1.0), elsewhere)
    assert_same(generate(swapped, DEVICE), expected_of(model))


def test_a_module_that_its_user_moves_to_the_device(
    make_device: Callable[..., AbstractContextManager[PretendDevice]],
) -> None:
    """It is there then, and not in host memory any more."""
    with make_device(2**22), torch.no_grad():
        model = Tower()
        expected = expected_of(model)
        swapped = lc.transform(model, Policy(cache=CACHE, memory_budget=2**21))
        assert_same(generate(swapped, DEVICE), expected)
        put_on_device(model)
        assert_same(generate(swapped, DEVICE), expected)
        homes = swapped._lightcache.runtime.homes
        assert (homes.origin, homes.device) == (DEVICE, DEVICE)
        assert not lc.inspect(swapped).plan.swap
        assert not any(program.resident for program in swapped._lightcache.runtime.repertoire.latest().bound.values())


@pytest.mark.parametrize(
    ("capacity", "budget", "fits"), [(2**20, 2**20, True), (CAPACITY, 2**20, False), (2**20, BUDGET, False)]
)
def test_weights_that_were_sent_away_come_back_for_a_capture_where_they_fit(
    make_device: Callable[..., AbstractContextManager[PretendDevice]],
    monkeypatch: pytest.MonkeyPatch,
    captures: list[WeightsAway | None],
    capacity: int,
    budget: int,
    fits: bool,
) -> None:
    """A module that was on the device, with its weights at home, meets a new size."""
    model, recalled = Tower(), []
    with make_device(capacity), torch.no_grad():
        swapped = lc.transform(model, Policy(memory_budget=budget))
        runtime_ = swapped._lightcache.runtime
        runtime_.repertoire.placement = Placement(DEVICE)
        runtime_.homes.origin = DEVICE
        runtime_.homes.compute_on(DEVICE, "host")

        def recall(to: torch.device) -> None:
            recalled.append(to)
            put_on_device(model)

        monkeypatch.setattr(runtime_.homes, "recall", recall)
        made = runtime_.compile(runtime_.reader.read(to_device(inputs()), {}))
        assert made.capture.verified
        assert all(bool(program.resident) != fits for program in made.bound.values())
    assert recalled == ([DEVICE] if fits else [])
    assert captures == [None if fits else WeightsAway(DEVICE)]


FEW = ("sd", "flux", "wan")


@pytest.mark.parametrize("name", FEW)
def test_models(name: str, make_device: Callable[..., AbstractContextManager[PretendDevice]]) -> None:
    model, make_inputs = ZOO[name].build(torch.float32)
    asked = Policy(cache=Cache(cut=list(ZOO[name].cuts), interval=2), swap=Swap(budget="90%"))
    calls = run_inputs(make_inputs, 0, 3)

    def run(module: nn.Module, on: torch.device) -> list[torch.Tensor]:
        outputs = []
        with torch.no_grad(), lc.marked_run(len(calls)):
            for call in calls:
                moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(on), call)
                found = module(**moved)
                outputs.append(found[0] if isinstance(found, tuple) else found["sample"])
                lc.step_done()
        return outputs

    with make_device():
        swapped = lc.transform(copy.deepcopy(model), asked)
        found = [run(swapped, DEVICE), run(swapped, DEVICE)]
        put_on_device(model)
        expected = [[output.cpu() for output in run(model, DEVICE)][:1]] * 2
        for outputs, wanted in zip(found, expected, strict=True):
            assert_same(outputs[:1], wanted)

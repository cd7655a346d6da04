"""Where a module computes, and when its weights fit there."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import placement
from lightcache_fx.errors import ArgumentError, PolicyError, TransformError
from lightcache_fx.placement import Placement, placement_of, weights_fit
from lightcache_fx.policy import Policy, Swap
from pretend_device import DEVICE
from toys import Tower

CPU = torch.device("cpu")
OTHER = torch.device("cuda:1")
SWAPPING = Policy(swap=Swap())


class On:
    """What of a tensor says where it is."""

    is_meta = False

    def __init__(self, device: torch.device) -> None:
        self.device = device


def device_for(place: Placement, *devices: torch.device) -> torch.device:
    return place.device_for("Tower", [On(device) for device in devices])  # type: ignore[misc]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_weights_in_host_memory_are_fetched_to_where_the_calls_tensors_are() -> None:
    place = Placement(CPU, hosted=True)
    assert device_for(place, CPU, CPU) == CPU
    assert device_for(place, OTHER, CPU) == OTHER  # a timestep, say, that stays on the CPU
    assert device_for(place) == CPU
    expected = (
        "Tower: expected the call's tensors on one device, where its weights are to be fetched to, got tensors on"
    )
    with pytest.raises(
        ArgumentError, match=f"^{re.escape(expected)} cuda:1, privateuseone:0; move them to one, or name"
    ):
        device_for(place, OTHER, DEVICE)


def test_a_device_that_was_asked_for() -> None:
    place = Placement(CPU, OTHER, hosted=True)
    assert place.device == OTHER
    assert device_for(place, CPU, OTHER) == OTHER
    assert device_for(place) == OTHER
    for came in ((CPU,), (DEVICE,), (OTHER, DEVICE)):
        with pytest.raises(
            ArgumentError, match=r"^Tower: expected the call's tensors on cuda:1, where Swap\(device=.*got"
        ):
            device_for(place, *came)
    with pytest.raises(ArgumentError, match="expected the call's tensors on cpu"):
        device_for(Placement(CPU, CPU, hosted=True), OTHER)


def test_weights_on_a_device_are_used_there() -> None:
    assert device_for(Placement(OTHER), DEVICE) == OTHER  # and torch says what is wrong


@pytest.mark.parametrize(
    ("policy", "hosted"),
    [
        (Policy(), False),
        (SWAPPING, True),
        (Policy(memory_budget=2**20), True),
        (Policy(swap=Swap(weights=False)), False),
        (Policy(swap=Swap(weights=False), memory_budget=2**20), False),
    ],
)
def test_which_policies_let_weights_stay_in_host_memory(policy: Policy, hosted: bool) -> None:
    assert placement_of(Tower(), policy) == Placement(CPU, None, hosted)


def test_weights_elsewhere_are_not_in_host_memory() -> None:
    assert placement_of(Tower().to("meta"), SWAPPING) == Placement(torch.device("meta"))
    assert placement_of(nn.Identity(), SWAPPING) == Placement(CPU, hosted=True)


def test_names_of_devices(two_gpus: None) -> None:
    for name, device in (("cuda", OTHER), ("cuda:0", torch.device("cuda:0")), ("cpu", CPU)):
        assert placement_of(Tower(), Policy(swap=Swap(device=name))).asked == device


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch, two_gpus: None) -> None:
    expected = (
        "Swap(device='cuda:2'): expected a device of this machine, on which torch sees 2 CUDA devices; leave device out"
        " to compute where the call's tensors are"
    )
    with pytest.raises(TransformError, match=f"^{re.escape(expected)}$"):
        lc.transform(Tower(), Policy(swap=Swap(device="cuda:2")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(TransformError, match="torch sees 0 CUDA devices"):
        lc.transform(Tower(), Policy(swap=Swap(device="cuda")))


def test_weights_on_another_device_than_was_asked_for(two_gpus: None) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Linear(3, 3)
    with FakeTensorMode():
        model.weight = nn.Parameter(torch.empty(3, 3, device="cuda:0"))
    expected = (
        "Swap(device='cuda:1'): expected the weights of Linear there or in host memory, got weights on cuda:0; move the"
        " module with .to('cpu') or .to('cuda:1') first, or leave device out"
    )
    with pytest.raises(TransformError, match=f"^{re.escape(expected)}$"):
        lc.transform(model, Policy(swap=Swap(device="cuda:1")))
    assert placement_of(model, Policy(swap=Swap(device="cuda:0"))) == Placement(
        torch.device("cuda:0"), torch.device("cuda:0")
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "meta", 0, "cuda:1 "])
def test_devices_that_are_none(device: object) -> None:
    with pytest.raises(PolicyError, match=r"device: expected a device to swap to, 'cuda', 'cuda:1' or 'cpu', got"):
        Swap(device=device)  # type: ignore[arg-type]


def test_a_device_in_a_policy() -> None:
    assert Swap(device=torch.device("cuda:1")).device == "cuda:1"  # type: ignore[arg-type]
    asked = Policy(swap=Swap(device="cuda"), memory_budget="4GiB")
    assert Policy.from_yaml(asked.to_yaml()) == asked
    with pytest.raises(PolicyError, match=r"device is where weights are fetched to, and weights=False fetches none"):
        Swap(device="cuda", weights=False)


def weight(num_bytes: int, device: torch.device) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)


@pytest.mark.parametrize(
    ("sizes", "policy", "free", "fits"),
    [
        ({CPU: 100}, Policy(memory_budget=100), 100, True),
        ({CPU: 100}, Policy(memory_budget=100), 99, False),
        ({CPU: 100}, Policy(memory_budget=99), 1000, False),
        ({CPU: 60, OTHER: 40}, Policy(memory_budget=99), 1000, False),
        ({CPU: 60, OTHER: 40}, Policy(memory_budget=100), 60, True),
        ({OTHER: 100}, Policy(memory_budget=10), 0, True),  # they are there already
        ({CPU: 100}, Policy(swap=Swap(budget=99)), 1000, False),
        ({CPU: 100}, Policy(swap=Swap(budget=99), memory_budget=100), 1000, True),
        ({CPU: 100}, Policy(swap=Swap(budget="10%")), 100, True),  # of what is not known yet
        ({CPU: 100}, SWAPPING, 99, False),
    ],
)
def test_whether_weights_fit(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[torch.device, int], policy: Policy, free: int, fits: bool
) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda device: {OTHER: free}[device])
    assert weights_fit([weight(size, device) for device, size in sizes.items()], OTHER, policy) == fits


def test_shared_memory_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda _: 100)
    whole = weight(100, CPU)
    assert weights_fit([whole, whole, whole[:50], whole[50:]], OTHER, SWAPPING)


def test_free_bytes_are_the_drivers_and_those_that_torch_holds_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in {"memory_reserved": 30, "memory_allocated": 10, "mem_get_info": (500, 900)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: {OTHER: found}[device])
    assert placement.free_bytes(OTHER) == 520

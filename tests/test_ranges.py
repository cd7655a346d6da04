"""Profiler ranges: a trace reads like the plan, and nothing is paid or traced where no profiler looks."""

from __future__ import annotations

import json
import threading
import timeit
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.autograd import profiler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

import lightcache_fx as lc
from lightcache_fx import Cache, Chunk, Policy, Swap
from lightcache_fx.chunked import ChunkedRegion
from lightcache_fx.costs import CPU
from lightcache_fx.hardware import Hardware
from lightcache_fx.ranges import profiled
from lightcache_fx.transfers import OFFLOAD, PREFETCH, RELEASE, WAIT
from lightcache_fx.workload import Link
from toys import Tower, latent, prompt

BATCH = 256
NUM_STEPS = 4
Tree = tuple[str, list["Tree"]]


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on how fast this machine is just now."""
    hardware = Hardware(CPU, Link(to_device=2e9, from_device=1e9))
    monkeypatch.setattr("lightcache_fx.swap_periods.hardware_of", lambda *_, **__: hardware)


def generate(model: Any) -> None:
    with torch.no_grad(), lc.marked_run(NUM_STEPS):
        for step in range(NUM_STEPS):
            model(latent(step, BATCH), torch.tensor(900.0 - step), prompt(0, BATCH))
            lc.step_done()


def policy() -> Policy:
    """Chunked, swapped and cached."""
    return Policy(cache=Cache(cut=0, interval=2), chunk=Chunk(budget="70%"), swap=Swap(budget="70%"))


def watched(**settings: Any) -> profile:
    """A profiler of the CPU; keeping events across cycles is what a release of torch warns of otherwise."""
    return profile(activities=[ProfilerActivity.CPU], acc_events=True, **settings)


def ranges_of(prof: profile) -> list[Tree]:
    """This project's ranges as a forest; operators of the same names are left out."""
    trees: dict[int, Tree] = {}
    roots: list[Tree] = []
    for event in prof.events():
        if not _is_range(event):
            continue
        trees[event.id, id(event)] = tree = (event.name.removeprefix("lightcache::"), [])  # type: ignore[index]
        parent = event.cpu_parent
        while parent is not None and not _is_range(parent):
            parent = parent.cpu_parent
        siblings = roots if parent is None else trees[parent.id, id(parent)][1]  # type: ignore[index]
        siblings.append(tree)
    return roots


def _is_range(event: Any) -> bool:
    return event.name.startswith("lightcache::") and event.is_user_annotation


def expected_of(graph: fx.GraphModule) -> list[Tree]:
    """What a program's trace should show, by its graph, in order."""
    found: list[Tree] = []
    for node in graph.graph.nodes:
        region = node.meta.get("lightcache_region")
        if isinstance(region, ChunkedRegion):
            chunks = [(f"chunk {index} of {node.target}", []) for index in range(len(region.chunks))]
            found.append((f"{node.target} ({region.label})", chunks))  # type: ignore[arg-type]
        elif node.target is PREFETCH:
            found.append((f"prefetch {node.args[2]}", []))
        elif node.target is WAIT:
            found.append(("wait", []))
    return found


def programs_of(trees: list[Tree]) -> list[Tree]:
    """The programs of all steps."""
    return [tree for name, inner in trees if name.startswith("step ") for tree in inner if tree[0].startswith("Tower.")]


def simplified(trees: list[Tree]) -> list[Tree]:
    """Waits without what they are for, which their graph does not say."""
    return [("wait", []) if name.startswith("wait for ") else (name, inner) for name, inner in trees]


def test_ranges_are_nested_as_in_the_plan() -> None:
    fast = lc.transform(Tower(), policy())
    generate(fast)
    with watched() as prof:
        generate(fast)
    report = lc.inspect(fast)
    calls = [name for name, _ in ranges_of(prof) if name.startswith("step ")]
    assert calls == [f"step {step}, branch 0" for step in range(NUM_STEPS)]
    trees = programs_of(ranges_of(prof))
    timeline = [one.program for one in report.timeline]
    assert timeline == ["prologue", "full", "reuse", "full", "reuse"]
    assert [name for name, _ in trees] == [f"Tower.{name}" for name in timeline]
    steady = trees[3]  # what the steps before have handed over is not fetched again
    expected = expected_of(report.programs["full"].graph_module)
    residents = len(simplified(steady[1])) - len(expected)
    assert residents > 0, "weights that stay are waited for as the program begins"
    assert simplified(steady[1])[:residents] == [("wait", [])] * residents
    assert simplified(steady[1])[residents:] == expected
    regions = [tree for tree in steady[1] if tree[0].startswith("region_")]
    assert len(regions) == 6
    assert regions[0] == (
        "region_0 (dim 0: [256] in 2 chunks)", [("chunk 0 of region_0", []), ("chunk 1 of region_0", [])]
    )  # fmt: skip
    fetched = {name.removeprefix("prefetch ") for _, inner in trees for name, _ in inner if name.startswith("prefetch")}
    waited = {name.removeprefix("wait for ") for _, inner in trees for name, _ in inner if name.startswith("wait for")}
    assert waited - {"a copy"} == fetched  # a slot that has not left the device was not copied
    assert fetched <= set(dict(Tower().named_parameters()))


def test_what_leaves() -> None:
    value, home = torch.ones(64), torch.empty(256, dtype=torch.uint8)
    with watched() as prof:
        RELEASE(OFFLOAD(value, home, "slot_0"), value)
    assert ranges_of(prof) == [("offload slot_0", []), ("release slot_0", [])]


def test_branches_and_a_file_that_others_read(tmp_path: Path) -> None:
    fast = lc.transform(Tower(), Policy(cache=Cache(cut=0, interval=2)))
    with watched() as prof, lc.marked_run(2):
        for step in range(2):
            for branch in range(2):
                fast(latent(0), torch.tensor(9.0 - step), prompt(branch))
            lc.step_done()
    prof.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = [event for event in events if event.get("cat") == "user_annotation"]
    names = [event["name"].removeprefix("lightcache::") for event in sorted(named, key=lambda event: event["ts"])]
    assert names == [
        "step 0, branch 0", "Tower.prologue", "Tower.full", "step 0, branch 1", "Tower.prologue", "Tower.full",
        "step 1, branch 0", "Tower.reuse", "step 1, branch 1", "Tower.reuse",
    ]  # fmt: skip


def test_copies_of_worker_threads_where_all_threads_are_profiled() -> None:
    from torch._C._profiler import _ExperimentalConfig

    config = _ExperimentalConfig(profile_all_threads=True)
    fast = lc.transform(Tower(), policy())
    generate(fast)
    with watched(experimental_config=config) as prof:
        generate(fast)
    copies = [event for event in prof.events() if event.name.endswith(" to the device") and _is_range(event)]
    assert copies
    assert threading.get_native_id() not in {event.thread for event in copies}
    assert all(event.name.startswith("lightcache::copy ") for event in copies)


def test_a_loaded_module_has_the_same_ranges(tmp_path: Path) -> None:
    fast = lc.transform(Tower(), Policy(cache=Cache(cut=0, interval=2), chunk=Chunk(budget="70%")))
    generate(fast)
    lc.save(fast, tmp_path / "saved")
    loaded = lc.load(tmp_path / "saved")
    found = []
    for module in (fast, loaded):
        with watched() as prof:
            generate(module)
        found.append(ranges_of(prof))
    assert found[0] == found[1]
    assert any(name.startswith("region_5 ") for _, inner in programs_of(found[1]) for name, _ in inner)


def test_results_are_the_same_while_profiled() -> None:
    fast = lc.transform(Tower(), policy())
    call = latent(0, BATCH), torch.tensor(900.0), prompt(0, BATCH)
    expected = fast(*call)
    with watched():
        assert torch.equal(fast(*call), expected)


def test_nothing_is_recorded_into_graphs() -> None:
    """Programs stay pure: a trace that is made while a profiler is on has no range in it."""
    fast = lc.transform(Tower(), Policy(chunk=Chunk(budget="70%")))
    call = latent(0, BATCH), torch.tensor(900.0), prompt(0, BATCH)
    fast(*call)
    (region,) = [r for r in lc.inspect(fast).programs["full"].graph_module.children()
                 if isinstance(r, ChunkedRegion)][:1]  # fmt: skip
    inputs = next(
        [n.meta["val"] for n in node.args]
        for node in lc.inspect(fast).programs["full"].graph_module.graph.nodes
        if node.target == "region_0"
    )
    real = [torch.randn(value.shape) for value in inputs]
    traced = []
    for looked_at in (False, True):
        with watched() if looked_at else torch.no_grad():
            traced.append(make_fx(region)(*real))
    assert traced[0].code == traced[1].code
    assert "record_function" not in traced[1].code


def test_without_a_profiler_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a range was made")

    monkeypatch.setattr(profiler, "record_function", refuse)
    fast = lc.transform(Tower(), policy())
    generate(fast)
    with pytest.raises(AssertionError, match="a range was made"), watched():
        generate(fast)


def test_asking_costs_less_than_a_microsecond() -> None:
    def enter() -> None:
        with profiled(lambda: "never"):
            pass

    best = min(timeit.repeat(enter, number=2000, repeat=20)) / 2000
    assert best < 2e-6  # a launch of a CUDA kernel takes about five

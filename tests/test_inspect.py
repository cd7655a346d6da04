"""Reports: what a module is made of, how often each program ran, and the last run's timeline."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import Cache, Chunk, Policy, Swap
from lightcache_fx import runtime as runtime_module
from lightcache_fx.costs import CPU
from lightcache_fx.errors import ArgumentError, TransformError
from lightcache_fx.flops import total_flops
from lightcache_fx.hardware import Hardware
from lightcache_fx.workload import Link
from pipelines import PIPELINES, SMALL
from toys import Denoiser, Tower, latent, prompt

BATCH = 256
SLOT_BYTES = BATCH * 64 * 4
"""What a branch of `Tower` keeps at that batch."""


@pytest.fixture(autouse=True)
def known_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on how fast this machine is just now."""
    hardware = Hardware(CPU, Link(to_device=2e9, from_device=1e9))
    monkeypatch.setattr("lightcache_fx.swap_periods.hardware_of", lambda *_, **__: hardware)


def generate(model: Any, num_steps: int = 4, branches: int = 1, batch: int = BATCH) -> None:
    with torch.no_grad(), lc.marked_run(num_steps):
        for step in range(num_steps):
            for branch in range(branches):
                model(latent(10 * step + branch, batch), torch.tensor(900.0 - step), prompt(branch, batch))
            lc.step_done()


def cached(**settings: Any) -> Policy:
    return Policy(cache=Cache(cut=0, interval=2), **settings)


# Programs -----------------------------------------------------------------------------------------------------------


def test_programs_of_a_signature() -> None:
    fast = lc.transform(Denoiser(), cached())
    generate(fast, 5, batch=2)
    report = lc.inspect(fast)
    (signature,) = report.signatures
    assert signature.arguments == {
        "sample": "float32[2, 4] on cpu",
        "timestep": "float32[] on cpu",
        "encoder_hidden_states": "float32[2, 3] on cpu",
        "scale": "1.0",
    }
    assert (signature.branches, signature.route) == (1, "export")
    assert {name: one.runs for name, one in signature.programs.items()} == {"prologue": 1, "full": 3, "reuse": 2}
    assert all(one.compiled == "eager" for one in signature.programs.values())
    # inner and outer for both; middle's layer for full alone; its embedding for the prologue
    assert {name: one.flops for name, one in signature.programs.items()} == {
        "prologue": 2 * 2 * (3 * 32 + 32 * 8),
        "full": 2 * 2 * (4 * 8 + 8 * 8 + 16 * 4),
        "reuse": 2 * 2 * (4 * 8 + 16 * 4),
    }
    assert signature.programs["prologue"].num_nodes == 3
    assert signature.programs["reuse"].num_nodes == 3  # two linears and the concatenation
    assert all((one.num_regions, one.num_transfers) == (0, 0) for one in signature.programs.values())
    assert report.programs["full"] is signature.programs["full"].program
    assert report.counts == {"prologue": 1, "full": 3, "reuse": 2}


def test_chunks_and_copies_are_counted() -> None:
    fast = lc.transform(Tower(), cached(chunk=Chunk(budget="70%"), swap=Swap(budget="70%")))
    generate(fast)
    (signature,) = lc.inspect(fast).signatures
    full = signature.programs["full"]
    whole = lc.transform(Tower(), cached())
    generate(whole)
    assert full.num_regions == len(signature.plan.chunks["full"].regions) == 6
    assert full.num_transfers == sum((stay.prefetch is not None) for stay in full.program.transfers.stays) + sum(
        slot.release is not None for slot in full.program.transfers.made
    )
    assert full.num_transfers > 0
    assert full.flops == lc.inspect(whole).signatures[0].programs["full"].flops
    assert full.flops == total_flops(lc.inspect(whole).programs["full"].graph_module.graph)
    assert full.num_nodes < lc.inspect(whole).signatures[0].programs["full"].num_nodes + full.num_transfers * 2


def test_signatures_in_the_order_of_use_and_by_branches() -> None:
    fast = lc.transform(Tower(), cached(memory_budget=2**30))
    generate(fast, 2)
    generate(fast, 2, batch=4)
    generate(fast, 2, branches=2)
    found = [(one.arguments["sample"], one.branches) for one in lc.inspect(fast).signatures]
    assert found == [("float32[4, 4] on cpu", 1), ("float32[256, 4] on cpu", 1), ("float32[256, 4] on cpu", 2)]
    runs = [{name: one.runs for name, one in signature.programs.items()} for signature in lc.inspect(fast).signatures]
    assert [one["full"] for one in runs] == [1, 2, 1]  # a step's first call comes before a second one is seen
    assert sum(sum(one.values()) for one in runs) == sum(lc.inspect(fast).counts.values())


def test_an_autoencoder_by_method() -> None:
    from axis_rules.vaes import VAES

    vae = VAES["kl"].build()
    fast = lc.transform(vae, Policy())
    fast.decode(torch.randn(1, vae.config.latent_channels, 4, 4), return_dict=False)
    report = lc.inspect(fast)
    assert report.owner == "AutoencoderKL.decode"
    assert report.signatures[0].arguments["return_dict"] == "False"
    with pytest.raises(TransformError, match="AutoencoderKL has not been called yet"):
        lc.inspect(fast, "encode")


# The last run -------------------------------------------------------------------------------------------------------


def test_the_timeline_is_that_of_the_last_run() -> None:
    fast = lc.transform(Tower(), cached())
    generate(fast, 6)
    generate(fast, 3, branches=2)
    timeline = lc.inspect(fast).timeline
    assert [(one.step, one.branch, one.program) for one in timeline] == [
        (0, 0, "prologue"), (0, 0, "full"), (0, 1, "prologue"), (0, 1, "full"),
        (1, 0, "reuse"), (1, 1, "reuse"), (2, 0, "full"), (2, 1, "full"),
    ]  # fmt: skip
    assert [one.kept_bytes // SLOT_BYTES for one in timeline] == [0, 1, 1, 2, 2, 2, 1 + 1, 2]
    assert all(one.seconds > 0 for one in timeline)
    assert all(a.begin + a.seconds <= b.begin for a, b in itertools.pairwise(timeline))


def test_kept_bytes_count_what_is_passed_on() -> None:
    """Slots that stay on the device from one swapped program to the next are in nobody's store but kept."""
    fast = lc.transform(Tower(), cached(swap=Swap(budget="70%")))
    generate(fast)
    assert [one.kept_bytes for one in lc.inspect(fast).timeline if one.program == "full"] == [SLOT_BYTES] * 2


def test_a_run_without_steps_is_a_call() -> None:
    class Head(nn.Linear):
        pass

    fast: Any = lc.transform(Head(3, 3).eval(), Policy())
    for _ in range(3):
        fast(torch.ones(1, 3))
    assert [one.program for one in lc.inspect(fast).timeline] == ["full"]
    assert lc.inspect(fast).signatures[0].programs["full"].runs == 3


def test_timelines_are_bounded_and_each_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "LONGEST_TIMELINE", 5)
    fast = lc.transform(Denoiser(), cached())
    generate(fast, 9, batch=2)
    assert [one.step for one in lc.inspect(fast).timeline] == [4, 5, 6, 7, 8]
    found: list[Any] = []

    def other() -> None:
        found.append(lc.inspect(fast).timeline)
        generate(fast, 2, batch=2)
        found.append(lc.inspect(fast).timeline)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found[0] == ()
    assert [one.step for one in found[1]] == [0, 0, 1]
    assert [one.step for one in lc.inspect(fast).timeline] == [4, 5, 6, 7, 8]
    assert lc.inspect(fast).signatures[0].programs["full"].runs == 5 + 1


def test_a_call_that_fails_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lc.transform(Denoiser(), cached())
    generate(fast, 2, batch=2)
    bound = fast._lightcache.runtime.repertoire.latest().bound["full"]
    monkeypatch.setattr(bound, "_run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(fast, 2, batch=2)
    assert [one.program for one in lc.inspect(fast).timeline] == ["prologue"]
    assert lc.inspect(fast).signatures[0].programs["full"].runs == 1


# Printed ------------------------------------------------------------------------------------------------------------


def test_printed() -> None:
    fast = lc.transform(Denoiser(), cached())
    generate(fast, 2, batch=2)
    text = str(lc.inspect(fast))
    assert "Denoiser(sample: float32[2, 4] on cpu, timestep: float32[] on cpu," in text
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    assert rows[:3] == [
        ["prologue", "eager", "3", "0.000", "1.5 KiB", "0", "0", "1"],
        ["full", "eager", "11", "0.000", "720 B", "0", "0", "1"],
        ["reuse", "eager", "3", "0.000", "432 B", "0", "0", "1"],
    ]
    assert [row[:3] for row in rows[3:]] == [["0", "0", "prologue"], ["0", "0", "full"], ["1", "0", "reuse"]]
    assert [row[5] for row in rows[3:]] == ["0 B", "64 B", "64 B"]
    assert text.endswith("held now: 0 B in slots and 0 B in hoisted values")
    assert "more entries" not in text
    generate(fast, 60, batch=2)
    text = str(lc.inspect(fast))
    assert "the timeline has 11 more entries" in text


def test_as_dict_is_json() -> None:
    fast = lc.transform(Denoiser(), cached())
    generate(fast, 2, batch=2)
    data = json.loads(json.dumps(lc.inspect(fast).as_dict()))
    assert data["timeline"][0]["begin"] == 0.0
    assert [one["program"] for one in data["timeline"]] == ["prologue", "full", "reuse"]
    assert data["signatures"][0]["programs"][1]["flops"] == lc.inspect(fast).programs["full"].flops
    assert data["counts"] == {"prologue": 1, "full": 1, "reuse": 1}


# Pipelines, loaded modules, and what is neither ---------------------------------------------------------------------


def test_a_pipeline() -> None:
    pipe = PIPELINES["sd"].build()
    fast = lc.transform_pipeline(pipe, Policy(cache=Cache(cut=0, interval=2), decode=lc.Decode(frames=1)))
    report = lc.inspect(fast)
    assert (report.components, report.uncalled) == ({}, ("unet", "vae"))
    assert "not called yet: unet, vae" in str(report)
    PIPELINES["sd"].generate(fast, 0, SMALL)
    report = lc.inspect(fast)
    assert list(report.components) == ["unet", "vae.decode"]
    assert report.uncalled == ()
    assert report.model == type(pipe).__name__
    unet = report.components["unet"]
    assert [one.program for one in unet.timeline if one.program != "prologue"][:2] == ["full", "reuse"]
    assert "UNet2DConditionModel(" in str(report)
    assert "AutoencoderKL.decode(" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["components"]["unet"]["counts"] == dict(unet.counts)
    with pytest.raises(ArgumentError, match=r"pass that, as in inspect\(pipe\.vae, 'decode'\)"):
        lc.inspect(fast, "decode")


def test_a_loaded_module(tmp_path: Path) -> None:
    fast = lc.transform(Tower(), cached(chunk=Chunk(budget="70%")))
    generate(fast)
    lc.save(fast, tmp_path / "saved")
    loaded = lc.load(tmp_path / "saved")
    before = lc.inspect(loaded)
    assert before.timeline == ()
    assert all(one.runs == 0 for one in before.signatures[0].programs.values())
    generate(loaded)
    mine, its = lc.inspect(fast), lc.inspect(loaded)
    assert [one[:3] for one in mine.timeline] == [one[:3] for one in its.timeline]
    assert its.as_dict()["signatures"] == mine.as_dict()["signatures"]


def test_what_cannot_be_inspected() -> None:
    with pytest.raises(ArgumentError) as raised:
        lc.inspect({"unet": 1})
    assert str(raised.value) == (
        "inspect: expected a module that lightcache_fx.transform or load returned, or a pipeline that"
        " transform_pipeline returned, got dict"
    )
    with pytest.raises(TransformError, match=r"^inspect: this Denoiser is not transformed; call lightcache_fx\.transf"):
        lc.inspect(Denoiser())
    fast = lc.transform(Denoiser(), Policy())
    with pytest.raises(TransformError, match=r"^Denoiser has not been called yet, so there are no programs; call it"):
        lc.inspect(fast)
    generate(fast, 1, batch=2)
    with pytest.raises(TransformError, match="is not transformed"):
        lc.inspect(lc.restore(fast))

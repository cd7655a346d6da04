"""What a machine does in a second: measured once, kept, and doubted where the file cannot be right."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from graphs import captured
from lightcache_fx import hardware
from lightcache_fx.costs import GPU_HALF, Machine, machine_of
from lightcache_fx.errors import SwapError
from lightcache_fx.hardware import PCIE, cache_file, hardware_of, measured_link, measured_machine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTCACHE_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hardware, "_COPIED", 2**14)
    monkeypatch.setattr(hardware, "_SIZE", 16)
    monkeypatch.setattr(hardware, "_REPEATS", 1)


@pytest.fixture
def typical() -> Machine:
    return machine_of(captured(lambda x: x.exp(), torch.randn(3)).graph_module.graph, cuda=False)


def contents() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(cache_file().read_text(encoding="utf-8"))
    return found


def test_where_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_file() == tmp_path / "cache" / "hardware.json"
    monkeypatch.delenv("LIGHTCACHE_FX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "lightcache_fx" / "hardware.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "lightcache_fx" / "hardware.json"


def test_measured_once_and_kept(tmp_path: Path, typical: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    link, machine = measured_link(CPU, tmp_path), measured_machine(CPU, torch.float32, typical)
    assert 0 < link.to_device < 1e13
    assert 0 < link.from_device < 1e13
    assert machine != typical
    assert (machine.launch, machine.fresh) == (typical.launch, typical.fresh)
    monkeypatch.setattr(hardware, "_measure_link", pytest.fail)
    monkeypatch.setattr(hardware, "_measure_machine", pytest.fail)
    assert measured_link(CPU, tmp_path) == link
    assert measured_machine(CPU, torch.float32, typical) == machine
    assert sorted(len(rates) for rates in contents().values()) == [2, 2]


def test_dtypes_disks_and_thread_counts_are_measured_apart(
    tmp_path: Path, typical: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_link(CPU, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        measured_machine(CPU, dtype, typical)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    measured_machine(CPU, torch.float32, typical)
    keys = [key.partition("torch.")[2] for key in contents() if key.startswith("machine")]
    mine = f"{torch.empty(0).dtype}".removeprefix("torch.")
    assert len(keys) == 3
    assert f"{mine} 64 threads" in keys
    assert any(key.endswith(str(tmp_path.stat().st_dev)) for key in contents())


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 3}', '{"a": {"to_device": "fast"}}', '{"a": {"to_device": null}}']
)
def test_a_file_that_cannot_be_read_is_made_anew(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache_file().parent.mkdir()
    cache_file().write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING, "lightcache_fx"):
        measured_link(CPU, tmp_path)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "cannot read the measurements in hardware.json"
    ]
    assert len(contents()) == 1


@pytest.mark.parametrize("rates", [{}, {"to_device": 1e9}, {"to_device": 0, "from_device": 1e9},
                                   {"to_device": float("inf"), "from_device": 1e9},
                                   {"to_device": float("nan"), "from_device": 1e9}])  # fmt: skip
def test_rates_that_cannot_be_right_are_measured_anew(tmp_path: Path, rates: dict[str, float]) -> None:
    measured_link(CPU, tmp_path)
    (key,) = contents()
    cache_file().write_text(json.dumps({key: rates, "another": {"flops": 1}}), encoding="utf-8")
    assert 0 < measured_link(CPU, tmp_path).to_device < 1e13
    assert set(contents()[key]) == {"to_device", "from_device"}
    assert contents()["another"] == {"flops": 1}


def test_what_a_later_version_adds_is_left_alone(tmp_path: Path) -> None:
    measured_link(CPU, tmp_path)
    (key,) = contents()
    rates = {"to_device": 1e9, "from_device": 2e9, "duplex": 1.0}
    cache_file().write_text(json.dumps({key: rates}), encoding="utf-8")
    link = measured_link(CPU, tmp_path)
    assert (link.to_device, link.from_device) == (1e9, 2e9)


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, where a folder should be")
    with caplog.at_level(logging.INFO, "lightcache_fx"):
        assert measured_link(CPU, tmp_path).to_device > 0
    assert any("cannot keep measurements in" in record.getMessage() for record in caplog.records)


def test_nothing_is_left_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured_link(CPU, tmp_path)
    assert [path.name for path in cache_file().parent.iterdir()] == ["hardware.json"]
    before = cache_file().read_text(encoding="utf-8")

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Path, "replace", fail)
    hardware._write(cache_file(), {})
    assert [path.name for path in cache_file().parent.iterdir()] == ["hardware.json"]
    assert cache_file().read_text(encoding="utf-8") == before


def test_measuring_takes_none_of_the_users_random_numbers(tmp_path: Path, typical: Machine) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    measured_link(CPU, tmp_path)
    measured_machine(CPU, torch.float32, typical)
    assert torch.equal(torch.rand(3), expected)


def test_no_room_to_measure(tmp_path: Path) -> None:
    with pytest.raises(SwapError, match=r"cannot make a swap file of .* \(no folder .*absent\)"):
        measured_link(CPU, tmp_path / "absent")
    assert not cache_file().exists()


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count
    measured_link(CPU, tmp_path / "swap")
    assert [*(tmp_path / "swap").iterdir()] == []
    assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208 - a count


def test_hardware_that_is_not_here_is_typical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured(torch.nn.Linear(3, 3).half().eval(), torch.randn(2, 3).half()).graph_module.graph
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware_of(graph, cuda=True).link == PCIE
    assert hardware_of(graph, cuda=True).machine == GPU_HALF
    assert not cache_file().exists()
    here = hardware_of(graph, cuda=False, folder=tmp_path)
    assert here.link == measured_link(CPU, tmp_path)
    assert here.machine != machine_of(graph, cuda=False)

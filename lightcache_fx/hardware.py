"""What a machine does in a second: computing, and copying to and from where weights are kept.

Measured once per machine and kept in the user's cache folder, or given. Plans made for a device that is not here take
typical figures.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import fx

from lightcache_fx.arena import arena_for
from lightcache_fx.costs import GPU_HALF, Machine, machine_of
from lightcache_fx.transfers import copy_bytes
from lightcache_fx.workload import Link

log = logging.getLogger(__name__)

PCIE = Link(to_device=2.5e10, from_device=2.5e10)
"""PCIe 4.0 with 16 lanes and page-locked memory, each way; its nominal rate is 3.2e10 bytes a second."""
_CACHE = "LIGHTCACHE_FX_CACHE"
_COPIED = 2**26
_SIZE = 1024
_REPEATS = 5


@dataclass(frozen=True)
class Hardware:
    """A device and its link.

    Attributes:
        machine: what its compute engine does.
        link: what its copy engines do.
    """

    machine: Machine
    link: Link


def hardware_of(graph: fx.Graph, *, cuda: bool, folder: str | Path | None = None) -> Hardware:
    """What a graph is planned for: measured where its device is here, typical of such a device otherwise.

    Args:
        graph: of a program.
        cuda: for a CUDA device, or for the CPU.
        folder: where the CPU's swap files are made; disks differ.

    Raises:
        SwapError: there is no room in the folder.
    """
    typical = machine_of(graph, cuda=cuda)
    if not cuda:
        cpu = torch.device("cpu")
        return Hardware(measured_machine(cpu, torch.float32, typical), measured_link(cpu, folder))
    if not torch.cuda.is_available():
        return Hardware(typical, PCIE)
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.float16 if typical == GPU_HALF else torch.float32
    return Hardware(measured_machine(device, dtype, typical), measured_link(device))


def measured_link(device: torch.device, folder: str | Path | None = None) -> Link:
    """Bytes a second to and from a device, measured here the first time.

    Args:
        device: CUDA, with page-locked host memory at the other end, or the CPU, with a file.
        folder: the file's.
    """
    where = Path(folder) if folder is not None else Path(tempfile.gettempdir())
    key = f"link {_name_of(device)}" + (f" {where.stat().st_dev}" if device.type == "cpu" and where.is_dir() else "")
    found = _remembered(key, ("to_device", "from_device"), lambda: _measure_link(device, where))
    return Link(found["to_device"], found["from_device"])


def measured_machine(device: torch.device, dtype: torch.dtype, typical: Machine) -> Machine:
    """A device's arithmetic and memory traffic, measured here the first time; the rest is as is typical."""
    threads = f" {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    key = f"machine {_name_of(device)} {dtype}{threads}"
    found = _remembered(key, ("flops", "bytes"), lambda: _measure_machine(device, dtype))
    return replace(typical, flops=found["flops"], bytes=found["bytes"])


def cache_file() -> Path:
    """Where measurements are kept: `$LIGHTCACHE_FX_CACHE`, or the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(_CACHE) or Path(root) / "lightcache_fx") / "hardware.json"


def _remembered(key: str, rates: Sequence[str], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """A measurement from the file, or made now and written to it; a file that cannot be read is made anew."""
    path = cache_file()
    known = _read(path)
    if not all(0 < known.get(key, {}).get(rate, 0) < math.inf for rate in rates):
        known[key] = measure()
        log.info("measured %s: %s", key, known[key])
        _write(path, known)
    return known[key]


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {key: {name: float(value) for name, value in entry.items()} for key, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("cannot read the measurements in %s (%s): they are made anew", path.name, error)
        return {}


def _write(path: Path, content: dict[str, dict[str, float]]) -> None:
    """Put a file in its place as a whole, so that no reader sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            new.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
            new.replace(path)
    except OSError as error:
        log.info("cannot keep measurements in %s: %s", path, error)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.node()}"


def _measure_link(device: torch.device, folder: Path) -> dict[str, float]:
    here = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    on_cuda = device.type == "cuda"
    home = arena_for([here], folder=None if on_cuda else folder, page_locked=on_cuda).tensor_like(here)
    copy = torch.Tensor.copy_ if on_cuda else copy_bytes
    leaving = _seconds(lambda: copy(home, here), device)
    arriving = _seconds(lambda: copy(here, home), device)
    return {"to_device": _COPIED / arriving, "from_device": _COPIED / leaving}


def _measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    size = _SIZE * (8 if device.type == "cuda" else 1)
    own = torch.Generator(device).manual_seed(0)  # the user's next random numbers must not depend on this
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=own) for _ in range(2))
    large = torch.empty(_COPIED * 4, dtype=torch.uint8, device=device)
    other = torch.empty_like(large)
    return {
        "flops": 2 * size**3 / _seconds(lambda: torch.mm(a, b), device),
        "bytes": 2 * large.numel() / _seconds(lambda: other.copy_(large), device),
    }


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """The median of a few calls, after one that does not count."""
    found = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return max(median(found[1:]), 1e-9)

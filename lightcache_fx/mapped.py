"""Weights that stay in the files that they were downloaded as, for models larger than the host's memory.

A file is mapped privately and without a reserve: safetensors' own mapping counts as memory that could be written to, so
the system refuses it for a file larger than memory. Nothing is read before it is used, and nothing is copied: where a
policy swaps, these files are where such weights are kept.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightcache_fx.errors import SwapError, WeightFileError, nearest
from lightcache_fx.module_state import weight_slots
from lightcache_fx.units import format_bytes

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_SHOWN = 3
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def map_weights(module: nn.Module, path: str | Path) -> nn.Module:
    """Bind a module's parameters and buffers to memory-mapped safetensors files, without reading them.

        with accelerate.init_empty_weights():
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config("model/unet"))
        unet = lightcache_fx.map_weights(unet, "model/unet")

    The files must stay as they are while the module lives; what is written to its weights is not written to them.
    Dtypes are those of the files. Weights that are tied in the module need be in the files once.

    Args:
        module: typically with its parameters on the meta device; bound in place.
        path: a `.safetensors` file, the index of several (`.safetensors.index.json`), or a folder with either.

    Returns:
        The module.

    Raises:
        WeightFileError: there is no such file, it is damaged, or it holds other weights than the module's; the module
            is as it was.
    """
    entries = {entry.name: entry for entry in chain.from_iterable(map(entries_of, files_at(Path(path))))}
    tables = weight_slots(module)
    weights = {name: table[key] for name, (table, key) in tables.items() if table[key] is not None}
    _check(module, Path(path), entries, weights)
    files = {entry.path: MappedFile(entry.path) for entry in entries.values()}
    bound: dict[int, torch.Tensor] = {}
    for name, entry in entries.items():
        bound.setdefault(id(weights[name]), _bound(files[entry.path].tensor(entry), weights[name]))
    for name, weight in weights.items():
        table, key = tables[name]
        table[key] = bound.get(id(weight), weight)
    return module


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in a file that `map_weights` mapped."""
    return _file_of(tensor) is not None


def check_file(tensor: torch.Tensor) -> None:
    """Raise a `SwapError` where a mapped tensor's file has been cut short: reading that would end the process."""
    if (file := _file_of(tensor)) is not None:
        file.check()


class MappedFile:
    """One of the user's files, mapped for as long as a tensor in it lives.

    Raises:
        WeightFileError: it cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            private = mmap.MAP_PRIVATE | _NO_RESERVE
            self._map = mmap.mmap(self._file.fileno(), 0, flags=private, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise WeightFileError(f"cannot map {path}: {error}") from error
        weakref.finalize(self, self._file.close).atexit = False
        self.num_bytes = len(self._map)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        with _LOCK:
            _FILES.add(self)

    def tensor(self, entry: Entry) -> torch.Tensor:
        """One of its tensors; nothing is read."""
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        view = memoryview(self._map)[entry.begin : entry.end]
        weakref.finalize(view, id, self).atexit = False  # holds this object as long as the tensor's storage holds that
        return torch.frombuffer(view, dtype=entry.dtype).view(entry.shape)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and 0 <= tensor.data_ptr() - self._base < self.num_bytes

    def check(self) -> None:
        """Raise a `SwapError` where it has been cut short since it was mapped."""
        size = os.fstat(self._file.fileno()).st_size
        if size < self.num_bytes:
            raise SwapError(
                f"{self.path} has been truncated to {format_bytes(size)}, expected {format_bytes(self.num_bytes)}: put"
                f" the file back, then map the weights again"
            )


_FILES: weakref.WeakSet[MappedFile] = weakref.WeakSet()
_LOCK = threading.Lock()  # a set that grows must not be gone through meanwhile


def _file_of(tensor: torch.Tensor) -> MappedFile | None:
    if not _FILES:
        return None
    with _LOCK:
        return next((file for file in _FILES if tensor in file), None)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file; offsets are from the file's beginning."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _bound(tensor: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    if not isinstance(old, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())


def files_at(path: Path) -> list[Path]:
    """The files that a path stands for: itself, those of an index, or those of a folder.

    Raises:
        WeightFileError: there are none, or several sets.
    """
    if path.is_dir():
        return files_at(_one_of(path))
    if not path.is_file():
        raise WeightFileError(f"no such file or folder: {path}")
    if path.suffix != ".json":
        return [path]
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(f"{path} is not an index of safetensors files: {error!r}") from error
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise WeightFileError(f"{path.name} lists files that are not in {path.parent}: {_some(missing)}")
    return [path.parent / name for name in names]


def _one_of(folder: Path) -> Path:
    """The file or index in a folder; one without a variant in its name (`.fp16`) where there are several."""
    indexes = sorted(folder.glob("*.safetensors.index*.json"))
    listed = {file for index in indexes for file in files_at(index)}
    found = [*indexes, *(file for file in sorted(folder.glob("*.safetensors")) if file not in listed)]
    plain = [path for path in found if path.name.endswith(".index.json") or path.name.count(".") == 1]
    if len(found) == 1 or len(plain) == 1:
        return (plain if len(plain) == 1 else found)[0]
    if found:
        names = _some(path.name for path in found)
        raise WeightFileError(f"{folder} holds several sets of weights: {names}; pass the path of one of them")
    there = _some(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise WeightFileError(
        f"{folder} holds no .safetensors file (it holds {there}); pass a model's own folder, such as 'unet', or save it"
        f" by save_pretrained(..., safe_serialization=True)"
    )


def entries_of(path: Path) -> list[Entry]:
    """What a file holds, by its header: its length in 8 bytes, then JSON, then the tensors.

    Raises:
        WeightFileError: it is no safetensors file, or is cut short.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length <= size else b"")
        found = [_entry(name, entry, path, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    except WeightFileError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightFileError(f"{path} is not a safetensors file: {error!r}") from error
    end = max((entry.end for entry in found), default=0)
    if end > size:
        raise WeightFileError(f"{path} is cut short: it has {format_bytes(size)} of {format_bytes(end)}; get it again")
    return found


def _entry(name: str, entry: Mapping[str, Any], path: Path, data: int) -> Entry:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise WeightFileError(f"{path}: {name!r} has dtype {entry['dtype']}, which is not supported")
    dtype, shape, (begin, end) = (
        SAFETENSORS_DTYPES[entry["dtype"]],
        tuple(map(int, entry["shape"])),
        entry["data_offsets"],
    )
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has offsets {begin} to {end} for shape {shape}")
    return Entry(name, path, dtype, shape, data + begin, data + end)


def _check(module: nn.Module, path: Path, entries: Mapping[str, Entry], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise a `WeightFileError` where the files do not hold exactly the module's weights."""
    model, persistent = type(module).__name__, set(module.state_dict(keep_vars=True))
    held = {id(weights[name]) for name in entries if name in weights}
    absent = [name for name, weight in weights.items() if id(weight) not in held]
    missing = [name for name in absent if name in persistent]
    unexpected = [name for name in entries if name not in weights]
    problems = [f"it has no {name!r}{nearest(name, unexpected, count=1)}" for name in missing[:_SHOWN]]
    problems += [f"the model has no {name!r}{nearest(name, missing, count=1)}" for name in unexpected[:_SHOWN]]
    problems += [
        f"{name!r} has shape {list(entry.shape)} there, expected {list(weights[name].shape)}"
        for name, entry in entries.items()
        if name in weights and entry.shape != weights[name].shape
    ][:_SHOWN]
    if problems:
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected" if missing or unexpected else "wrong shapes"
        tie = (
            "; if its weights are tied, call tie_weights() first" if missing and hasattr(module, "tie_weights") else ""
        )
        raise WeightFileError(f"{path} does not hold the weights of {model} ({counts}): {'; '.join(problems)}{tie}")
    empty = [name for name in absent if weights[name].is_meta]
    if empty:
        raise WeightFileError(
            f"no file holds these buffers of {model}, which are on the meta device: {_some(empty)}; make the model with"
            f" its parameters only there (accelerate.init_empty_weights() does), or set them before"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

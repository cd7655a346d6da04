"""Weights and constants as safetensors: written, and read back only as they were, each tensor by its own hash.

Hashes are of tensors and not of files, so a user's own files serve as long as they hold the same weights, be they in
one file or in several.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch

from lightcache_fx.arena import is_dense
from lightcache_fx.encoding import dtype_named
from lightcache_fx.errors import LoadError, SaveError, SwapError, WeightFileError, nearest
from lightcache_fx.manifest import TensorRecord
from lightcache_fx.mapped import SAFETENSORS_DTYPES, Entry, MappedFile, entries_of, files_at

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_ALIGNMENT = 8
_SHOWN = 3


def record_of(name: str, tensor: torch.Tensor) -> TensorRecord:
    """What identifies a tensor; hashing reads all of it.

    Raises:
        SaveError: safetensors has no name for its dtype.
    """
    if _parts(tensor).dtype not in _NAMES:
        raise SaveError(f"{name} has dtype {tensor.dtype}, which safetensors files do not hold")
    return TensorRecord(
        shape=tuple(tensor.shape),
        strides=None if tensor.is_contiguous() or not is_dense(tensor) else tensor.stride(),
        dtype=str(tensor.dtype).removeprefix("torch."),
        device=str(tensor.device),
        sha256=digest(tensor),
    )


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the elements in order."""
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as a safetensors file, in their order; complex ones with a last dimension of two."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        parts = _parts(tensor)
        begin, end = end, end + parts.numel() * parts.element_size()
        header[name] = {"dtype": _NAMES[parts.dtype], "shape": list(parts.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor))


class TensorSource:
    """Safetensors files to read tensors from.

    Args:
        paths: files, indexes of several, or folders that hold one model's.
        what: what they are to the user, for messages.

    Raises:
        LoadError: one is missing, damaged, or a tensor is in two of them.
    """

    def __init__(self, paths: Iterable[str | Path], what: str) -> None:
        self.what = what
        try:
            self.files = list(dict.fromkeys(chain.from_iterable(files_at(Path(path)) for path in paths)))
            found = list(chain.from_iterable(map(entries_of, self.files)))
            self._mapped = {path: MappedFile(path) for path in dict.fromkeys(entry.path for entry in found)}
        except WeightFileError as error:
            raise LoadError(f"{what}: {error}") from error
        self._entries: dict[str, Entry] = {}
        for entry in found:
            if entry.name in self._entries:
                raise LoadError(f"{what}: {entry.name} is in two of the files")
            self._entries[entry.name] = entry

    def check(self, records: Mapping[str, TensorRecord], *, aliases: Mapping[str, str]) -> dict[str, str]:
        """Where each tensor is: `name of the record -> name in the files`.

        Args:
            records: what must be there.
            aliases: other names of some of these, of weights that are tied.

        Raises:
            LoadError: one is absent, there is another, or one has another shape or dtype.
        """
        places = {name: name for name in records if name in self._entries}
        for alias, name in aliases.items():
            if alias in self._entries and name in records:
                places.setdefault(name, alias)
        absent = [name for name in records if name not in places]
        extra = [name for name in self._entries if name not in records and name not in aliases]
        problems = [f"they have no {name!r}{nearest(name, extra, count=1)}" for name in absent[:_SHOWN]]
        problems += [f"the model has no {name!r}" for name in extra[:_SHOWN]]
        for name, place in places.items():
            entry, expected = self._entries[place], _stored(records[name])
            if (entry.shape, entry.dtype) != expected and len(problems) < _SHOWN:
                types = [f"{list(shape)} of {str(dtype).removeprefix('torch.')}" for shape, dtype in (
                    (entry.shape, entry.dtype), expected)]  # fmt: skip
                problems.append(f"{name!r} is {types[0]} there, expected {types[1]}")
        if problems:
            raise LoadError(f"{self.what} are not those that were saved: {'; '.join(problems)}")
        return places

    def verify(self, name: str, place: str, record: TensorRecord) -> torch.Tensor:
        """A tensor as it lies in its file, once it has been seen to have the values that it was saved with.

        Raises:
            LoadError: its content is another.
        """
        mapped = self._at(place)
        if digest(mapped) != record.sha256:
            file = self._entries[place].path.name
            raise LoadError(f"{self.what}: {name} in {file} has other values than it was saved with")
        return mapped

    def _at(self, place: str) -> torch.Tensor:
        entry = self._entries[place]
        file = self._mapped[entry.path]
        try:
            file.check()
        except SwapError as error:
            raise LoadError(f"{self.what}: {error}") from error
        return file.tensor(entry)

    def read(self, name: str, place: str, record: TensorRecord, *, check_hash: bool = True) -> torch.Tensor:
        """A tensor of its own, laid out and on the device as it was saved.

        Raises:
            LoadError: its content is another, or its device is not here.
        """
        mapped = self.verify(name, place, record) if check_hash else self._at(place)
        dtype = dtype_named(record.dtype)
        if dtype.is_complex:
            mapped = torch.view_as_complex(mapped)
        try:
            if record.strides is None:
                made = torch.empty(record.shape, dtype=dtype, device=record.device)
            else:
                made = torch.empty_strided(record.shape, record.strides, dtype=dtype, device=record.device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise LoadError(f"{name} cannot be put on {record.device}, where the programs read it: {error}") from error
        if not is_dense(made):
            raise LoadError(f"{name} has strides {made.stride()} for sizes {tuple(made.shape)}: elements overlap")
        return made.copy_(mapped)


def _parts(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as safetensors can hold it."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _stored(record: TensorRecord) -> tuple[tuple[int, ...], torch.dtype]:
    dtype = dtype_named(record.dtype)
    return ((*record.shape, 2), dtype.to_real()) if dtype.is_complex else (record.shape, dtype)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The elements in order, as one block of memory that lives as long as the view."""
    flat = _parts(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8)
    if not flat.numel():
        return memoryview(b"")
    array = (ctypes.c_ubyte * flat.numel()).from_address(flat.data_ptr())
    array.source = flat  # type: ignore[attr-defined] # keeps the memory
    return memoryview(array).cast("B")

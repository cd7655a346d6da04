"""Where a module's weights and its runs' slots are kept while they are away from the device.

In inference weights never change, so offloading one is binding the parameter to its copy at home: no transfer. The
module stays usable as it is, only slower on what is away, and `recall` binds everything to the device again.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lightcache_fx.arena import ALIGNMENT, Arena, arena_for, arena_of, arenas, is_dense, span_of
from lightcache_fx.errors import SwapError
from lightcache_fx.mapped import is_mapped
from lightcache_fx.transfers import PREFETCH, WAIT, copy_bytes
from lightcache_fx.units import format_bytes

Tier = Literal["host", "disk"]
WeightTable = Mapping[str, tuple[dict[str, Any], str]]
"""Where each weight is looked up, by its full name: `module_state.weight_slots`."""


_CPU = torch.device("cpu")


class Homes:
    """The arenas of one module. Weights that `map_weights` bound to the user's files are at home as they are.

    Args:
        weights: of the module; a function where the module may be given other ones (adapters).
        device: where the module runs.
        tier: page-locked host memory, or a memory-mapped file.
        folder: where files are made; None for the system's folder for temporary files.
        origin: where the weights are before any is moved; by default where the module runs.
    """

    def __init__(
        self,
        weights: WeightTable | Callable[[], WeightTable],
        tier: Tier,
        folder: str | Path | None = None,
        *,
        device: torch.device = _CPU,
        origin: torch.device | None = None,
    ) -> None:
        self.tier = tier
        self.device = device
        self.origin = device if origin is None else origin
        self.folder = Path(folder) if folder is not None else Path(tempfile.gettempdir())
        self._weights = weights
        self._arenas: list[Arena] = []
        self._lock = threading.RLock()

    def adopt(self, names: Iterable[str]) -> int:
        """Move weights home, those that are not there yet; returns how many bytes were moved.

        Tensors that share memory go on sharing it. Where anything fails, every weight is where it was.

        Raises:
            SwapError: there is no room at home.
        """
        return self.adopt_all(self.weights(names))

    def adopt_all(self, weights: Iterable[torch.Tensor]) -> int:
        """As `adopt`, for the weights themselves."""
        with self._lock, torch.inference_mode(False):
            away = [weight for weight in weights if not self.is_home(weight)]
            if not away:
                return 0
            groups = _by_storage(away, self._all())
            spans = [_span(group) for group in groups]
            arena = arena_for(
                (torch.empty(span.num_bytes, dtype=torch.uint8, device="meta") for span in spans), **self._options()
            )
            blocks = [span.copied_to(arena.tensor_like(span.source)) for span in spans]
            self._arenas.append(arena)
            for group, span, block in zip(groups, spans, blocks, strict=True):
                span.bind(group, block)
            self._drop_empty_arenas()  # weights that were rebound by others (`.to(dtype)`) have left theirs
            return sum(span.num_bytes for span in spans)

    def compute_on(self, device: torch.device, tier: Tier) -> None:
        """Let the module run on a device from now on, and what leaves it go to a tier; what is at home stays there."""
        self.device, self.tier = device, tier

    def restore(self) -> None:
        """Bind every weight to memory of the device that it was on at first.

        Weights that were in host memory while the module computed on an accelerator are in host memory still.

        Raises:
            SwapError: as `recall`.
        """
        if self.tier == "disk" or self.origin.type != "cpu" or self.device.type == "cpu":
            self.recall(self.origin)

    def recall(self, device: torch.device) -> None:
        """Bind every weight that is at home to memory of the device again.

        Tensors that share memory go on sharing it. Weights in the user's own files stay there on the CPU.

        Raises:
            SwapError: there is no room on the device; what has not been bound to it is where it was.
        """
        with self._lock, torch.inference_mode(False):
            weights = [weight for weight in self._all() if self.is_home(weight) and not _is_there(weight, device)]
            for group in _by_storage(weights, weights):
                _bring_back(group, device)
            self._drop_empty_arenas()

    @contextmanager
    def all_present(self, device: torch.device) -> Iterator[None]:
        """Bind every weight to a copy on the device while this is entered, and to its home again afterwards.

        For a module that cannot be captured. What it writes to its weights meanwhile is lost.
        """
        with self._lock:
            weights = [weight for weight in self._all() if is_dense(weight)]
            self.adopt_all(weights)
            homes = [weight.data for weight in weights]
            try:
                with torch.inference_mode(False):  # or they become inference tensors themselves
                    _bind(weights, map(WAIT, [PREFETCH(home, device, "a weight") for home in homes]))
                yield
            finally:
                _bind(weights, homes)

    def device_of(self, weight: torch.Tensor) -> torch.device:
        """Where a weight is used: of one that is at home, or in host memory as it was at first, the module's device."""
        return self.device if weight.device == self.origin or self.is_home(weight) else weight.device

    def weights(self, names: Iterable[str]) -> list[torch.Tensor]:
        """Some of the module's weights, as they are now; the module is walked once, which takes its time."""
        tables = self._table()
        return [table[key] for table, key in (tables[name] for name in names)]

    def all_weights(self) -> list[torch.Tensor]:
        """The module's weights, as they are now, each once."""
        return self._all()

    def is_home(self, weight: torch.Tensor) -> bool:
        """Whether a weight is bound to its copy at home, be it in an arena that another drop-in of the module made.

        One without elements has nothing that could be elsewhere.
        """
        return not weight.numel() or is_mapped(weight) or arena_of(weight, arenas()) is not None

    def buffer(self, num_bytes: int) -> torch.Tensor:
        """A buffer for a slot, uint8[num_bytes]; its room is free again when nobody holds it any more.

        Raises:
            SwapError: there is no room at home.
        """
        like = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
        with self._lock:
            for arena in self._arenas:
                if arena.has_room(num_bytes):
                    return arena.tensor_like(like)
            self._arenas.append(Arena(num_bytes + ALIGNMENT, **self._options()))
            return self._arenas[-1].tensor_like(like)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(arena.num_bytes for arena in self._arenas)

    def _drop_empty_arenas(self) -> None:
        self._arenas = [arena for arena in self._arenas if arena.free_bytes < arena.num_bytes]

    def _options(self) -> dict[str, Any]:
        if self.tier == "disk":
            return {"folder": self.folder}
        return {"page_locked": torch.cuda.is_available()}

    def _table(self) -> WeightTable:
        return self._weights() if callable(self._weights) else self._weights

    def _all(self) -> list[torch.Tensor]:
        found = (table.get(key) for table, key in self._table().values())  # weight norm takes keys away
        return list({id(weight): weight for weight in found if weight is not None}.values())


def _is_there(weight: torch.Tensor, device: torch.device) -> bool:
    return is_mapped(weight) and weight.device.type == device.type


def _bring_back(group: list[torch.Tensor], device: torch.device) -> None:
    span = _span(group)
    try:
        block = torch.empty(span.num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # the allocators of both kinds of device raise a RuntimeError
        raise SwapError(
            f"no memory on {device} to bring back weights of {format_bytes(span.num_bytes)}; they are intact where they"
            f" are kept: {error}"
        ) from error
    span.bind(group, span.copied_to(block))


def _bind(weights: Iterable[torch.Tensor], contents: Iterable[torch.Tensor]) -> None:
    for weight, content in zip(weights, contents, strict=True):
        weight.data = content


@dataclass(frozen=True)
class _Span:
    """The memory that weights of one storage lie in.

    Attributes:
        source: its bytes, where they are now.
        offset: where in their storage it begins, in bytes.
    """

    source: torch.Tensor
    offset: int

    @property
    def num_bytes(self) -> int:
        return self.source.numel()

    def copied_to(self, block: torch.Tensor) -> torch.Tensor:
        if self.source.device.type != "cpu" or block.device.type != "cpu":
            return block.copy_(self.source)
        try:
            copy_bytes(block, self.source)  # by the file, or a disk that fails would end the process
        except OSError as error:
            raise SwapError(
                f"cannot move weights of {format_bytes(self.num_bytes)}: {error}; they are intact where they were"
            ) from error
        return block

    def bind(self, group: Iterable[torch.Tensor], block: torch.Tensor) -> None:
        """Let the weights lie in a copy of this memory."""
        for weight in group:
            weight.data = self.view_of(weight, block)

    def view_of(self, weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """A weight's own shape and strides at its place in the block."""
        begin = weight.storage_offset() * weight.element_size() - self.offset
        own = block[begin : begin + span_of(weight)].view(weight.dtype)
        return own.as_strided(weight.shape, weight.stride())


def _by_storage(weights: Iterable[torch.Tensor], among: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The weights, and all others that share their storages, by storage."""
    groups: dict[int, list[torch.Tensor]] = {w.untyped_storage()._cdata: [] for w in weights}  # noqa: SLF001
    for weight in among:
        key = weight.untyped_storage()._cdata  # noqa: SLF001 - a storage has no other identity
        if key in groups:
            groups[key].append(weight)
    return list(groups.values())


def _span(group: list[torch.Tensor]) -> _Span:
    for weight in group:
        if not is_dense(weight):
            raise SwapError(
                f"cannot move a weight of shape {tuple(weight.shape)} and strides {weight.stride()}: it overlaps itself"
                f" or has gaps, so another copy would be laid out otherwise; call .contiguous() on it first"
            )
    begins = [int(weight.storage_offset()) * weight.element_size() for weight in group]
    ends = [begin + span_of(weight) for begin, weight in zip(begins, group, strict=True)]
    first = min(begins) // ALIGNMENT * ALIGNMENT  # so that every dtype is aligned in a copy as it is here
    whole = torch.empty(0, dtype=torch.uint8, device=group[0].device).set_(
        group[0].untyped_storage(), first, (max(ends) - first,), (1,)
    )
    return _Span(whole, first)

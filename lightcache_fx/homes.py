"""Where a module's weights and its runs' slots are kept while they are away from the device.

In inference weights never change, so offloading one is binding the parameter to its copy at home: no transfer. The
module stays usable as it is, only slower on what is away, and `recall` binds everything to the device again.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lightcache_fx.arena import ALIGNMENT, Arena, arena_for, arena_of, is_dense, span_of
from lightcache_fx.errors import SwapError
from lightcache_fx.transfers import PREFETCH, WAIT

Tier = Literal["host", "disk"]
WeightTable = Mapping[str, tuple[dict[str, Any], str]]
"""Where each weight is looked up, by its full name: `module_state.weight_slots`."""


class Homes:
    """The arenas of one module.

    Args:
        weights: of the module.
        tier: page-locked host memory, or a memory-mapped file.
        folder: where files are made; None for the system's folder for temporary files.
    """

    def __init__(self, weights: WeightTable, tier: Tier, folder: str | Path | None = None) -> None:
        self.tier = tier
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
        return self.adopt_all(map(self._find, names))

    def adopt_all(self, weights: Iterable[torch.Tensor]) -> int:
        """As `adopt`, for the weights themselves."""
        with self._lock:
            away = [weight for weight in weights if not self.is_home(weight)]
            groups = list(_by_storage(away, self._all()).values())
            if not groups:
                return 0
            spans = [_span(group) for group in groups]
            arena = arena_for(
                (torch.empty(span.num_bytes, dtype=torch.uint8, device="meta") for span in spans), **self._options()
            )
            moved = [(group, span, span.copied_to(arena)) for group, span in zip(groups, spans, strict=True)]
            self._arenas.append(arena)
            for group, span, block in moved:
                for weight in group:
                    weight.data = span.view_of(weight, block)
            return sum(span.num_bytes for span in spans)

    def recall(self, device: torch.device) -> None:
        """Bind every weight that is at home to memory of the device again."""
        with self._lock:
            for weight in self._all():
                if self.is_home(weight):
                    fresh = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
                    weight.data = fresh.copy_(weight.data)
            self._arenas = [arena for arena in self._arenas if arena.free_bytes < arena.num_bytes]

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
                copies = [PREFETCH(home, device, "a weight") for home in homes]
                for weight, copy in zip(weights, copies, strict=True):
                    weight.data = WAIT(copy)
                del copies
                yield
            finally:
                for weight, home in zip(weights, homes, strict=True):
                    weight.data = home

    def is_home(self, weight: torch.Tensor) -> bool:
        """Whether a weight is bound to its copy at home."""
        return arena_of(weight, self._arenas) is not None

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

    def _options(self) -> dict[str, Any]:
        if self.tier == "disk":
            return {"folder": self.folder}
        return {"page_locked": torch.cuda.is_available()}

    def _find(self, name: str) -> torch.Tensor:
        table, key = self._weights[name]
        found: torch.Tensor = table[key]
        return found

    def _all(self) -> list[torch.Tensor]:
        found = (table[key] for table, key in self._weights.values() if table[key] is not None)
        return list({id(weight): weight for weight in found}.values())


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

    def copied_to(self, arena: Arena) -> torch.Tensor:
        block = arena.tensor_like(self.source)
        block.copy_(self.source)
        return block

    def view_of(self, weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """A weight's own shape and strides at its place in the block."""
        begin = weight.storage_offset() * weight.element_size() - self.offset
        own = block[begin : begin + span_of(weight)].view(weight.dtype)
        return own.as_strided(weight.shape, weight.stride())


def _by_storage(weights: Iterable[torch.Tensor], among: Iterable[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
    """The weights, and all others that share their storages, by storage."""
    groups: dict[int, list[torch.Tensor]] = {w.untyped_storage()._cdata: [] for w in weights}  # noqa: SLF001
    for weight in among:
        key = weight.untyped_storage()._cdata  # noqa: SLF001 - a storage has no other identity
        if key in groups:
            groups[key].append(weight)
    return groups


def _span(group: list[torch.Tensor]) -> _Span:
    for weight in group:
        if not is_dense(weight):
            raise SwapError(
                f"cannot move a weight of shape {tuple(weight.shape)} and strides {weight.stride()}: it overlaps itself"
                f" or has gaps, so another copy would be laid out otherwise; call .contiguous() on it first"
            )
    begins = [int(weight.storage_offset()) * weight.element_size() for weight in group]
    ends = [begin + span_of(weight) for begin, weight in zip(begins, group, strict=True)]
    first = min(begins)
    whole = torch.empty(0, dtype=torch.uint8, device=group[0].device).set_(
        group[0].untyped_storage(), first, (max(ends) - first,), (1,)
    )
    return _Span(whole, first)

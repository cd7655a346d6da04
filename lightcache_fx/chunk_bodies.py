"""What the bodies of a region's chunks take by their own liveness, found once for all regions that do the same.

A body is built and run with fake tensors, which is most of what a search costs. But the blocks of a model repeat, the
graphs that a search goes through share most of their calls, and what is looked at for one peak is looked at again for
the next.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lightcache_fx.chunked import build_region
from lightcache_fx.in_place import Overwrite
from lightcache_fx.regions import Region
from lightcache_fx.repeats import calls_key


class Bodies:
    """The peaks of regions in chunks, by what a region does."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[int, tuple[Overwrite, ...]]] = {}
        self._numbers: dict[Hashable, int] = {}

    def peak(
        self, region: Region, count: int, candidates: Sequence[tuple[int, int]], rounding: int
    ) -> tuple[int, tuple[Overwrite, ...]]:
        """Bytes that the largest chunk takes, and what is written over inputs.

        Args:
            region: as for `build_region`.
            count: number of chunks.
            candidates: as for `build_region`.
            rounding: as for `build_region`.
        """
        key = self._number(region_key(region)), count, tuple(candidates), rounding
        if key not in self._known:
            module = build_region(region, count, {}, candidates=candidates, rounding=rounding)
            self._known[key] = module.memory_peak(rounding), module.overwrites
        return self._known[key]

    def _number(self, key: Hashable) -> int:
        """A number for each key, so that the long keys are kept once."""
        return self._numbers.setdefault(key, len(self._numbers))


def region_key(region: Region) -> Hashable:
    """Equal for regions whose bodies are equal: the same calls on values laid out alike, cut alike."""
    places, calls = calls_key(region.inputs, region.body)
    needs = tuple(
        (region.axes[node], tuple((places[source].index, need) for source, need in region.needs[node].items()))
        for node in region.body
    )
    return calls, needs, tuple(places[node].index for node in region.outputs)

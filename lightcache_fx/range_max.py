"""The maximum over a range of calls while ranges of calls grow.

A segment tree from the leaves up, with marks that stay where they are put (Zhang Kunwei, *The power of statistics*,
2012): each node has the maximum below it, what was added to the whole of it included.
"""

from __future__ import annotations

from collections.abc import Sequence

_NOTHING = -(1 << 62)


class RangeMax:
    """A row of numbers; positions are counted modulo its length, so that a range may reach over the end."""

    def __init__(self, values: Sequence[int]) -> None:
        self._count = len(values)
        self._leaves = leaves = 1 << (self._count + 1).bit_length()  # one more at each end, for open ranges
        self._most = [_NOTHING] * (2 * leaves)
        self._most[leaves + 1 : leaves + 1 + self._count] = values
        self._added = [0] * leaves
        for node in range(leaves - 1, 0, -1):
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])

    def most(self, begin: int, end: int) -> int:
        """The maximum from `begin` to before `end`; less than any value where that is nothing."""
        return max((self._most_of(*part) for part in self._parts(begin, end)), default=_NOTHING)

    def add(self, begin: int, end: int, value: int) -> None:
        """Add to each from `begin` to before `end`."""
        for part in self._parts(begin, end):
            self._add_to(*part, value)

    def _parts(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The range, at most one turn long, as ranges that do not reach over the end."""
        if begin >= end:
            return []
        length = end - begin
        begin %= self._count
        end = begin + length
        return [(begin, end)] if end <= self._count else [(begin, self._count), (0, end - self._count)]

    def _most_of(self, begin: int, end: int) -> int:
        most, added = self._most, self._added
        left, right = begin + self._leaves, end + self._leaves + 1
        from_left = from_right = _NOTHING
        while left ^ right ^ 1:
            if not left & 1:
                from_left = max(from_left, most[left ^ 1])
            if right & 1:
                from_right = max(from_right, most[right ^ 1])
            left >>= 1
            right >>= 1
            from_left += added[left]
            from_right += added[right]
        found = max(from_left, from_right)
        while left > 1:
            left >>= 1
            found += added[left]
        return found

    def _add_to(self, begin: int, end: int, value: int) -> None:
        most, added, leaves = self._most, self._added, self._leaves
        left, right = begin + leaves, end + leaves + 1
        while left > 1:
            if left ^ right ^ 1 and left != right:
                for node in ((left ^ 1,) if not left & 1 else ()) + ((right ^ 1,) if right & 1 else ()):
                    most[node] += value
                    if node < leaves:
                        added[node] += value
            left >>= 1
            right >>= 1
            most[left] = max(most[2 * left], most[2 * left + 1]) + added[left]
            most[right] = max(most[2 * right], most[2 * right + 1]) + added[right]

"""The tree of maxima against a list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightcache_fx.range_max import RangeMax


@given(st.data(), st.lists(st.integers(0, 20), min_size=1, max_size=20))
def test_as_a_list(data: st.DataObject, values: list[int]) -> None:
    tree, count = RangeMax(values), len(values)
    for _ in range(data.draw(st.integers(1, 12), label="times")):
        begin = data.draw(st.integers(-count, 2 * count), label="begin")
        end = begin + data.draw(st.integers(0, count), label="length")
        covered = [index % count for index in range(begin, end)]
        if data.draw(st.booleans(), label="add"):
            by = data.draw(st.integers(-5, 9), label="by")
            tree.add(begin, end, by)
            for index in covered:
                values[index] += by
        found = tree.most(begin, end)
        assert found == max(values[index] for index in covered) if covered else found < 0

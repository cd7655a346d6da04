"""Races: who drops out when, and what a way is worth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightcache_fx.racing import interquartile_mean, race


def run(table: list[list[float]], speeds: list[float]) -> tuple[dict[int, list[float]], list[int]]:
    """The race of a table of scores, and how often each way was tried."""
    tried = [0] * len(table)

    def score(way: int, place: int) -> float:
        assert tried[way] == place, "one input after the other"
        tried[way] += 1
        return table[way][place]

    return race(speeds, score, len(table[0])), tried


def test_who_drops_out_by_hand() -> None:
    """The second is 9 to 11 dB behind the first, which is as fast; the third is too, and faster; the fourth is near."""
    table = [[50, 51, 52, 53, 54], [40, 42, 42, 90, 90], [41, 40, 42, 40, 41], [49, 52, 51, 50, 40]]
    left, tried = run(table, [2.0, 2.0, 3.0, 2.0])
    assert tried == [5, 3, 5, 5]
    assert left == {way: table[way] for way in (0, 2, 3)}


def test_a_slower_way_beats_none() -> None:
    left, tried = run([[50.0] * 6, [10.0] * 6], [1.5, 2.0])
    assert list(left) == [0, 1]
    assert tried == [6, 6]
    left, tried = run([[50.0] * 6, [10.0] * 6], [2.0, 1.5])
    assert list(left) == [0]
    assert tried == [6, 3]


def test_an_input_that_goes_astray_makes_none_drop_out() -> None:
    """One input of 30 dB between two that are otherwise alike."""
    left, _ = run([[50, 51, 52, 51, 50], [50, 21, 52, 52, 51]], [2.0, 2.0])
    assert list(left) == [0, 1]


@pytest.mark.parametrize("num_inputs", [1, 2, 3])
def test_of_few_inputs_all_are_tried_on_all(num_inputs: int) -> None:
    left, tried = run([[50.0] * num_inputs, [10.0] * num_inputs], [2.0, 2.0])
    assert list(left) == [0, 1]
    assert tried == [num_inputs] * 2


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_some_way_of_the_highest_speed_is_always_left(data: st.DataObject) -> None:
    ways, num_inputs = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    values = st.floats(10, 120)
    table = [data.draw(st.lists(values, min_size=num_inputs, max_size=num_inputs)) for _ in range(ways)]
    speeds = data.draw(st.lists(st.sampled_from([1.5, 2.0, 3.0]), min_size=ways, max_size=ways))
    left, tried = run(table, speeds)
    assert all(left[way] == table[way] for way in left)
    assert max(speeds[way] for way in left) == max(speeds)
    assert all(tried[way] >= min(3, num_inputs) for way in range(ways))


def test_interquartile_means_by_hand() -> None:
    assert interquartile_mean([7.0]) == 7
    assert interquartile_mean([1.0, 3.0]) == 2
    assert interquartile_mean([0.0, 4.0, 6.0, 1000.0]) == 5
    assert interquartile_mean([9.0, 1.0, 2.0, 3.0, 4.0, -50.0, 5.0]) == 3  # of 7, one is cut off at either end
    assert interquartile_mean([5, 1, 8, 3, 2, 7, 6, 4]) == 4.5

"""Settings: what is allowed, what each mistake is answered with, and the YAML round trip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightcache_fx import Auto, Cache, Chunk, Decode, Policy, Residual
from lightcache_fx.cli.presets import PRESETS
from lightcache_fx.errors import LightcacheError, PolicyError
from lightcache_fx.published import PUBLISHED

CACHE_KEYS = "cut, interval, steps, mask, magnitude, adaptive, order, guard, first, last, num_steps"
POLICY_KEYS = (
    "cache, guidance, quality, speedup, calibration, hoist, max_hoisted_bytes, rates, "
    "chunk, decode, swap, memory_budget, calls_per_step, compile, "
    "max_signatures, dynamic"
)
CUTS = "expected a depth (0, 1, 2, ...), a module path or a list of them, Residual(first=..., last=...) or 'auto'"
BYTES = "expected a number of bytes such as 1048576, '64MiB' or '1.5GB'"


def _message(make: Callable[[], object]) -> str:
    with pytest.raises(PolicyError) as error:
        make()
    assert isinstance(error.value, LightcacheError)
    assert isinstance(error.value, ValueError)
    return str(error.value)


# Round trip -------------------------------------------------------------------------------------------------------

paths = st.text(min_size=1, max_size=20).filter(lambda text: text != "auto")
num_bytes = st.integers(1, 2**50)
cuts = st.one_of(
    st.integers(0, 20),
    paths,
    st.lists(paths, min_size=1, max_size=3, unique=True),
    st.builds(Residual, first=paths, last=paths),
    st.builds(Auto, max_kept_bytes=st.none() | num_bytes),
    st.just("auto"),
)
schedules = st.one_of(
    st.fixed_dictionaries({"interval": st.integers(1, 20)}),
    st.fixed_dictionaries({"steps": st.sets(st.integers(0, 50)).map(lambda steps: sorted({0, *steps}))}),
    st.fixed_dictionaries({"mask": st.lists(st.booleans(), max_size=12).map(lambda mask: [True, *mask])}),
    st.fixed_dictionaries({"interval": st.integers(1, 9), "num_steps": st.integers(1, 99)}),
)
caches = st.builds(
    lambda cut, schedule, first, last: Cache(cut=cut, **schedule, first=first, last=last),
    cuts, schedules, st.integers(1, 4), st.integers(0, 4),
)  # fmt: skip
budgets = num_bytes | st.integers(1, 100).map(lambda percent: f"{percent}%") | st.sampled_from(["0.5%", "62.5%"])
policies = st.builds(
    Policy,
    cache=st.none() | caches,
    chunk=st.none() | st.builds(Chunk, budget=budgets),
    decode=st.none() | st.builds(Decode, frames=st.none() | st.integers(1, 9), budget=st.none() | budgets),
    hoist=st.booleans(),
    max_hoisted_bytes=st.none() | num_bytes,
    rates=st.dictionaries(st.text(max_size=10), st.sampled_from(["const", "run", "step", "latent"]), max_size=3),
    max_signatures=st.integers(1, 99),
    dynamic=st.sampled_from([None, True, False]),
)


@settings(max_examples=150, deadline=None)
@given(policies)
def test_yaml_round_trip(policy: Policy) -> None:
    text = policy.to_yaml()
    assert Policy.from_yaml(text) == policy
    assert Policy.from_yaml(text).to_yaml() == text


def test_yaml_file_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(cache=Cache(cut=Residual(first="blocks.0", last="blocks.5"), interval=3, last=1))
    text = policy.to_yaml(tmp_path / "policy.yaml")
    assert (tmp_path / "policy.yaml").read_text(encoding="utf-8") == text
    assert Policy.from_yaml(tmp_path / "policy.yaml") == policy
    monkeypatch.chdir(tmp_path)
    assert Policy.from_yaml("policy.yaml") == policy


def test_yaml_holds_only_what_differs_from_the_default() -> None:
    assert Policy.deepcache(3, 1).to_yaml() == "cache:\n  cut: 1\n  interval: 3\n"
    assert Policy().to_yaml() == "{}\n"


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("cache: {cut: auto, interval: 2}", Auto()),
        ("cache: {cut: {auto: {max_kept_bytes: 64MiB}}, interval: 2}", Auto(max_kept_bytes=64 * 2**20)),
        ("cache: {cut: {auto: }, interval: 2}", Auto()),
        ("cache: {cut: {residual: {first: a, last: b}}, interval: 2}", Residual(first="a", last="b")),
        ("cache: {cut: [a, b], interval: 2}", ["a", "b"]),
        ("cache: {cut: up_blocks.3, interval: 2}", "up_blocks.3"),
        ("cache: {cut: 1, interval: 2}", 1),
    ],
)
def test_yaml_spellings_of_a_cut(text: str, cut: object) -> None:
    policy = Policy.from_yaml(text)
    assert policy.cache is not None
    assert policy.cache.cut == cut


@pytest.mark.parametrize("text", [pytest.param(""), pytest.param("{}"), "\n", "# nothing yet\n"])
def test_an_empty_text_is_the_lossless_policy(text: str) -> None:
    assert Policy.from_yaml(text) == Policy()


# Presets and values -----------------------------------------------------------------------------------------------


def test_presets() -> None:
    assert Policy.deepcache(interval=3, branch=2) == Policy(cache=Cache(cut=2, interval=3))
    assert Policy.deepcache() == Policy(cache=Cache(cut=0, interval=3))
    assert Policy().cache is None
    assert Policy().hoist


@pytest.mark.parametrize("system", [None, *PUBLISHED])
def test_lightcache_is_the_published_cache_and_three_parts_that_can_be_left_out(system: str | None) -> None:
    policy = Policy.lightcache(system)
    cached = Policy.lightcache(system, swap=False, chunk=False, slice=False)
    assert cached == Policy(cache=policy.cache)
    assert policy.cache is not None
    parts = {"swap": policy.swap, "chunk": policy.chunk, "slice": policy.decode}
    assert all(part is not None for part in parts.values())
    for name in parts:
        without = Policy.lightcache(system, **{name: False})
        field = "decode" if name == "slice" else name
        assert without == policy.model_copy(update={field: None})
    assert Policy.from_yaml(policy.to_yaml()) == policy


def test_lightcache_has_the_settings_of_the_command_lines_systems() -> None:
    assert {name: Policy.lightcache(name).cache for name in PRESETS} == {n: s.cache for n, s in PRESETS.items()}
    intervals = {name: settings.cache.interval for name, settings in PUBLISHED.items()}
    assert intervals == {
        "svd-xt": 8,
        "animatediff-lightning": 2,
        "animatediff": 2,
        "modelscope": 2,
        "easyanimate": 2,
    }


def test_lightcache_takes_another_interval_and_branch() -> None:
    assert Policy.lightcache("svd-xt", interval=3).cache == Cache(cut=0, interval=3)
    assert Policy.lightcache("svd-xt", branch=2).cache == Cache(cut=2, interval=8)
    assert Policy.lightcache(interval=5, branch=1).cache == Cache(cut=1, interval=5)
    with pytest.raises(PolicyError, match=r"Cache: interval: .*, got 0"):
        Policy.lightcache("svd-xt", interval=0)


def test_lightcache_names_the_nearest_system() -> None:
    with pytest.raises(PolicyError) as found:
        Policy.lightcache("animate-diff")
    assert str(found.value) == (
        "lightcache: system: no settings of 'animate-diff'; did you mean 'animatediff',"
        " 'animatediff-lightning', 'easyanimate'?; there are those of svd-xt, animatediff-lightning, animatediff,"
        " modelscope, easyanimate; leave it out for other models"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("64MiB", 64 * 2**20), ("1.5 GB", 1_500_000_000), ("10", 10), (" 2kib ", 2048), (".5KB", 500), (7, 7), ("8B", 8)],
)
def test_bytes(text: object, expected: int) -> None:
    assert Policy(max_hoisted_bytes=text).max_hoisted_bytes == expected
    assert Auto(max_kept_bytes=text).max_kept_bytes == expected


def test_sequences_of_other_kinds() -> None:
    assert Cache(cut=("a", "b"), steps=range(0, 9, 3)).steps == [0, 3, 6]
    assert Cache(cut=0, mask=(True, False)).mask == [True, False]


def test_settings_are_frozen() -> None:
    policy = Policy()
    with pytest.raises(ValueError, match="frozen"):
        policy.hoist = False


# Mistakes, line by line -------------------------------------------------------------------------------------------

CACHE_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"cut": 0, "interval": 0}, "Cache: interval: Input should be greater than or equal to 1, got 0"),
    ({"cut": 0, "interval": -2}, "Cache: interval: Input should be greater than or equal to 1, got -2"),
    ({"cut": 0, "interval": True}, "Cache: interval: Input should be a valid integer, got True"),
    ({"cut": 0, "interval": 2.5}, "Cache: interval: Input should be a valid integer, got 2.5"),
    ({"cut": 0, "interval": "3"}, "Cache: interval: Input should be a valid integer, got '3'"),
    ({"cut": 0, "interval": 2, "first": 0}, "Cache: first: Input should be greater than or equal to 1, got 0"),
    ({"cut": 0, "interval": 2, "last": -1}, "Cache: last: Input should be greater than or equal to 0, got -1"),
    ({"cut": 0, "interval": 2, "num_steps": 0}, "Cache: num_steps: Input should be greater than or equal to 1, got 0"),
    ({"cut": 0, "steps": [0, -1]}, "Cache: steps: Input should be greater than or equal to 0, got -1"),
    ({"cut": 0, "steps": "0,1"}, "Cache: steps: Input should be a valid list, got '0,1'"),
    ({"interval": 3}, "Cache: cut is missing"),
    ({"cut": True, "interval": 3}, "Cache: cut: expected a depth, module path(s), Residual or 'auto', got a bool"),
    (
        {"cut": [], "interval": 3},
        "Cache: cut: an empty list of module paths; leave `cache` out for a lossless policy, got []",
    ),
    (
        {"cut": "", "interval": 3},
        "Cache: cut: an empty module path; to skip the whole model cut its last block instead, got ''",
    ),
    (
        {"cut": {"foo": 1}, "interval": 3},
        "Cache: cut: expected {residual: {first, last}} or {auto: {max_kept_bytes}}, got keys ['foo']",
    ),
    (
        {"cut": 0, "intervall": 3},
        f"Cache: unknown key 'intervall'; did you mean 'interval'? allowed keys: {CACHE_KEYS}",
    ),
    (
        {"cut": {"auto": {"max_kept_bytes": "lots"}}, "interval": 2},
        f"Cache: cut: Auto: max_kept_bytes: {BYTES}, got 'lots'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), CACHE_MISTAKES, ids=[repr(given) for given, _ in CACHE_MISTAKES])
def test_cache_mistakes(given: dict[str, Any], message: str) -> None:
    assert _message(lambda: Cache(**given)) == message


# The message begins with the class once, and says each thing once.
CACHE_WORDING: list[tuple[dict[str, Any], str]] = [
    ({"cut": -1, "interval": 2}, f"Cache: cut: {CUTS}, got -1"),
    ({"cut": 1.5, "interval": 2}, f"Cache: cut: {CUTS}, got 1.5"),
    ({"cut": None, "interval": 2}, f"Cache: cut: {CUTS}, got None"),
    ({"cut": ["a", 3], "interval": 2}, f"Cache: cut: {CUTS}, got ['a', 3]"),
    ({"cut": ["a", "b", "a"], "interval": 2}, "Cache: cut: names 'a' twice; name each module once"),
    ({"cut": 0}, "Cache: expected exactly one of interval, steps, mask, magnitude, adaptive; got none"),
    (
        {"cut": 0, "interval": 2, "steps": [0]},
        "Cache: expected exactly one of interval, steps, mask, magnitude, adaptive; got interval and steps",
    ),
    ({"cut": 0, "mask": [False, True]}, "Cache: mask must begin with True: the first step has nothing to reuse"),
    ({"cut": 0, "mask": []}, "Cache: mask must begin with True: the first step has nothing to reuse"),
    ({"cut": 0, "steps": [1, 2]}, "Cache: steps must begin with step 0, which has nothing to reuse; got [1, 2]"),
    ({"cut": 0, "steps": []}, "Cache: steps must begin with step 0, which has nothing to reuse; got []"),
    ({"cut": 0, "steps": [0, 9], "num_steps": 5}, "Cache: steps names step 9, but num_steps=5 (counted from 0)"),
    ({"cut": 0, "mask": [True], "num_steps": 5}, "Cache: mask has 1 entries for num_steps=5; give one entry a step"),
    ({"cut": 0, "interval": 3, "foo": 1}, f"Cache: unknown key 'foo'; allowed keys: {CACHE_KEYS}"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), CACHE_WORDING, ids=[repr(given) for given, _ in CACHE_WORDING])
def test_cache_wording(given: dict[str, Any], message: str) -> None:
    assert _message(lambda: Cache(**given)) == message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mask": [False, True]}, ["Cache", "mask must begin with True", "nothing to reuse"]),
        ({"mask": [True, 1]}, ["Cache: mask", "boolean", "got 1"]),
        ({"interval": 2, "steps": [0]}, ["exactly one of interval, steps, mask", "got interval and steps"]),
        ({}, ["exactly one of interval, steps, mask", "got none"]),
        ({"steps": [1, 2]}, ["steps must begin with step 0", "got [1, 2]"]),
        ({"steps": [0, 9], "num_steps": 5}, ["step 9", "num_steps=5"]),
        ({"mask": [True], "num_steps": 5}, ["mask has 1 entries", "num_steps=5"]),
        ({"interval": 3, "foo": 1}, ["unknown key 'foo'", f"allowed keys: {CACHE_KEYS}"]),
    ],
)
def test_schedule_mistakes_by_meaning(given: dict[str, Any], words: list[str]) -> None:
    message = _message(lambda: Cache(cut=0, **given))
    assert [word for word in words if word not in message] == [], message


POLICY_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"chache": None}, f"Policy: unknown key 'chache'; did you mean 'cache'? allowed keys: {POLICY_KEYS}"),
    ({"max_hoisted_bytes": 0}, "Policy: max_hoisted_bytes: Input should be greater than 0, got 0"),
    ({"max_hoisted_bytes": "0.1"}, "Policy: max_hoisted_bytes: Input should be greater than 0, got '0.1'"),
    ({"max_hoisted_bytes": "64 Mibs"}, f"Policy: max_hoisted_bytes: {BYTES}, got '64 Mibs'"),
    ({"max_hoisted_bytes": True}, "Policy: max_hoisted_bytes: Input should be a valid integer, got True"),
    ({"max_hoisted_bytes": 1.5}, "Policy: max_hoisted_bytes: Input should be a valid integer, got 1.5"),
    ({"hoist": 1}, "Policy: hoist: Input should be a valid boolean, got 1"),
    ({"max_signatures": 0}, "Policy: max_signatures: Input should be greater than or equal to 1, got 0"),
    (
        {"hoist": 1, "max_signatures": 0},
        (
            "Policy: hoist: Input should be a valid boolean, got 1;"
            " max_signatures: Input should be greater than or equal to 1, got 0"
        ),
    ),
    (
        {"cache": {"cut": 0, "interval": 0}},
        "Policy: cache: Cache: interval: Input should be greater than or equal to 1, got 0",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), POLICY_MISTAKES, ids=[repr(given) for given, _ in POLICY_MISTAKES])
def test_policy_mistakes(given: dict[str, Any], message: str) -> None:
    assert _message(lambda: Policy(**given)) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"rates": {"mask": "never"}},
            "Policy: rates.mask: Input should be 'const', 'run', 'step' or 'latent', got 'never'",
        ),
        ({"cache": 3}, "Policy: cache: expected a Cache, or a mapping with the keys " + CACHE_KEYS + ", got 3"),
        ({"foo": 1}, f"Policy: unknown key 'foo'; allowed keys: {POLICY_KEYS}"),
        (
            {"cache": {"cut": 0, "intervall": 3}},
            f"Policy: cache: Cache: unknown key 'intervall'; did you mean 'interval'? allowed keys: {CACHE_KEYS}",
        ),
    ],
)  # fmt: skip
def test_policy_wording(given: dict[str, Any], message: str) -> None:
    assert _message(lambda: Policy(**given)) == message


@pytest.mark.parametrize(
    ("field", "given", "words"),
    [
        (Residual, {"first": "a"}, ["Residual", "last is missing"]),
        (Residual, {"first": "a", "last": 3}, ["Residual", "last", "string", "got 3"]),
        (Auto, {"max_kept_bytes": -1}, ["Auto", "max_kept_bytes", "greater than 0", "got -1"]),
        (Auto, {"max_bytes": 1}, ["Auto", "unknown key 'max_bytes'", "max_kept_bytes"]),
    ],
)
def test_mistakes_in_cuts(field: type, given: dict[str, Any], words: list[str]) -> None:
    message = _message(lambda: field(**given))
    assert [word for word in words if word not in message] == [], message


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\n", ["cannot read the policy", "line 1", "expected ',' or ']'"]),
        ("a: b: c", ["cannot read the policy", "line 1, column 5"]),
        ("- 1\n- 2\n", ["a policy is a mapping such as 'cache: {cut: 0, interval: 3}'", "got [1, 2]"]),
        ("cache:\n  cut: 0\n  intervall: 3\n", ["unknown key 'intervall'", "did you mean 'interval'?"]),
        ("1: 2", ["unknown key '1'", POLICY_KEYS]),
        ("cache: {cut: 0, interval: 3, interval: 4}\nhoist: yes please\n", ["hoist", "boolean", "'yes please'"]),
    ],
)
def test_bad_yaml(text: str, words: list[str], tmp_path: Path) -> None:
    message = _message(lambda: Policy.from_yaml(text))
    assert [word for word in words if word not in message] == [], message
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    message = _message(lambda: Policy.from_yaml(file))
    assert [word for word in words if word not in message.replace(" in mine.yaml", "")] == [], message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read the policy in nowhere.yaml" in _message(lambda: Policy.from_yaml(tmp_path / "nowhere.yaml"))
    assert "No such file" in _message(lambda: Policy.from_yaml("nowhere.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the policy in binary.yaml" in _message(lambda: Policy.from_yaml(tmp_path / "binary.yaml"))


def test_from_yaml_names_what_it_was_given() -> None:
    assert "expected a path or YAML text, got int" in _message(lambda: Policy.from_yaml(3))  # type: ignore[arg-type]


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("cache: {cut: 0, intervall: 3}\n", encoding="utf-8")
    assert "mine.yaml" in _message(lambda: Policy.from_yaml(file))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("0%", "a share of the peak above 0% and up to 100%, got '0%'"),
        ("120 %", "a share of the peak above 0% and up to 100%, got '120 %'"),
        ("x%", f"{BYTES}, got 'x%'"),
        (0.6, "bytes such as '1.5GiB', or a share of the peak such as '60%', got 0.6"),
        (True, "bytes such as '1.5GiB', or a share of the peak such as '60%', got True"),
        (0, "bytes such as '1.5GiB', or a share of the peak such as '60%', got 0"),
    ],
)
@pytest.mark.parametrize("kind", [Chunk, Decode])
def test_budgets_that_are_none(kind: type[Chunk | Decode], budget: object, expected: str) -> None:
    message = _message(lambda: kind(budget=budget))  # type: ignore[arg-type]
    assert message == f"{kind.__name__}: budget: expected {expected.removeprefix('expected ')}"

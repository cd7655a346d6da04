"""Calibrations: the cheapest schedules, what is measured of a model, files, and what policies make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import lightcache_fx as lc
from lightcache_fx.calibrating import _Errors, _share_left, _Trial
from lightcache_fx.calibration import weights_of
from lightcache_fx.errors import CalibrationError, CutError, PolicyError, ScheduleError
from lightcache_fx.pipeline import TransformedPipeline
from lightcache_fx.quality import compare_videos
from lightcache_fx.scheduling import best_schedules
from lightcache_fx.settings import read_quality
from pipelines import PIPELINES, SMALL
from toys import Denoiser, latent, prompt

NUM_STEPS = 5
CASE = PIPELINES["sd"]


# Schedules ------------------------------------------------------------------------------------------------------------


Costs = dict[tuple[int | None, int, int], float]


def cost_of(costs: Costs, num_steps: int, full: tuple[int, ...]) -> float:
    total = 0.0
    for before, begin, end in zip([None, *full], full, [*full[1:], num_steps], strict=False):
        for step in range(begin + 1, end):
            total += costs[before, begin, step]
    return total


def allowed(num_steps: int, count: int, most_reused: int) -> list[tuple[int, ...]]:
    """All schedules, one by one."""
    found = [(0, *rest) for rest in itertools.combinations(range(1, num_steps), count - 1)]
    return [full for full in found if all(b - a <= most_reused + 1 for a, b in itertools.pairwise([*full, num_steps]))]


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_no_schedule_is_cheaper(data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, 8))
    most_reused = data.draw(st.integers(1, 7))
    number = st.floats(0, 100, allow_nan=False)
    costs: Costs = {
        (before, source, step): data.draw(number)
        for step in range(num_steps)
        for source in range(step)
        for before in [*range(source), None]
    }
    found = best_schedules(lambda *steps: costs[steps], num_steps, most_reused)
    for count in range(1, num_steps + 1):
        possible = allowed(num_steps, count, most_reused)
        assert (count in found) == bool(possible)
        if possible:
            assert found[count] in possible
            least = min(cost_of(costs, num_steps, full) for full in possible)
            assert cost_of(costs, num_steps, found[count]) == pytest.approx(least)


def kept(*values: float) -> dict[str, torch.Tensor]:
    return {f"slot_{place}": torch.full((2, 3), value) for place, value in enumerate(values)}


def test_what_a_line_leaves_of_an_error() -> None:
    """Of a straight one nothing, of a constant one as nothing moved, of one that turns back more than reuse has."""
    assert _share_left(kept(1.0), kept(3.0), kept(7.0), 2.0) == pytest.approx(0, abs=1e-6)
    assert _share_left(kept(4.0), kept(4.0), kept(4.0), 1.0) == 0
    assert _share_left(kept(1.0), kept(3.0), kept(4.0), 1.0) == pytest.approx(1)
    assert _share_left(kept(1.0), kept(3.0), kept(1.0), 1.0) == pytest.approx(2)
    both = _share_left(kept(1.0, 1.0), kept(3.0, 3.0), kept(7.0, 1.0), 2.0)
    assert both == pytest.approx(math.sqrt((0**2 + 3**2) / 2))


def test_errors_are_means_and_infinite_where_nothing_was_seen() -> None:
    errors = _Errors()
    errors.add(2, 4, 1.0, {0: 0.5, 1: 0.25})
    errors.add(2, 4, 3.0, {0: 0.5})
    assert errors.of(None, 2, 4) == 2
    assert errors.of(0, 2, 4) == 1
    assert errors.of(1, 2, 4) == 0.25
    assert errors.of(None, 3, 4) == errors.of(3, 2, 4) == math.inf


def test_errors_of_extrapolation_are_those_of_a_run() -> None:
    """Each is the error of reuse as a run shows it, times what the kept values say of the line."""
    pipe, order = load(), (0, 1)
    trial = _Trial(pipe, "unet", 0, order, 2, lc.Policy(), [clip(0)])
    fast = lc.transform_pipeline(load(), lc.Policy(cache=lc.Cache(cut=0, interval=1)))
    with lc.record_kept(fast.unet) as recording:
        clip(0)(fast)
    values = [value.float() for value in recording.at(recording.names[0])]
    seen = trial._errors._extrapolated
    assert set(seen) == {(i, j, k) for k in range(NUM_STEPS) for j in range(k - 2, k) for i in range(max(0, j - 3), j)}
    for (before, source, step), found in seen.items():
        ahead = (step - source) / (source - before)
        line = values[source] + ahead * (values[source] - values[before])
        share = float((values[step] - line).norm() / (values[step] - values[source]).norm())
        assert found == [pytest.approx(trial._errors.of(None, source, step) * share, rel=1e-3)]


# Calibrating ----------------------------------------------------------------------------------------------------------


def clip(index: int, steps: int = NUM_STEPS) -> Callable[[Any], Any]:
    def generate(pipe: Any) -> Any:
        return CASE.generate(pipe, index, SMALL, steps).numpy()

    return generate


def load() -> Any:
    return CASE.build()


@pytest.fixture(scope="module")
def calibration() -> lc.Calibration:
    said: list[str] = []
    pipe = load()
    unet, state = pipe.unet, {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    found = lc.calibrate(
        pipe, [clip(0)], cuts=[0], orders=(0, 1), max_reuse=3, points=3, probes=3, progress=said.append
    )
    assert pipe.unet is unet
    assert all(torch.equal(weight, state[name]) for name, weight in unet.state_dict().items())
    assert said
    return found


def test_each_point_is_what_a_policy_of_it_makes(calibration: lc.Calibration) -> None:
    """A point is looked at by the policy that it stands for, generated anew and compared here."""
    pipe = load()
    plain = clip(0)(pipe)
    tried = {(point.order, len(point.full_steps)): point for point in calibration.points}
    for point in list(tried.values())[::5]:
        fast = lc.transform_pipeline(pipe, lc.Policy(cache=point.cache(calibration.num_steps)))
        found = compare_videos(plain, clip(0)(fast), measures=("psnr", "ssim"))
        assert found.psnr.mean == pytest.approx(point.psnr, abs=1e-6)
        assert found.ssim.mean == pytest.approx(point.ssim, abs=1e-6)
        report = lc.inspect(fast.unet)
        assert report.counts["full"] == len(point.full_steps)
        assert report.plan.flop_bound_speedup(NUM_STEPS) == pytest.approx(point.speedup)


def test_schedules_race() -> None:
    """Of four inputs: those that are beaten are not tried on the last one, and a point is of the middle half of all."""
    pipe, tried = load(), [0] * 4

    def counted(place: int) -> Callable[[Any], Any]:
        def generate(pipe: Any) -> Any:
            tried[place] += 1
            return clip(place)(pipe)

        return generate

    inputs = [counted(place) for place in range(4)]
    found = lc.calibrate(pipe, inputs, cuts=[0], orders=(0,), max_reuse=3, points=4, probes=1)
    assert tried[1] == tried[2] > tried[3] == 1 + len(found.points), "once more in full, and for each that is left"
    point = max(found.points, key=lambda point: point.speedup)
    assert len(point.full_steps) == 2, "a slower one beats none, and so one of the fastest is left"
    fast = lc.transform_pipeline(pipe, lc.Policy(cache=point.cache(NUM_STEPS)))
    scores = [compare_videos(clip(i)(pipe), clip(i)(fast), measures=("psnr", "ssim")) for i in range(4)]
    for name, value in (("psnr", point.psnr), ("ssim", point.ssim)):
        assert value == pytest.approx(sum(sorted(score.figure(name) for score in scores)[1:3]) / 2, abs=1e-6)


def test_results_that_are_the_same_have_no_psnr() -> None:
    trial = SimpleNamespace(plan=SimpleNamespace(speedup_of=lambda *_: 1.5), _cut=0, num_steps=2)
    points = [_Trial._point(trial, 0, [0], psnrs, [1.0] * 4) for psnrs in ([120.0] * 4, [30.0, 120.0, 120.0, 50.0])]
    assert [point.psnr for point in points] == [None, 85.0]


def test_what_is_in_it(calibration: lc.Calibration) -> None:
    unet = load().unet
    assert (calibration.model, calibration.num_steps) == (type(unet).__name__, NUM_STEPS)
    assert {point.order for point in calibration.points} == {0, 1}
    uniform = {(0, 2, 4), (0, 3), (0, 4)}
    assert uniform <= {tuple(point.full_steps) for point in calibration.points}
    assert all(point.full_steps[0] == 0 for point in calibration.points)
    frontier = calibration.frontier()
    assert [p.speedup for p in frontier] == sorted(p.speedup for p in frontier)
    assert [p.value_of("psnr") for p in frontier] == sorted((p.value_of("psnr") for p in frontier), reverse=True)
    assert lc.Calibration(**calibration.model_dump()) == calibration


def test_the_best_by_quality_and_by_speed(calibration: lc.Calibration) -> None:
    middle = sorted(calibration.points, key=lambda p: p.value_of("psnr"))[len(calibration.points) // 2]
    good = calibration.best(quality=f"psnr>={middle.value_of('psnr') - 1e-6:.9f}")
    assert good.value_of("psnr") >= middle.value_of("psnr") - 1e-6
    assert good.speedup >= middle.speedup
    fast = calibration.best(speedup=middle.speedup)
    assert fast.speedup >= middle.speedup
    assert fast.value_of("psnr") >= middle.value_of("psnr")
    assert calibration.best(quality="ssim>=0.1").speedup == max(point.speedup for point in calibration.points)


def test_a_policy_reads_the_file(calibration: lc.Calibration, tmp_path: Path) -> None:
    path = tmp_path / "svd.yaml"
    calibration.save(path)
    assert lc.Calibration.load(path) == calibration
    pipe = load()
    asked = lc.Policy(speedup=1.3, calibration=path)
    assert lc.Policy.from_yaml(asked.to_yaml()) == asked
    fast = lc.transform_pipeline(pipe, asked)
    frames = clip(0)(fast)
    direct = lc.transform_pipeline(pipe, calibration.policy(speedup=1.3))
    assert np.array_equal(frames, clip(0)(direct))
    with pytest.raises(ScheduleError, match="num_steps=5, but the run has 4 steps"):
        clip(0, steps=4)(fast)
    assert np.array_equal(frames, clip(0)(fast))


def test_files_of_other_models_are_refused(calibration: lc.Calibration, tmp_path: Path) -> None:
    other = calibration.model_copy(update={"model": "OtherModel"})
    other.save(tmp_path / "other.yaml")
    policy = lc.Policy(quality="psnr>=20", calibration=tmp_path / "other.yaml")
    unet = load().unet
    with pytest.raises(CalibrationError, match=r"'other\.yaml': it is of a OtherModel, not of a UNet2DCondition"):
        lc.transform(unet, policy)
    calibration.model_copy(update={"weights": "0" * 16}).save(tmp_path / "other.yaml")
    with pytest.raises(CalibrationError, match=f"other names or shapes .*, here {weights_of(unet)}"):
        lc.transform(unet, policy)


BROKEN = {
    "no file": (None, "cannot read"),
    "no YAML": ("{", "cannot read"),
    "a list": ("[1]", "no calibration of version 1"),
    "another version": ("version: 7", "version 1, but 7"),
    "no points": ("version: 1\nmodel: A\nweights: b\nnum_steps: 3\nnum_inputs: 1\npoints: []", "points"),
}


@pytest.mark.parametrize(("text", "match"), BROKEN.values(), ids=BROKEN)
def test_broken_files(text: str | None, match: str, tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CalibrationError, match=match):
        lc.Calibration.load(path)


def test_a_file_that_was_edited(calibration: lc.Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    calibration.save(path)
    data = yaml.safe_load(path.read_text())
    data["points"][0]["order"] = "two"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(CalibrationError, match="order"):
        lc.Calibration.load(path)


@pytest.mark.parametrize("text", ["psnr>30", "psnr >= ", "lpips>=0.1", "30", "psnr>=-1", "psnr"])
def test_qualities_that_cannot_be_read(text: str) -> None:
    with pytest.raises(CalibrationError, match="expected 'psnr>=30'"):
        read_quality(text)


def test_what_is_out_of_reach(calibration: lc.Calibration) -> None:
    with pytest.raises(CalibrationError, match=r"no way that was tried has psnr of 500; the best has"):
        calibration.best(quality="psnr>=500")
    with pytest.raises(CalibrationError, match=r"gains 50x; the most is"):
        calibration.best(speedup=50)
    with pytest.raises(CalibrationError, match="expected one of"):
        calibration.best()


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"quality": "psnr>=30"}, "quality needs a calibration"),
        ({"speedup": 2.0}, "speedup needs a calibration"),
        ({"calibration": "a.yaml"}, "say what of it"),
        ({"quality": "psnr>=30", "speedup": 2.0, "calibration": "a.yaml"}, "two things"),
        ({"speedup": 2.0, "calibration": "a.yaml", "cache": lc.Cache(cut=0, interval=2)}, "leave cache out"),
        ({"speedup": 0.5, "calibration": "a.yaml"}, "speedup"),
        ({"quality": "psnr>30", "calibration": "a.yaml"}, "expected 'psnr>=30'"),
    ],
)
def test_policies_that_ask_for_too_little_or_too_much(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(PolicyError, match=match):
        lc.Policy(**asked)


def test_what_cannot_be_calibrated() -> None:
    pipe = load()
    for inputs, what in (([], "nothing"), ("a red car", "str"), ({"prompt": "a"}, "dict"), (clip(0), "function")):
        with pytest.raises(CalibrationError, match=f"inputs: expected a list of prompts, .*, got {what}"):
            lc.calibrate(pipe, inputs)
    for about_memory in ({"swap": lc.Swap()}, {"memory_budget": "1GiB"}):
        with pytest.raises(CalibrationError, match="policy: swapping and memory budgets change no result"):
            lc.calibrate(pipe, [clip(0)], policy=lc.Policy(**about_memory))
    for orders in ((), (0, 4), (-1,)):
        with pytest.raises(CalibrationError, match="orders: expected some of 0 to 3"):
            lc.calibrate(pipe, [clip(0)], orders=orders)
    with pytest.raises(CalibrationError, match="transformed already"):
        lc.calibrate(lc.transform_pipeline(pipe, lc.Policy()), [clip(0)])
    with pytest.raises(CalibrationError, match="must be at least 1"):
        lc.calibrate(pipe, [clip(0)], points=0)
    with pytest.raises(CalibrationError, match="expected results with frames"):
        lc.calibrate(pipe, [lambda pipe: clip(0, 2)(pipe)[0, :, :, 0]], cuts=[0])
    with pytest.raises(CalibrationError, match=r"runs have \[2, 3\] steps"):
        lc.calibrate(pipe, [clip(0, 2), clip(0, 3)], cuts=[0])


def test_prompts_and_arguments() -> None:
    """A prompt is generated with a seed by its place; a generator begins each time where it stood."""
    pipe = load()
    size = {"height": 32, "width": 32, "num_inference_steps": 3}
    with_seed = {"prompt": "box", **size, "generator": torch.Generator().manual_seed(5)}
    found = lc.calibrate(pipe, [{"prompt": "box", **size}, with_seed], cuts=[0], orders=[0], points=1, probes=1)
    direct = lc.calibrate(
        pipe,
        [
            lambda pipe, seed=seed: pipe("box", **size, output_type="np", generator=torch.Generator().manual_seed(seed))
            for seed in (0, 5)
        ],
        cuts=[0], orders=[0], points=1, probes=1,
    )  # fmt: skip
    assert found == direct
    assert found.num_inputs == 2


def test_a_cut_that_does_not_exist() -> None:
    with pytest.raises(CutError, match="branch 0 to"):
        lc.calibrate(load(), [clip(0)], cuts=[99])


def test_an_exception_of_an_input_is_the_users_own() -> None:
    pipe = load()
    state = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}

    def broken(pipe: Any) -> Any:
        clip(1)(pipe)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lc.calibrate(pipe, [clip(0), broken], cuts=[0])
    assert all(torch.equal(weight, state[name]) for name, weight in pipe.unet.state_dict().items())
    assert not isinstance(pipe, TransformedPipeline)


def test_not_behind_torch_compile(calibration: lc.Calibration, tmp_path: Path) -> None:
    """There is no model to compare the calibration with; what it gives can be compiled."""
    calibration.save(tmp_path / "c.yaml")
    model = Denoiser()
    asked = lc.Policy(speedup=1.3, calibration=tmp_path / "c.yaml", compile="eager")
    compiled = torch.compile(model, backend="lightcache", options={"policy": asked})
    with torch.no_grad(), pytest.raises(PolicyError, match=r"calibration: it is of a model, and behind torch\.compile"):
        compiled(latent(0), torch.tensor(900), prompt(0))


def test_weights_are_known_by_names_and_shapes() -> None:
    assert weights_of(Denoiser(0)) == weights_of(Denoiser(1)) == weights_of(Denoiser(0).half())
    other = Denoiser()
    other.outer = torch.nn.Linear(16, 5)
    assert weights_of(other) != weights_of(Denoiser())

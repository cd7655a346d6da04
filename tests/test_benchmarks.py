"""The benchmarks' scripts on tiny models: that they run, what they report, and their ratios. Never times."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from rich.console import Console

import lightcache_fx as lc
from benchmarks import denoise, plans
from benchmarks.common import Goal, Spread, environment, fake_models, in_turns, pairwise_ratio, tensor_bytes, write_json

TINY = denoise.Setting(
    channels=(32, 32),
    heads=(1, 1),
    layers=1,
    context=8,
    frames=2,
    size=8,
    steps=5,
    interval=2,
    cycles=2,
    rounds=2,
)
QUIET = Console(quiet=True)


def test_ratios_are_taken_pair_by_pair():
    ratio = pairwise_ratio([2.0, 40.0, 9.0], [1.0, 10.0, 3.0])
    assert ratio.values == (2.0, 4.0, 3.0)
    assert ratio.as_dict() == {"median": 3.0, "min": 2.0, "max": 4.0, "count": 3}
    with pytest.raises(ValueError, match="shorter"):
        pairwise_ratio([1.0, 2.0], [1.0])


def test_turns_alternate_their_order():
    assert list(in_turns(("a", "b"), 2)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


@pytest.mark.parametrize(
    ("value", "sense", "met"),
    [
        (1.0, "at most", True),
        (1.01, "at most", False),
        (1.0, "at least", True),
        (1.0, "above", False),
        (2.0, "above", True),
        (math.nan, "at most", False),
        (math.nan, "at least", False),
        (math.nan, "above", False),
    ],
)
def test_goals(value, sense, met):
    goal = Goal("figure", value, sense, 1.0)
    assert goal.met is met
    assert goal.as_dict()["met"] is met
    assert goal.format() == f"{sense} 1: {'met' if met else 'not met'}"


def test_storages_are_counted_once():
    base = torch.zeros(10)
    assert tensor_bytes({"a": [base, base[2:]], "b": (torch.zeros(5), None, 3)}) == (2, 60)


def test_results_name_no_host_and_no_path(tmp_path):
    import platform

    write_json(tmp_path / "deep" / "result.json", {"environment": environment()})
    text = (tmp_path / "deep" / "result.json").read_text()
    assert json.loads(text)["environment"]["threads"] == torch.get_num_threads()
    assert str(Path.cwd()) not in text
    assert platform.node() not in text.split('"')


def test_goals_come_from_medians_of_pairs():
    steps = denoise.StepTimes(
        eager=[1.0, 2.0, 4.0], full=[1.1, 2.0, 4.0], reuse=[[0.1, 0.1, 9.0], [0.2] * 3, [0.4] * 3], bitwise=True
    )
    loops = denoise.LoopTimes([8.0, 16.0], [2.0, 4.0], [4.0, 8.0], 1, 2, 3, 0.0)
    goals = denoise.goals_of(steps, loops, flop_ratio=0.08, bound=5.0)
    assert {key: goal.value for key, goal in goals.items()} == pytest.approx(
        {
            "full_over_eager": 1.0,
            "reuse_over_flop_ratio": 0.1 / 0.08,
            "share_of_flop_bound": 4.0 / 5.0,
            "deepcache_over_lightcache_fx": 2.0,
        }
    )
    assert [goal.met for goal in goals.values()] == [True, True, False, True]


def test_denoise_reports_every_figure():
    result = json.loads(json.dumps(denoise.run(TINY, QUIET)))
    steps, loops, flops, kept = (result[key] for key in ("steps", "loops", "flops", "kept"))
    assert steps["bitwise_as_eager"]
    assert loops["difference_from_deepcache"] == 0.0
    assert steps["full_over_eager"]["count"] == TINY.cycles
    assert steps["reuse_seconds"]["count"] == TINY.cycles * (TINY.interval - 1)
    assert loops["speedup"]["count"] == TINY.rounds
    # 5 steps at interval 2: steps 0, 2 and 4 are full.
    assert loops["flop_bound_speedup"] == pytest.approx(5 / (3 + 2 * flops["ratio"]))
    assert 0 < flops["ratio"] < 1
    # One tensor: 2 x frames x 32 channels x 8 x 8, float32.
    assert kept["lightcache_fx_bytes"] == 2 * TINY.frames * 32 * 8 * 8 * 4
    assert kept["deepcache_tensors"] > 1
    assert kept["deepcache_bytes"] > kept["lightcache_fx_bytes"]
    assert set(result["goals"]) == {
        "full_over_eager",
        "reuse_over_flop_ratio",
        "share_of_flop_bound",
        "deepcache_over_lightcache_fx",
    }
    assert len(result["overhead_microseconds"]) >= 4

    console = Console(width=200, file=io.StringIO())
    denoise.print_result(result, console)
    text = console.file.getvalue()
    assert "share of the FLOP bound" in text
    assert "at most 1.02" in text


def test_the_quick_setting_is_the_same_unet():
    quick = denoise.Setting().quick()
    assert replace(quick, frames=8, size=32, cycles=8, rounds=3) == denoise.Setting()


def _tiny_unet():
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    return unet, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "return_dict": False,
    }


def test_plans_of_a_tiny_model():
    model = plans.Model("tiny", _tiny_unet, 0, 2, 5, measured=(1.0, (0.1, 0.1), 1.0))
    result = json.loads(json.dumps(plans.make_plans(model, QUIET)))
    published, auto = result["plans"]["published"], result["plans"]["auto"]
    assert published["kept_bytes"] == 2 * 8 * 8 * 8 * 2  # B C H W, float16
    assert auto["reuse"]["flops"] <= published["reuse"]["flops"]
    assert auto["candidates"][0]["cut"] == auto["cut"]["label"]
    assert published["flop_bound_speedup"] == pytest.approx(5 / (3 + 2 * published["reuse_over_full"]))
    assert not result["compared"]["full_tflop"]["agrees"]

    text = plans.as_markdown({"tiny": result})
    assert "| tiny | full_tflop |" in text
    assert "**differs**" in text
    assert len(plans.rows_of({"tiny": result})) == 2


def test_a_refused_plan_is_a_row_and_not_a_crash():
    result = plans.make_plans(plans.Model("tiny", _tiny_unet, "nowhere", 2, 5), QUIET, auto=False)
    assert "CutError" in result["plans"]["published"]["error"]
    assert "CutError" in plans.as_markdown({"tiny": result})


def test_comparison_counts_hoisted_work_and_allows_rounding():
    plan = {
        "full": {"flops": 158e12},
        "hoisted": {"flops": 2e12},
        "reuse_over_full": 0.0853,
        "kept_bytes": 294_912_000,
    }
    compared = plans.compare(plan, (160, (0.085, 0.085), 281))
    assert all(fact["agrees"] for fact in compared.values())
    assert not plans.compare(plan | {"reuse_over_full": 0.063}, (160, (0.085, 0.085), 281))["reuse_over_full"]["agrees"]


def test_fake_models_hold_no_memory_and_restore_the_dtype():
    with fake_models(torch.float16):
        layer = torch.nn.Linear(1_000_000, 1_000_000)
    assert layer.weight.dtype is torch.float16
    assert torch.get_default_dtype() is torch.float32


def test_spread_of_one_is_one_number():
    assert Spread.of([1.5]).format() == "1.500"
    assert Spread.of([1.0, 2.0]).format("{:.1f}") == "1.5 (1.0 to 2.0)"


def test_published_models_are_the_designs():
    assert set(plans.MODELS) == {"svd-xt", "animatediff", "modelscope", "easyanimate"}
    assert isinstance(plans.MODELS["easyanimate"].cut, lc.Residual)

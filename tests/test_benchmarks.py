"""The benchmarks' scripts on tiny models: that they run, what they report, and their ratios. Never times."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from rich.console import Console

import lightcache_fx as lc
from benchmarks import command_line, denoise, full_size, graphs, memory, plans, swap, swap_gpu, swap_plans, systems
from benchmarks import compile as compile_benchmark
from benchmarks.common import (
    Goal,
    Spread,
    device_peak,
    environment,
    fake_models,
    in_turns,
    pairwise_ratio,
    seconds_of,
    tensor_bytes,
    write_json,
)
from lightcache_fx.policy import Compile
from swap_cases import workload

TINY = denoise.Setting(
    channels=(32, 32),
    heads=(1, 1),
    layers=1,
    context=8,
    frames=2,
    size=(8, 8),
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
    assert "peak on the device" not in text  # a CPU has no such figure

    measured = result | {
        "environment": result["environment"] | {"gpu": "Some GPU"},
        "device_peak": {"deepcache_bytes": Spread.of([2**20, 3 * 2**20]).as_dict()},
    }
    page = denoise.as_markdown(measured)
    assert page.startswith("# Denoising on Some GPU\n")
    assert "| peak on the device: deepcache | 2.0 MiB | 1.0 MiB to 3.0 MiB |" in page
    assert "at most 1.02: " in page
    assert "[red]" not in page
    assert "[/]" not in page


def test_the_quick_setting_is_the_same_unet():
    quick = denoise.Setting().quick()
    assert replace(quick, frames=8, size=(32, 32), cycles=8, rounds=3) == denoise.Setting()


@pytest.fixture
def gpus(monkeypatch):
    """Let torch see a number of GPUs, whatever there is."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("tpu", 1, "expected cpu, cuda or cuda:N, got 'tpu'"),
        ("cuda:", 1, "expected cpu, cuda or cuda:N, got 'cuda:'"),
        ("cuda:-1", 1, "expected cpu, cuda or cuda:N, got 'cuda:-1'"),
        ("cuda", 0, "sees no GPU, got 'cuda'"),
        ("cuda:2", 2, "expected cpu, or cuda:0 to cuda:1, got 'cuda:2'"),
    ],
)
def test_an_absent_device_is_refused_before_any_work(name, count, message, gpus, monkeypatch, capsys):
    gpus(count)
    monkeypatch.setattr(denoise, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stopped:
        denoise.main(["--device", name])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "argument --device: " in error
    assert message in error


@pytest.mark.parametrize(("name", "count"), [("cpu", 0), ("cuda", 1), ("cuda:0", 1), ("cuda:1", 2)])
def test_a_device_that_is_there_is_taken(name, count, gpus):
    gpus(count)
    setting = denoise.read_options(["--device", name, "--dtype", "float16"]).setting
    assert setting.place() == (torch.device(name), torch.float16)


def test_the_default_is_the_cpu_in_float32():
    default = denoise.read_options([]).setting
    assert default == denoise.Setting()
    assert default == denoise.read_options(["--device", "cpu", "--dtype", "float32"]).setting
    assert default.place() == (torch.device("cpu"), torch.float32)
    assert denoise.read_options(["--quick", "--rounds", "5"]).setting == replace(default, rounds=5).quick()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full-size"], "argument --full-size: expected --device cuda or cuda:N with it, got cpu"),
        (["--full-size", "--quick"], "not allowed with argument"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--steps", "1"], "--interval and --steps are at least 2"),
    ],
)
def test_other_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        denoise.read_options(arguments)
    assert message in capsys.readouterr().err


def test_the_full_size_is_the_one_that_is_planned(monkeypatch):
    made = []

    def record(**config):
        made.append(config)
        return torch.nn.Identity()

    monkeypatch.setattr(denoise, "UNetSpatioTemporalConditionModel", record)
    monkeypatch.setattr(plans.diffusers, "UNetSpatioTemporalConditionModel", record)
    setting = replace(denoise.Setting().full_size(), device="meta")
    denoise.build_unet(setting)
    inputs = plans.svd_xt()[1]
    for key in ("block_out_channels", "num_attention_heads", "layers_per_block", "cross_attention_dim", "num_frames"):
        assert made[0][key] == made[1][key], key
    video = denoise.Video(setting)
    assert video.sample().shape == inputs["sample"].shape
    assert video.context.shape == inputs["encoder_hidden_states"].shape
    assert video.time_ids.shape == inputs["added_time_ids"].shape


def test_make_bench_gpu_asks_for_what_there_is(gpus):
    gpus(1)
    recipe = (Path(__file__).parent.parent / "Makefile").read_text().partition("\nbench-gpu:")[2].partition("\n\n")[0]
    arguments = re.search(r"benchmarks\.denoise (.*) \$\(ARGS\)", recipe)[1].split()
    expected = replace(denoise.Setting(), device="cuda", dtype="float16").full_size()
    assert denoise.read_options(arguments).setting == expected
    assert "plans.json" not in recipe
    assert "benchmarks.swap_gpu\n" in recipe
    assert swap_gpu.read_options(["--rounds", "1"]).place == swap_gpu.Place("cuda", "float16", small=False)


def test_model_and_inputs_are_on_the_device_in_the_dtype(monkeypatch):
    setting = replace(TINY, device="meta", dtype="bfloat16")
    place = {(torch.device("meta"), torch.bfloat16)}
    unet, video = denoise.build_unet(setting), denoise.Video(setting)
    assert {(weight.device, weight.dtype) for weight in unet.parameters()} == place
    inputs = (video.noise, video.image, video.context, video.time_ids, video.sample())
    assert {(tensor.device, tensor.dtype) for tensor in inputs} == place
    assert video.timestep(3.0).device == torch.device("meta")
    output = video.predict(unet, video.noise, video.timestep())
    assert {(output.device, output.dtype)} == place

    asked = []
    monkeypatch.setattr(
        denoise.EulerDiscreteScheduler, "set_timesteps", lambda _, steps, device: asked.append((steps, device))
    )
    video.scheduler()
    assert asked == [(TINY.steps, torch.device("meta"))]


def test_every_dtype_gets_the_same_noise():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(1, TINY.frames, 4, 8, 8, generator=draw)
    assert torch.equal(denoise.Video(TINY).noise, noise)
    assert torch.equal(denoise.Video(replace(TINY, dtype="float16")).noise, noise.half())


def test_timing_waits_for_the_device_before_and_after(monkeypatch):
    events = []
    monkeypatch.setattr(torch.accelerator, "synchronize", events.append)
    seconds_of(lambda: events.append("call"), torch.device("cuda:1"))
    assert events == [torch.device("cuda:1"), "call", torch.device("cuda:1")]
    seconds_of(lambda: events.append("call"))
    assert events[3:] == ["call"]


def _fake_memory(monkeypatch, events):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset peak"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + len(events))


def test_a_peak_is_of_what_ran_inside(monkeypatch):
    events, peaks = [], []
    _fake_memory(monkeypatch, events)
    with device_peak(torch.device("cuda"), peaks):
        events.append("work")
    assert (events, peaks) == (["reset peak", "work"], [1002])
    with device_peak(torch.device("cpu"), peaks):
        pass
    assert (events, peaks) == (["reset peak", "work"], [1002])


def test_loops_on_a_device_are_measured_apart(monkeypatch):
    """Everything that a GPU adds, with the plain U-Net in the place of ours and the device's functions faked."""
    events = []
    _fake_memory(monkeypatch, events)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(denoise.lc, "reset", lambda module: events.append("reset run"))
    monkeypatch.setattr(denoise.lc, "inspect", lambda module: SimpleNamespace(kept_bytes=7, hoisted_bytes=5))
    unet, video, on_cpu = denoise.build_unet(TINY), denoise.Video(TINY), denoise.Video(TINY)
    video.device, video.scheduler = torch.device("cuda"), on_cpu.scheduler
    with torch.no_grad():
        times = denoise.time_loops(unet, unet, video, TINY)
    assert events == ["reset run", "reset peak"] * 3 * TINY.rounds
    peaks = times.device_peaks()
    assert {name: len(spread.values) for name, spread in peaks.items()} == {
        "plain_bytes": TINY.rounds,
        "lightcache_fx_bytes": TINY.rounds,
        "deepcache_bytes": TINY.rounds,
    }
    assert peaks["plain_bytes"].values == (1002, 1012)  # first of the first round, last of the second
    assert (times.kept_bytes, times.hoisted_bytes) == (7, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_denoise_on_a_gpu(dtype):
    result = denoise.run(replace(TINY, device="cuda", dtype=dtype), QUIET)
    assert result["environment"]["gpu"]
    weights = result["setting"]["parameters"] * (4 if dtype == "float32" else 2)
    assert set(result["device_peak"]) == {"plain_bytes", "lightcache_fx_bytes", "deepcache_bytes"}
    for peak in result["device_peak"].values():
        assert peak["count"] == TINY.rounds
        assert peak["min"] > weights
    assert result["kept"]["hoisted_bytes"] > 0
    assert "peak on the device: lightcache_fx" in denoise.as_markdown(result)


def test_a_copy_shares_the_weights_and_nothing_else():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    copied = denoise.sharing_copy(layer)
    assert copied[0] is not layer[0]
    for name, weight in (*layer.named_parameters(), *layer.named_buffers()):
        assert dict((*copied.named_parameters(), *copied.named_buffers()))[name] is weight
    copied[0].forward = None
    assert layer[0].forward is not None


def test_devices_write_files_of_their_own(monkeypatch, tmp_path, gpus):
    gpus(1)
    monkeypatch.setattr(denoise, "RESULTS", tmp_path)
    monkeypatch.setattr(denoise, "print_result", lambda *_: None)
    monkeypatch.setattr(denoise, "as_markdown", lambda result: "a table")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(
        denoise,
        "run",
        lambda setting, _: {"setting": {"device": setting.device}, "loops": {"difference_from_deepcache": 0.0}},
    )

    def written(*arguments):
        before = set(tmp_path.iterdir())
        denoise.main(arguments)
        return {path.name for path in set(tmp_path.iterdir()) - before}

    assert written("--quick") == set()
    assert written() == {"denoise.json"}
    assert written("--dtype", "bfloat16") == {"denoise-cpu-bfloat16.json"}
    assert written("--device", "cuda:0", "--dtype", "float16") == {"denoise-cuda.json", "denoise-cuda.md"}
    assert json.loads((tmp_path / "denoise.json").read_text())["setting"]["device"] == "cpu"
    assert written("--device", "cuda", "--out", str(tmp_path / "own.json")) == {"own.json", "own.md"}


def test_the_environment_names_the_gpu(monkeypatch):
    assert "gpu" not in environment()
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: asked.append(device) or "Some GPU")
    assert environment(torch.device("cuda:1"))["gpu"] == "Some GPU"
    assert asked == [torch.device("cuda:1")]
    assert environment(torch.device("cuda:1")).keys() - environment().keys() == {"gpu", "cuda", "cudnn"}


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


def _small_decoder(place):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    return memory._decoder(vae, (4, 4, 16, 16), place)


def test_memory_gives_the_difference_and_both_errors(monkeypatch, tmp_path):
    monkeypatch.setitem(memory.MODELS, "sd-vae", _small_decoder)
    result = memory.measure("sd-vae", 1, memory.Place(), 0.6)
    errors = result["error"]
    assert 0 < errors["whole"] < 1e-5
    assert 0 < errors["chunked"] < 1e-5
    assert result["difference"] <= 2 * (errors["whole"] + errors["chunked"])  # the triangle's inequality, with room
    assert result["equal"] == (result["difference"] <= memory.TOLERANCE)
    row = memory.row_of("sd-vae", result)
    assert len(row) == len(memory.COLUMNS)
    assert row[-2:] == [f"{errors['whole']:.2e}", f"{errors['chunked']:.2e}"]
    assert memory.row_of("sd-vae", result | {"difference": 1.07e-5, "equal": False})[-3] == "1.07e-05, above 1e-05"
    assert memory.row_of("sd-vae", result | {"error": {"whole": None, "chunked": None}})[-2:] == ["", ""]


def test_errors_are_those_of_the_eager_model_in_float64(monkeypatch):
    monkeypatch.setitem(memory.MODELS, "sd-vae", _small_decoder)
    model, call = _small_decoder(memory.Place())
    with torch.no_grad():
        exact, eager = memory.exact_result("sd-vae", model, memory.Place()), call(model)
    assert exact.dtype is torch.float64
    assert 0 < memory.distance(eager, exact) < 1e-5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, "it is a copy"
    for place in (memory.Place(dtype="bfloat16"), memory.Place(dtype="float64"), memory.Place(device="cuda")):
        assert memory.exact_result("sd-vae", model, place) is None


def test_memory_at_full_size_is_refused_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        memory.main(["--full-size"])
    assert "argument --full-size: expected --device cuda or cuda:N with it, got cpu" in capsys.readouterr().err


def test_swapping_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    sizes = {"--blocks": "2", "--width": "128", "--steps": "2", "--rounds": "1", "--share": "60%"}
    swap.main([text for pair in (*sizes.items(), ("--out", str(tmp_path / "swap.json"))) for text in pair])
    result = json.loads((tmp_path / "swap.json").read_text())
    assert result["equal"]
    assert result["within_budget"]
    assert result["on_device"] <= result["budget"] < result["weights"] + 2**20
    assert result["files_left"] == []
    assert result["copied_bytes"] > 0
    assert set(result["seconds"]) == set(swap.WAYS)
    assert "| same bits as resident | True |" in (tmp_path / "swap.md").read_text()


def test_without_reuse_awareness_each_step_reads_every_weight():
    full = """
        a 1 0 w1 -
        b 1 0 w2 s1"""
    reuse = """
        c 1 0 s1 -
        d 1 0 w1 -"""
    both = workload(full, reuse, sizes={"w1": 4, "w2": 4, "s1": 1})
    plain = swap_plans.without_reuse_awareness(both)
    for step in plain.steps:
        assert {name for op in step.ops for name in op.reads} >= {"w1", "w2"}
    assert plain.steps[0] == both.steps[0]
    assert [op.name for op in plain.steps[1].ops] == ["c", "skipped w2", "d"]
    assert sum(op.seconds for op in plain.ops) == sum(op.seconds for op in both.ops)
    assert (plain.movables, plain.cyclic) == (both.movables, both.cyclic)


def test_swap_plans_are_rows_whether_they_fit_or_not():
    fitting = {
        "title": "a model", "budget": 2**30, "goal": 0.05, "fits": True, "met": True, "slowdown": 0.012,
        "weights": {"denoise": 3 * 2**30}, "peak_bytes": 2**30, "seconds": 7.4,
        "compared": {"planned": 0.0, "no wrap-around": 0.01, "no reuse awareness": 0.1, "neither": 0.2},
    }  # fmt: skip
    row, other = swap_plans.rows_of(
        {"a": fitting, "b": fitting | {"fits": False, "met": False, "slowdown": None, "goal": None}}
    )
    expected = ["1.00 GiB", "3.00 GiB", "1.00 GiB", "1.20%", "5%", "met", "0.00%", "1.00%", "10.00%", "20.00%", "7 s"]
    assert row == ["a model", *expected]
    assert other[4:11] == ["does not fit", "", "", "", "", "", ""]
    assert len(row) == len(other) == len(swap_plans.COLUMNS)


@pytest.fixture(scope="module")
def swapped_pipelines(tmp_path_factory):
    """The whole script on one small pipeline: swapped and resident, and offloading that a CPU refuses."""
    case = swap_gpu.SMALL["animatediff"]
    alone = {**case.arguments, "num_frames": 2, "num_inference_steps": 2}  # one group of frames
    out = tmp_path_factory.mktemp("results") / "swap_gpu.json"
    ways = ["--way", "swapped", "--way", "group-offload"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(swap_gpu.SMALL, "animatediff", replace(case, arguments=alone))
        swap_gpu.main(
            ["--device", "cpu", "--small", "--only", "animatediff", *ways, "--rounds", "1", "--out", str(out)]
        )
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_a_swapped_pipeline_beside_a_resident_one(swapped_pipelines):
    result, page = swapped_pipelines
    ways = result["pipelines"]["animatediff"]["ways"]
    swapped, resident = ways["swapped, 1MiB"], ways["resident"]
    assert list(ways) == ["plain", "resident", "swapped, 1MiB", "group-offload"]
    assert swapped["equal"]
    assert swapped["repeats"]
    assert swapped["captures"] == 0
    assert swapped["between_black_and_white"] > 0
    assert swapped["peak_bytes"] < resident["peak_bytes"]
    assert swapped["goals"]["peak"]["goal"] == "at most 1.049e+06"
    assert swapped["predicted"]["peak_bytes"] <= swapped["budget"] == 2**20
    assert set(swapped["predicted_seconds"]) == {"vae.decode", "text_encoder.forward", "unet.forward"}
    assert (resident["seconds"]["count"], swapped["over_baseline"]["count"]) == (2, 1)
    assert page.count("\n| ") == len(ways)


def test_a_way_that_fails_is_reported_and_the_others_go_on(swapped_pipelines):
    result, page = swapped_pipelines
    failed = result["pipelines"]["animatediff"]["ways"]["group-offload"]
    assert failed["error"].startswith("ValueError: Using streams for data transfer requires")
    assert "| group-offload | failed |" in page
    assert "* a small AnimateDiff, 3 x 16 x 16, 4 steps, interval 2: group-offload: ValueError: Using" in page


@pytest.mark.parametrize(
    ("predicted", "overhead", "peak", "met"),
    [
        (0.03, 0.05, 100, {"peak": True, "overhead": True}),
        (0.01, 0.06, 101, {"peak": False, "overhead": False}),
        (0.04, 0.50, 100, {"peak": True}),
        (math.nan, 0.50, 100, {"peak": True}),
        (0.00, None, 100, {"peak": True}),
    ],
)
def test_swapping_is_judged_where_the_plan_says_that_it_is_free(predicted, overhead, peak, met):
    assert {goal.name: goal.met for goal in swap_gpu.goals_of(predicted, overhead, peak, 100)} == met


def test_ways_come_behind_their_baselines():
    case = swap_gpu.PIPELINES["svd-xt"]
    every = [way.name for way in swap_gpu.ways_of(case, list(swap_gpu.KINDS), ())]
    assert every[:5] == ["plain", "resident", "swapped, 8GiB", "swapped, 6GiB", "swapped, 4GiB"]
    assert len(every) == 9
    assert [way.name for way in swap_gpu.ways_of(case, ["swapped"], ["5GiB"])] == ["resident", "swapped, 5GiB"]
    assert [way.name for way in swap_gpu.ways_of(case, ["model-offload"], ())] == ["plain", "model-offload"]


def test_messages_are_one_line_without_folders():
    error = OSError("\nno room in /some/folder/file.bin; and/or more\nelsewhere")
    assert swap_gpu.explained(error) == "OSError: no room in file.bin; and/or more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "argument --device: expected --small with cpu"),
        (["--device", "cpu", "--small", "--budget", "much"], "argument --budget: "),
        (["--device", "cpu", "--small", "--rounds", "0"], "argument --rounds: expected at least 1"),
    ],
)
def test_what_swap_gpu_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        swap_gpu.main(arguments)
    assert message in capsys.readouterr().err


# Compiling --------------------------------------------------------------------------------------------------------


def test_compiling_is_held_against_the_flop_bound(monkeypatch, tmp_path):
    """All of it but the compiler: programs and the model are run as they are, behind the compilers' interfaces."""
    monkeypatch.setattr(compile_benchmark.lc, "Compile", lambda **_: Compile(backend="eager"))
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **_: original(module, backend="eager"))
    small = replace(denoise.Setting(), channels=(32, 64), heads=(1, 2), layers=1, context=8, frames=2, size=(8, 8))
    monkeypatch.setattr(compile_benchmark, "Setting", lambda **given: replace(small, steps=4, interval=2, **given))
    out = tmp_path / "compile.json"
    compile_benchmark.main(["--parts", "loops", "--rounds", "1", "--out", str(out)])
    loops = json.loads(out.read_text())["loops"]
    assert set(loops["seconds"]) == set(loops["over_eager"]) >= {"eager", "compiled", "cached and compiled"}
    assert loops["largest_difference"] == {
        "compiled": 0, "cached and compiled": 0, "chunked and compiled": pytest.approx(0, abs=1e-5),
        "cached, chunked and compiled": pytest.approx(0, abs=1e-5),
    }  # fmt: skip
    assert 1 < loops["flop_bound"] < 2
    gained = loops["compiled_over_cached_and_compiled"]["median"]
    assert loops["share_of_bound"]["value"] == pytest.approx(gained / loops["flop_bound"])
    assert loops["compile_state"]["cached and compiled"]["full"] == "eager: 1 of 1 part"
    assert loops["compile_state"]["cached"]["full"] == "eager"
    assert f"FLOPs allow {loops['flop_bound']:.2f}x" in out.with_suffix(".md").read_text()


def test_seconds_to_compile_are_those_of_a_first_call(monkeypatch):
    monkeypatch.setattr(
        compile_benchmark.lc, "Compile", lambda **given: lc.policy.Compile(backend="aot_eager", **given)
    )
    whole, blocks = (compile_benchmark.compile_seconds(way, 8) for way in ("ours, as one graph", "ours, in blocks"))
    assert (whole["parts"], blocks["parts"]) == (1, 1)  # the prologue is not compiled
    assert whole["first_call"] > whole["step"] > 0
    assert "parts" not in compile_benchmark.compile_seconds("eager", 2)


def test_sizes_take_one_capture_or_one_each(monkeypatch, tmp_path):
    monkeypatch.setattr(
        compile_benchmark, "in_a_process", lambda way, layers, _: compile_benchmark.size_seconds(way, layers)
    )
    monkeypatch.setattr(
        compile_benchmark, "SIZE_WAYS", {"each": lc.Policy(dynamic=False), "one for all": lc.Policy(compile="eager")}
    )
    out = tmp_path / "sizes.json"
    compile_benchmark.main(["--parts", "sizes", "--layers", "1", "--out", str(out)])
    ways = json.loads(out.read_text())["sizes"]["ways"]
    assert [ways[way]["captured by themselves"] for way in ("each", "one for all")] == [4, 1]
    assert all(ways["each"][str(batch)] > 0 for batch in (2, 3, 4, 5))
    assert "| one for all | " in out.with_suffix(".md").read_text()


def test_the_command_line_is_timed_as_a_process(monkeypatch, tmp_path):
    asked, original = [], command_line.measure
    with pytest.raises(RuntimeError, match=r"^lightcache-fx plan nothing: .*nothing"):
        command_line.measure(["plan", "nothing"])
    monkeypatch.setattr(command_line, "MOST_SECONDS", 1e-3)
    out = tmp_path / "command_line.json"
    monkeypatch.setattr(command_line, "measure", lambda given: (asked.append(given), original(["plan", "--help"]))[1])
    command_line.main(["--systems", "svd-xt", "--out", str(out)])
    assert asked == [["plan", "svd-xt"], ["plan", "svd-xt", "--memory-budget", "6GiB"]]
    facts = json.loads(out.read_text())["systems"]["svd-xt"]
    assert facts["denoiser"]["seconds"] > 0
    assert facts["denoiser"]["processor_seconds"] > 0
    assert not facts["goal"]["met"]
    assert "| not met |" in out.with_suffix(".md").read_text()


def test_graphs_are_counted_for_every_cache():
    ours = graphs.count("pixart", graphs.ours, 3)
    assert ours == {"graphs": 1, "breaks": 0, "compilations": 1}
    theirs = graphs.count("flux", graphs.first_block_cache, 3)
    assert theirs["graphs"] > 1
    assert theirs["breaks"] > 0
    assert theirs["compilations"] > theirs["breaks"]
    assert "no attribute 'enable_cache'" in graphs.count("pixart", graphs.taylor_seer, 1)["reason"]


# systems --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def systems_run(tmp_path_factory):
    """A quick table of one system, by some ways that it supports and some that it does not."""
    folder = tmp_path_factory.mktemp("systems")
    arguments = ["--quick", "--systems", "modelscope", "--repeats", "1", "--work", str(folder / "work")]
    arguments += ["--ways", "plain", "deepcache", "vae-slicing", "model-offload", "pab", "cached"]
    arguments += ["--out", str(folder / "systems.json")]
    threads = torch.get_num_threads()
    systems.main(arguments)
    torch.set_num_threads(threads)
    return folder, arguments


def test_systems_are_measured_by_every_way_that_supports_them(systems_run):
    folder, _ = systems_run
    result = json.loads((folder / "systems.json").read_text())
    cells = result["systems"]["modelscope"]["cells"]
    assert cells["pab"] == {"skipped": "it caches transformers; UNet3DConditionModel is none"}
    assert cells["model-offload"] == {"skipped": "it moves weights to an accelerator, and there is none"}
    for way in ("plain", "deepcache", "vae-slicing", "cached"):
        cell = cells[way]
        assert cell["seconds"]["median"] == pytest.approx(sum(s["median"] for s in cell["stage_seconds"].values()))
        assert list(cell["peak_bytes"]) == ["encode", "denoise", "decode"]
    assert cells["plain"]["quality"] == {"identical": True, "psnr": None, "ssim": 1.0}
    assert cells["plain"]["speedup"]["median"] == 1.0
    # Both caches keep the same value at the same steps, so they make the same video.
    assert cells["cached"]["quality"]["psnr"] == pytest.approx(cells["deepcache"]["quality"]["psnr"], abs=0.1)
    assert 10 < cells["cached"]["quality"]["psnr"] < 100 < cells["vae-slicing"]["quality"]["psnr"]
    assert cells["vae-slicing"]["peak_bytes"]["decode"] < cells["plain"]["peak_bytes"]["decode"]
    assert cells["cached"]["predicted_peak_bytes"]["denoise"] == pytest.approx(
        cells["cached"]["peak_bytes"]["denoise"], rel=0.05
    )
    page = (folder / "systems.md").read_text()
    assert "* pab: skipped: it caches transformers" in page
    assert "| deepcache |" in page
    assert str(folder) not in page + (folder / "systems.json").read_text()


def test_a_second_run_measures_nothing_that_is_known(systems_run, monkeypatch):
    folder, arguments = systems_run
    before = json.loads((folder / "systems.json").read_text())
    monkeypatch.setattr(systems.Session, "run", lambda _: pytest.fail("it measured"))
    systems.main(arguments)
    assert json.loads((folder / "systems.json").read_text()) == before
    with pytest.raises(pytest.fail.Exception, match="it measured"):
        systems.main([*arguments, "--steps", "3"])


def test_no_time_left_is_told_and_not_kept(systems_run, tmp_path):
    _, arguments = systems_run
    arguments = [*arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "r.json"), "--minutes", "0"]
    systems.main(arguments)
    cells = json.loads((tmp_path / "r.json").read_text())["systems"]["modelscope"]["cells"]
    assert set(cells) == {"plain", "deepcache", "vae-slicing", "model-offload", "pab", "cached"}
    assert all(cell == {"not_run": "the 0 minutes were over"} for cell in cells.values())
    assert not (tmp_path / "work").exists()


def _cell(speedup, peak, psnr=30.0):
    return {"seconds": {}, "speedup": {"median": speedup}, "peak_bytes": {"decode": peak, "denoise": 1},
            "quality": {"psnr": psnr}}  # fmt: skip


def test_what_systems_should_show():
    cells = {"plain": _cell(1.0, 100, None), "deepcache": _cell(2.0, 120), "fme": _cell(0.9, 40, None),
             "cached": _cell(2.2, 100), "lightcache": _cell(1.8, 30, 29.0), "pab": {"skipped": "no"}}  # fmt: skip
    goals = systems.goals_of(cells)
    assert {name: (round(goal.value, 3), goal.met) for name, goal in goals.items()} == {
        "peak of ours / lowest of the others'": (0.75, True),
        "speed of cached / of DeepCache, at equal or better PSNR": (1.1, True),
        "speed of lightcache / of plain": (1.8, True),  # worse PSNR than DeepCache's: not compared with it
    }
    worse = systems.goals_of(cells | {"lightcache": _cell(1.8, 50)})
    assert not worse["peak of ours / lowest of the others'"].met
    assert not worse["speed of lightcache / of DeepCache, at equal or better PSNR"].met


def test_full_size_systems_need_a_gpu(gpus, capsys):
    with pytest.raises(SystemExit):
        systems.read_options(["--full-size"])
    assert "expected --device cuda" in capsys.readouterr().err
    gpus(1)
    options = systems.read_options(["--device", "cuda", "--full-size"])
    assert (options.ways, options.minutes, options.blocks) == (list(systems.GPU_WAYS), 8.0, 8)
    assert options.out.name == "systems-cuda.json"
    full = systems.case_of("svd-xt", options)
    assert (full.scale.widths, str(full.video)) == (None, "25 x 576 x 1024, 25 steps")


@pytest.fixture
def small_svd(monkeypatch):
    """Stable Video Diffusion's preset with small models, called as the published one is."""
    unet = {
        "sample_size": 8, "block_out_channels": (32, 64), "num_attention_heads": (1, 2), "layers_per_block": 1,
        "cross_attention_dim": 16, "in_channels": 8, "projection_class_embeddings_input_dim": 24,
        "addition_time_embed_dim": 8, "num_frames": 4,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }  # fmt: skip
    vae = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "latent_channels": 4}
    preset = full_size.PRESETS["svd-xt"]
    configs = {"unet": unet, "vae": vae}
    components = tuple(replace(c, config=configs[c.name]) for c in preset.components if c.name in configs)
    defaults = replace(preset.defaults, height=32, width=32, frames=4, decode_frames=2)
    small = replace(preset, components=components, defaults=defaults)
    monkeypatch.setattr(full_size, "PRESETS", {"svd-xt": small})
    return small


def test_what_the_package_keeps_on_fake_tensors_is_what_it_keeps(small_svd):
    from DeepCache import DeepCacheSDHelper

    made = full_size.make(small_svd, full_size.Wish(dtype="float32"), whole=False)
    (stage,) = made.stages
    kept = full_size.deepcache_step(stage, 10**9, interval=3)
    unet = diffusers.UNetSpatioTemporalConditionModel(**small_svd.component("unet").config).eval()
    inputs = {name: torch.ones(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
              for name, v in stage.kwargs.items()}  # fmt: skip
    sample, timestep = inputs.pop("sample"), inputs.pop("timestep")
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=[timestep])))
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    with torch.no_grad():
        unet(sample, timestep, **inputs)
    assert (kept.num_tensors, kept.num_bytes) == tensor_bytes(helper.cached_output)
    assert 10**9 < kept.step_bytes <= 10**9 + kept.num_bytes


@pytest.mark.slow
@pytest.mark.timeout(900)  # it plans, and planning takes the processor alone
def test_peaks_at_full_size(small_svd, tmp_path):
    out = tmp_path / "full_size.json"
    full_size.main(["--out", str(out), "--figures", str(tmp_path)])
    ways = json.loads(out.read_text())["systems"]["svd-xt"]["ways"]
    assert list(ways) == ["plain", "deepcache", "cache", "lightcache"]
    plain, deepcache, cache, ours = (way["peak_bytes"] for way in ways.values())
    assert set(plain) == {"encode", "denoise", "decode"}
    assert deepcache["denoise"] > cache["denoise"]
    assert deepcache["decode"] - plain["decode"] == ways["deepcache"]["kept_bytes"]
    assert cache["decode"] == plain["decode"]
    assert max(ours.values()) < max(plain.values())
    assert "nothing here has been measured" in out.with_suffix(".md").read_text()
    assert (tmp_path / "full_size.svg").stat().st_size
    before = out.read_text()
    full_size.main(["--out", str(out), "--figures", str(tmp_path), "--draw"])
    assert out.read_text() == before

"""The command line: what it prints where, its exit codes, and that a mistake is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import lightcache_fx as lc
from cli_runs import mistake, run
from examples.small_model import config
from lightcache_fx import cli
from lightcache_fx.cli import planning, presets, recipes, systems
from lightcache_fx.cli.app import app
from lightcache_fx.costs import GPU_FLOAT, GPU_HALF
from lightcache_fx.errors import BudgetError, ConfigError
from lightcache_fx.hardware import PCIE
from lightcache_fx.pipeline_plan import PlannedStage
from zoo import ZOO

ROOT = Path(__file__).parent.parent
SMALL = ROOT / "examples" / "small_model" / "svd-sprites"
SAVES = pytest.mark.filterwarnings("ignore:.*:UserWarning")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with videos: `a`, `b` that is a little off, `short` and `a.json`, which is none."""
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    a = random.integers(20, 230, (3, 40, 40, 3), dtype=np.uint8)
    b = a + random.integers(0, 4, a.shape, dtype=np.uint8)
    np.save(folder / "a.npy", a)
    np.save(folder / "b.npy", b)
    np.save(folder / "short.npy", a[:2])
    return folder


# compare --------------------------------------------------------------------------------------------------------------


def test_compare_prints_a_table_and_what_is_not_available(videos):
    result = run("compare", videos / "a.npy", videos / "b.npy", env={"COLUMNS": "100"})
    assert "accelerated against plain, 3 frames of 40 x 40" in result.stdout
    for name in ("PSNR, dB ↑", "SSIM ↑", "FLIP ↓", "temporal difference ↓", "warping error ↓"):
        assert name in result.stdout
    assert "LPIPS: not available, " in result.stdout
    assert result.stderr == ""
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_compare_fits_a_narrow_terminal(videos):
    result = run("compare", videos / "a.npy", videos / "b.npy", env={"COLUMNS": "60"})
    assert max(map(len, result.stdout.splitlines())) <= 60
    assert "PSNR, dB ↑" in result.stdout


def test_compare_as_json(videos):
    result = run("compare", videos / "a.npy", videos / "b.npy", "--json", "--measure", "psnr", "--measure", "lpips")
    facts = json.loads(result.stdout)
    assert set(facts) == {"plain", "accelerated", "quality", "failures"}
    assert facts["plain"].endswith("a.npy")
    quality = facts["quality"]
    assert set(quality["psnr"]) == {"mean", "worst", "worst_frame", "frames"}
    a, b = (np.load(videos / name).astype(np.float64) / 255 for name in ("a.npy", "b.npy"))
    assert quality["psnr"]["mean"] == pytest.approx(-10 * np.log10(np.square(a - b).mean()), abs=1e-3)
    assert set(quality["lpips"]) == {"not_available"}
    assert quality["ssim"] is None
    assert (quality["num_frames"], quality["identical"], facts["failures"]) == (3, False, [])


def test_identical_videos_in_both_forms(videos):
    same = videos / "a.npy"
    facts = json.loads(run("compare", same, same, "--measure", "psnr", "--json", "--fail-below", "psnr=90").stdout)
    assert facts["quality"]["identical"]
    assert facts["quality"]["psnr"]["mean"] is None
    shown = run("compare", same, same, "--measure", "psnr").stdout
    assert "∞" in shown
    assert "the videos are identical" in shown


@pytest.mark.parametrize(
    ("options", "failures"),
    [
        (["--fail-below", "psnr=30"], []),
        (["--fail-below", "psnr=60"], ["psnr is 42."]),
        (["--fail-below", "psnr.worst=60", "--fail-below", "ssim=0.5"], ["psnr.worst is 42."]),
        (["--fail-above", "max_difference=0.001", "--fail-above", "flip=1"], ["max_difference is 0.01176, above 0.0"]),
        (["--fail-above", "temporal=1e-9", "--fail-below", "ssim=0.99999"], ["ssim is 0.99", "temporal is 0.00"]),
        (["--fail-above", "warping=1"], []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_limits_decide_the_exit_code(videos, options, failures, form):
    result = run("compare", videos / "a.npy", videos / "b.npy", *options, *form, code=1 if failures else 0)
    lines = result.stderr.splitlines()
    assert len(lines) == len(failures)
    for line, start in zip(lines, failures, strict=True):
        assert line.startswith(f"lightcache-fx: {start}")
    if form:
        assert json.loads(result.stdout)["failures"] == [line.removeprefix("lightcache-fx: ") for line in lines]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.npy", "short.npy"], "the videos do not match: 3 frames and 2"),
        (["a.npy", "nowhere.gif"], "there is no file or folder nowhere.gif"),
        (["a.npy", "a.npy", "--measure", "psnrr"], "no measure 'psnrr'; did you mean 'psnr'?"),
        (["a.npy", "a.npy", "--fail-below", "psnr"], "--fail-below must read NAME=NUMBER, such as psnr=30; got 'psnr'"),
        (["a.npy", "a.npy", "--fail-below", "psnr=nan"], "--fail-below must read NAME=NUMBER"),
        (["a.npy", "a.npy", "--fail-below", "psrn=3"], "--fail-below: no figure 'psrn'; did you mean 'psnr'"),
        (["a.npy", "a.npy", "--fail-below", "psnr.best=3"], "--fail-below: no figure 'psnr.best'"),
        (["a.npy", "a.npy", "--fail-above", "psnr=3"], "psnr is better when higher, so its limit is given by --fail-b"),
        (["a.npy", "a.npy", "--fail-below", "flip=3"], "flip is better when lower, so its limit is given by --fail-a"),
        (
            ["a.npy", "a.npy", "--fail-above", "flip=3", "--measure", "ssim"],
            "add --measure flip, or it is not measured",
        ),
        (["a.npy", "b.npy", "--fail-above", "lpips=0.1"], "cannot judge by lpips, not available: "),
    ],
)
def test_mistakes_of_compare_are_one_line(videos, monkeypatch, arguments, message):
    monkeypatch.chdir(videos)
    assert message in mistake("compare", *arguments)


def test_compare_without_its_extra_says_what_to_install(videos, monkeypatch):
    for name in [n for n in sys.modules if n.startswith(("lightcache_fx.quality", "lightcache_fx.cli.comparing"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    line = mistake("compare", videos / "a.npy", videos / "a.npy")
    assert "comparing videos needs skimage" in line
    assert line.endswith("pip install 'lightcache-fx[quality]'")


# plan -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned():
    """The plan of the small pipeline's denoiser, as JSON."""
    return json.loads(run("plan", SMALL, "--interval", 3, "--dtype", "float32", "--json").stdout)


def test_plan_of_a_pipeline_folder(planned):
    config = json.loads((SMALL / "unet" / "config.json").read_text())
    assert set(planned) == {"system", "request", "device", "policy", "weight_bytes", "seconds", "fits", "plan"}
    assert planned["system"] == "StableVideoDiffusionPipeline"
    assert planned["request"] == {
        "height": 32, "width": 32, "frames": config["num_frames"], "steps": 25, "batch": 1, "guidance": True,
        "decode_frames": config["num_frames"],
    }  # fmt: skip
    plan = planned["plan"]
    assert plan["model"] == "UNetSpatioTemporalConditionModel"
    assert plan["cut"] == {"label": "branch 0", "kept_bytes": 2**18, "slots": 1}  # as the demo has measured
    assert plan["kept_bytes"] == 2**18
    assert plan["schedule"] == "one step in 3 full"
    assert 1.8 < plan["flop_bound_speedup"] < 2.4
    assert yaml.safe_load(planned["policy"]) == {"cache": {"cut": 0, "interval": 3}}
    assert planned["fits"] is True


def test_the_weights_are_counted_and_not_read(planned, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(SMALL / "unet" / "diffusion_pytorch_model.safetensors")
    assert planned["weight_bytes"] == sum(weight.numel() * 4 for weight in weights.values())
    bare = tmp_path / "config.json"  # nothing but the configuration
    shutil.copy(SMALL / "unet" / "config.json", bare)
    facts = json.loads(run("plan", bare, "--interval", 3, "--dtype", "float32", "--json").stdout)
    assert facts["plan"] == planned["plan"]
    assert facts["request"]["height"] == 64  # a latent of 8 x 8, without an autoencoder that tells its factor


def test_options_change_the_request_and_the_plan(planned, tiny):
    facts = json.loads(
        run("plan", tiny / "unet", "--frames", 4, "--height", 128, "--width", 64, "--no-guidance", "--steps", 10,
            "--batch", 3, "--branch", 0, "--json").stdout
    )  # fmt: skip
    request, plan = facts["request"], facts["plan"]
    assert (request["height"], request["width"], request["frames"], request["batch"]) == (128, 64, 4, 3)
    assert (request["guidance"], request["steps"]) == (False, 10)
    assert plan["cut"]["kept_bytes"] == 3 * 4 * 32 * 16 * 8 * 2  # B F C H W, float16
    assert facts["weight_bytes"] < planned["weight_bytes"] / 2


def test_plan_prints_tables(tiny, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("cache: {cut: up_blocks.0.resnets.2, interval: 5}\n")
    result = run("plan", tiny, "--policy", policy, env={"COLUMNS": "60"})
    assert "StableVideoDiffusionPipeline: 8 frames of 32 x 32" in result.stdout
    assert "one step in 5 full" in result.stdout
    assert "by FLOPs alone" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 60
    assert result.stderr.startswith("lightcache-fx: planned in ")
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A pipeline's folder with nothing but configurations: of the small one's shape, narrower and with one level."""
    folder = tmp_path_factory.mktemp("tiny")
    narrow = config.ModelConfig(vae_channels=(32, 32), unet_channels=(32,))
    for name, model in {"vae": config.make_vae(narrow), "unet": config.make_unet(narrow)}.items():
        model.save_config(folder / name)
    config.make_image_encoder(narrow).config.save_pretrained(folder / "image_encoder")
    index = json.loads((SMALL / "model_index.json").read_text()) | {"filter": ["mine", "Evil"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "filter").mkdir()
    (folder / "filter" / "config.json").write_text("{}")
    return folder


def test_plan_of_a_whole_pipeline_within_a_budget(tiny):
    facts = json.loads(run("plan", tiny, "--interval", 3, "--memory-budget", "30MiB", "--json").stdout)
    stages = facts["pipeline"]["stages"]
    assert list(stages) == ["image_encoder", "encode", "denoise", "decode"]
    assert facts["fits"]
    assert facts["left_out"] == {"filter": "Evil is of mine, and only classes of diffusers and transformers are made"}
    assert facts["pipeline"]["peak_bytes"] <= 30 * 2**20
    assert stages["denoise"]["calls"] == 25
    assert stages["denoise"]["plan"]["cut"]["label"] == "branch 0"
    alone = json.loads(run("plan", tiny, "--component", "unet", "--interval", 3, "--json").stdout)
    assert facts["weight_bytes"] > alone["weight_bytes"] > alone["plan"]["full"]["weight_bytes"] > 0


def test_tables_of_a_whole_pipeline_say_what_is_left_out(tiny):
    shown = run("plan", tiny, "--memory-budget", "30MiB", env={"COLUMNS": "200"}).stdout
    assert "not planned: filter, Evil is of mine" in shown
    assert "│ image_encoder │" in shown
    assert "at most" in shown
    narrow = run("plan", tiny, "--memory-budget", "30MiB", env={"COLUMNS": "60"}).stdout
    assert "\n  denoise\n    calls: 25\n    weights: " in narrow, "a table that there is no room for is a list"
    assert max(map(len, narrow.splitlines())) <= 60


def test_a_budget_that_nothing_fits_tells_the_floor(tiny):
    single = run("plan", tiny, "--component", "image_encoder", "--memory-budget", "20KiB", "--json", code=2)
    facts = json.loads(single.stdout)
    assert facts["fits"] is False
    assert facts["reached_bytes"] > 20 * 2**10
    assert facts["refusal"].startswith("memory_budget: 20.0 KiB is less than the ")
    assert single.stderr == f"lightcache-fx: {facts['refusal']}\n"


def test_a_pipeline_that_does_not_fit_is_shown_with_its_floor(tiny, monkeypatch):
    refusal = BudgetError("the floor is 5 MiB", 5 * 2**20)
    seen = []

    def refuse(stages, policy, **settings):
        seen.append(settings)
        return lc.PipelinePlan(tuple(PlannedStage(stage, None, refusal) for stage in stages))

    monkeypatch.setattr(planning, "plan_pipeline", refuse)
    result = run(
        "plan", tiny, "--memory-budget", "1MiB", "--tflops", 60, "--link", 25, "--memory-bandwidth", 1000, code=2
    )
    assert "denoise does not fit: the floor is 5 MiB" in result.stdout
    expected = "image_encoder, encode, denoise, decode do not fit 1MiB: the least is 5.0 MiB, for image_encoder"
    assert result.stderr.splitlines()[-1] == f"lightcache-fx: {expected}"
    assert json.loads(run("plan", tiny, "--memory-budget", "1MiB", "--json", code=2).stdout)["fits"] is False
    given, none = (settings["hardware"] for settings in seen)
    assert (given.machine.flops, given.machine.bytes) == (60e12, 1e12)
    assert (given.link.to_device, given.link.from_device) == (25e9, 25e9)
    assert none is None


def test_hardware_that_is_not_given_is_typical():
    assert planning.describe_hardware("cuda", "float16", None, None, None) is None
    half = planning.describe_hardware("cuda", "float16", None, None, 10.0)
    assert half.machine == GPU_HALF
    single = planning.describe_hardware("cuda", "float32", 30.0, None, None)
    assert (single.machine.flops, single.machine.bytes, single.link) == (30e12, GPU_FLOAT.bytes, PCIE)


def test_plan_of_the_decoder_alone(tiny):
    facts = json.loads(run("plan", tiny, "--component", "vae", "--decode-frames", 3, "--json").stdout)
    assert facts["plan"]["model"] == "AutoencoderKLTemporalDecoder"
    assert facts["request"]["decode_frames"] == 3
    assert facts["plan"]["cut"] is None


def test_a_model_that_is_not_known_takes_its_inputs_from_the_command_line(tmp_path):
    model, make_inputs = ZOO["dit"].build()
    model.save_config(tmp_path)
    assert type(model).__name__ not in recipes.STEPS
    line = mistake("plan", tmp_path)
    assert "how DiTTransformer2DModel is called is not known here: give each argument as --input" in line
    assert "it takes hidden_states, timestep, class_labels" in line
    inputs = make_inputs(0)
    given = [f"--input={name}={'x'.join(map(str, value.shape)) or 'scalar'}:{str(value.dtype).removeprefix('torch.')}"
             for name, value in inputs.items() if isinstance(value, torch.Tensor)]  # fmt: skip
    facts = json.loads(run("plan", tmp_path, "--dtype", "float32", *given, "--json").stdout)
    assert facts["plan"]["full"]["flops"] == lc.plan(model, kwargs=inputs).full_flops
    wrong = mistake("plan", tmp_path, "--input", "hidden_states=2x3")
    assert wrong.startswith("the call that --input describes cannot be captured: DiTTransformer2DModel cannot be ")
    assert "\n" not in wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["svd-xl"], "there is no preset, folder or file 'svd-xl'; did you mean 'svd-xt'"),
        ([SMALL, "--policy", "nowhere.yaml"], "there is no policy file nowhere.yaml"),
        ([SMALL, "--policy", "bad.yaml"], "unknown key 'cashe'; did you mean 'cache'? allowed keys"),
        ([SMALL, "--policy", "bad.yaml", "--interval", 2], "--policy says what is cached: leave out --interval"),
        ([SMALL, "--no-cache", "--branch", 2], "--no-cache leaves nothing for --interval and --branch"),
        ([SMALL, "--interval", 0], "interval: Input should be greater than or equal to 1, got 0"),
        ([SMALL, "--memory-budget", "lots"], "expected a number of bytes such as 1048576, '64MiB' or '1.5GB', got"),
        ([SMALL, "--branch", 99], "cut=99: the model has 9 skip connections, so branch 0 to 8 exist"),
        ([SMALL, "--height", 30], "--height must be a multiple of 4, got 30"),
        ([SMALL, "--component", "uneT"], "has no component 'uneT'; did you mean 'unet'"),
        ([SMALL, "--tflops", 3], "--tflops, --memory-bandwidth and --link are for plans within a --mem"),
        ([SMALL, "--input", "sample"], "--input must read NAME=SHAPE or NAME=SHAPE:DTYPE"),
        ([SMALL, "--input", "sample=2x2:complex64"], "--input must read NAME=SHAPE"),
        (["animatediff", "--frames", 40], "--frames must be at most 32, the model's motion_max_seq_length; got 40"),
        (["broken.json"], "cannot read broken.json: Expecting"),
        (["list.json"], "list.json is no configuration: expected a JSON object, got list"),
        (["noclass.json"], "noclass.json names no class: expected _class_name (diffusers) or architectures"),
        (["pipeline.json"], "is of a whole pipeline (WanPipeline), which needs its folder"),
        (["unknown.json"], "has no model class UNetOfMine"),
        (["attack.json"], "has no model class ModelLoader"),
        (["wrong.json"], "wrong: UNet2DConditionModel cannot be made of its configuration: "),
        (["nosize.json"], "the configuration of UNet3DConditionModel gives no size; say --height and --width"),
        (["picture.json", "--frames", 4], "UNet2DConditionModel makes pictures: leave out --frames"),
        (["."], "has no model_index.json and no config.json"),
        (["saved"], "saved is a saved module, whose plan is made; see `inspect` and `diff`"),
    ],
)
def test_mistakes_of_plan_are_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("cashe: {cut: 0, interval: 3}\n")
    for name, text in {
        "broken": "{", "list": "[]", "noclass": "{}",
        "pipeline": '{"_class_name": "WanPipeline"}',
        "unknown": '{"_class_name": "UNetOfMine"}',
        "attack": '{"_class_name": "ModelLoader"}',
        "wrong": '{"_class_name": "UNet2DConditionModel", "down_block_types": ["NoBlock"]}',
        "nosize": '{"_class_name": "UNet3DConditionModel", "block_out_channels": [32, 32, 32, 32]}',
        "picture": '{"_class_name": "UNet2DConditionModel", "block_out_channels": [32, 32, 32, 32]}',
    }.items():  # fmt: skip
        Path(f"{name}.json").write_text(text)
    Path("saved").mkdir()
    Path("saved/manifest.json").write_text("{}")
    assert message in mistake("plan", *arguments)


def test_plan_without_diffusers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = mistake("plan", SMALL)
    assert line.endswith("needs diffusers, which is not installed: pip install 'lightcache-fx[diffusers]'")


def test_debug_shows_where_an_error_comes_from():
    result = CliRunner().invoke(app, ["--debug", "plan", "nowhere"])
    assert isinstance(result.exception, ConfigError)


# presets --------------------------------------------------------------------------------------------------------------


def test_presets_are_the_published_systems():
    """Parameters and latents, by the systems' papers and configurations."""
    expected = {  # parameters of the denoiser in millions, latents of a step
        "svd-xt": (1525, (2, 25, 8, 72, 128)),
        "animatediff-lightning": (1313, (1, 4, 25, 64, 64)),
        "animatediff": (1313, (2, 4, 16, 64, 64)),
        "modelscope": (1411, (2, 4, 25, 32, 32)),
        "easyanimate": (6888, (2, 16, 7, 64, 64)),
    }
    assert set(presets.PRESETS) == set(expected)
    for name, (millions, latent) in expected.items():
        made = planning.make(presets.PRESETS[name], planning.Wish(), whole=False)
        (stage,) = made.stages
        parameters = sum(weight.numel() for weight in stage.module.parameters())
        assert parameters / 1e6 == pytest.approx(millions, rel=0.01), name
        inputs = stage.kwargs
        assert tuple(inputs.get("sample", inputs.get("hidden_states")).shape) == latent, name
        assert stage.calls == made.request.steps
        assert not made.left_out


def test_the_compiler_knows_no_preset():
    names = [component.cls for system in presets.PRESETS.values() for component in system.components]
    code = "\n".join(p.read_text() for folder in ("lightcache_fx", "passes") for p in (ROOT / folder).glob("*.py"))
    for name in {name for name in names if name.startswith(("UNet", "Easy"))}:
        assert f'"{name}"' not in code, name


def test_the_stages_of_a_preset(monkeypatch):
    calls = {}
    for name in ("svd-xt", "animatediff", "modelscope", "easyanimate"):
        made = planning.make(presets.PRESETS[name], planning.Wish(), whole=True)
        calls[name] = [(stage.name, stage.calls, stage.method) for stage in made.stages]
        assert all(w.is_meta or hasattr(w, "fake_mode") for s in made.stages for w in s.module.parameters())
    before = [("image_encoder", 1, None), ("encode", 1, "encode")]
    assert calls["svd-xt"] == [*before, ("denoise", 25, None), ("decode", 4, None)]
    assert calls["animatediff"] == [("text_encoder", 2, None), ("denoise", 25, None), ("decode", 1, None)]
    assert calls["modelscope"][-1] == ("decode", 1, None)
    assert calls["easyanimate"] == [("denoise", 50, None), ("decode", 1, None)]


def test_a_pipeline_folder_in_the_order_of_its_run(tmp_path):
    index = {
        "_class_name": "P", "vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"], "other": ["mine", "Evil"],
        "scheduler": ["diffusers", "S"], "safety_checker": [None, None],
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in ("vae", "unet", "text_encoder", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "model_index.json"):
        system = systems.read_system(str(source), presets.PRESETS)
        assert [component.name for component in system.components] == ["text_encoder", "unet", "vae"]
        assert system.left_out == {"other": "Evil is of mine, and only classes of diffusers and transformers are made"}
        assert system.component().name == "unet"


def test_a_policy_of_the_published_setting_and_the_options():
    easy, svd = presets.PRESETS["easyanimate"], presets.PRESETS["svd-xt"]
    assert planning.make_policy(svd) == lc.Policy.deepcache(8, 0)
    assert planning.make_policy(svd, interval=3) == lc.Policy.deepcache(3, 0)
    assert planning.make_policy(svd, branch=2) == lc.Policy.deepcache(8, 2)
    assert planning.make_policy(easy, interval=4).cache == easy.cache.model_copy(update={"interval": 4})
    assert planning.make_policy(svd, cache=False) == lc.Policy()
    assert planning.make_policy(systems.System("x", ())) == lc.Policy()
    assert planning.make_policy(systems.System("x", ()), branch=1) == lc.Policy.deepcache(3, 1)
    within = planning.make_policy(svd, memory_budget="6GiB")
    assert within == lc.Policy(cache=svd.cache, memory_budget="6GiB")


# diff and inspect -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model, make_inputs = ZOO["sd"].build()
    transformed = lc.transform(model, lc.Policy.deepcache(2, 0))
    for step in range(2):
        transformed(**make_inputs(0, step))
    folder = tmp_path_factory.mktemp("saved") / "unet.lightcache"
    lc.save(transformed, folder)
    return folder, lc.inspect(transformed)


def test_diff_of_a_saved_module(saved):
    folder, report = saved
    printed = run("diff", folder).stdout
    expected = lc.diff(report.programs["full"], report.programs["reuse"], names=("full", "reuse"))
    assert printed.splitlines() == expected.splitlines()
    back = run("diff", folder, "--from", "reuse", "--to", "full", "--context", 0).stdout
    assert back.startswith("--- reuse\n+++ full\n@@")
    assert "there is no program 'model'" in mistake("diff", folder, "--from", "model")
    assert "is a saved module, planned already: leave out --branch" in mistake("diff", folder, "--branch", 0)


def test_diff_of_a_model_folder_and_a_policy():
    printed = run("diff", SMALL, "--interval", 3, "--dtype", "float32").stdout
    removed = sum(line.startswith("-%") for line in printed.splitlines())
    assert printed.startswith("--- full\n+++ reuse\n")
    assert removed > 100
    assert "aten.conv2d" in printed
    model = run("diff", SMALL, "--interval", 3, "--from", "model", "--to", "full", "--dtype", "float32").stdout
    assert model.startswith("--- model\n+++ full\n")
    assert "did you mean 'reuse'" in mistake("diff", SMALL, "--interval", 3, "--to", "reus")


def test_inspect_of_a_saved_module(saved):
    folder, report = saved
    facts = json.loads(run("inspect", folder, "--json").stdout)
    (signature,) = facts["signatures"]
    assert [program["name"] for program in signature["programs"]] == list(report.programs)
    assert yaml.safe_load(facts["policy"]) == {"cache": {"cut": 0, "interval": 2}}
    assert "┃ program" in run("inspect", folder, env={"COLUMNS": "140"}).stdout
    shown = run("inspect", folder, env={"COLUMNS": "60"}).stdout
    assert "\n  reuse\n    runs by: eager\n" in shown
    assert max(map(len, shown.splitlines())) <= 60


def test_folders_that_are_not_saved_modules(saved, tmp_path):
    assert "there is no folder" in mistake("inspect", tmp_path / "nowhere")
    broken = tmp_path / "broken"
    shutil.copytree(saved[0], broken)
    (broken / "manifest.json").write_text("{")
    assert "manifest.json" in mistake("inspect", broken)
    assert "manifest.json" in mistake("diff", broken)


# The program ----------------------------------------------------------------------------------------------------------


def subprocess_run(*arguments, code="from lightcache_fx.cli import main; main()", **env):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=200, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def test_a_real_process_keeps_json_clean_and_fits_its_columns(videos):
    done = subprocess.run(
        [sys.executable, "-m", "lightcache_fx", "compare", videos / "a.npy", videos / "b.npy", "--json", "--fail-below",
         "psnr=60"], capture_output=True, text=True, check=False, timeout=200, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["quality"]["num_frames"] == 3
    assert done.stderr.splitlines() == [f"lightcache-fx: {json.loads(done.stdout)['failures'][0]}"]


def test_a_real_process_has_no_traceback_for_a_mistake():
    done = subprocess_run("plan", "nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("lightcache-fx: there is no preset, folder or file 'nowhere'")


def test_without_typer_it_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None\nfrom lightcache_fx.cli import main; main()"
    done = subprocess_run("--help", code=code)
    assert (done.returncode, done.stdout) == (2, "")
    expected = "the command line needs typer, which is not installed: pip install 'lightcache-fx[cli]'"
    assert done.stderr == f"lightcache-fx: {expected}\n"


@pytest.mark.parametrize("command", ["plan", "compare", "diff", "inspect"])
def test_help_has_an_example(command):
    shown = " ".join(run(command, "--help", env={"COLUMNS": "60"}).stdout.replace("│", " ").split())
    assert f"Example: lightcache-fx {command} " in shown


def test_help_and_version():
    shown = run("--help").stdout
    for command in ("plan", "compare", "diff", "inspect"):
        assert command in shown
    assert run("--version").stdout == f"lightcache-fx {lc.__version__}\n"
    assert cli.main.__doc__


def test_usage_errors_exit_with_2():
    assert "Missing argument" in run("plan", code=2).stderr
    assert "No such command" in run("plam", code=2).stderr
    assert "--height" in run("plan", SMALL, "--height", "x", code=2).stderr
    assert "--dtype" in run("plan", SMALL, "--dtype", "int8", code=2).stderr

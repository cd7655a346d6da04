"""The commands that run a pipeline, `demo` and `bench`: any folder that diffusers wrote, and mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import lightcache_fx as lc
from cli_runs import mistake, run
from lightcache_fx.cli import generating
from lightcache_fx.cli.benching import read_policies
from lightcache_fx.cli.generating import Asked, call_of, example_of, generator_of, open_pipeline, read_arguments
from lightcache_fx.cli.pictures import HEADER, MARGIN, contact_sheet
from lightcache_fx.errors import ArgumentError, ConfigError, PolicyError
from pipelines import PIPELINES

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "examples" / "small_model" / "svd-sprites"
SMALL = ("--height", 32, "--width", 32, "--steps", 3)
STAGES = {"encode", "denoise", "decode"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small pipelines as diffusers writes them, by name; `prompt.png` is a picture."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in ("sd", "modelscope", "svd"):
        PIPELINES[name].build().save_pretrained(root / name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "first.png")
    return root


# bench ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_measures_plain_and_two_policies(folders, tmp_path):
    cached, within = tmp_path / "cached.yaml", tmp_path / "swapped.yaml"
    cached.write_text("cache: {cut: 0, interval: 2}\n")
    within.write_text("cache: {cut: 0, interval: 2}\nswap: {}\n")
    out = tmp_path / "new" / "bench.json"
    given = (folders / "modelscope", "--prompt", "a box", "--frames", 3, *SMALL, "--rounds", 2, "--device", "cpu")
    result = run("bench", *given, "--policy", cached, "--policy", within, "--out", out, "--fail-below", "psnr=1")
    facts = json.loads(out.read_text())
    assert facts["frames"] == [3, 32, 32, 3]
    assert (facts["pipeline"], facts["source"]) == ("TextToVideoSDPipeline", "modelscope")
    assert facts["asked"]["prompt"] == "a box"
    assert facts["environment"]["torch"] == torch.__version__
    assert list(facts["ways"]) == ["plain", "cached", "swapped"]
    for way in facts["ways"].values():
        assert set(way["peak_bytes"]) == STAGES
        assert set(way["seconds"]) == {*STAGES, "total"}
        assert way["seconds"]["total"]["count"] == 2
    plain, one, two = facts["ways"].values()
    assert (plain["policy"], plain["quality"], plain["predicted_peak_bytes"]) == (None, None, {})
    assert yaml.safe_load(one["policy"]) == {"cache": {"cut": 0, "interval": 2}}
    assert one["quality"]["psnr"]["mean"] == pytest.approx(two["quality"]["psnr"]["mean"])  # the same cut
    assert two["peak_bytes"]["denoise"] < one["peak_bytes"]["denoise"]
    assert one["predicted_peak_bytes"]["denoise"] == pytest.approx(one["peak_bytes"]["denoise"], rel=0.1)
    for text in ("medians of 2 rounds", "times as fast", "peak of denoise", "predicted", "PSNR, dB", "cached"):
        assert text in result.stdout


def test_bench_of_a_picture_as_json_fails_a_comparison(folders):
    given = (folders / "sd", "--prompt", "a box", *SMALL, "--rounds", 1, "--device", "cpu", "--json")
    result = run("bench", *given, "--interval", 3, "--fail-below", "psnr=200", code=1)
    facts = json.loads(result.stdout)
    assert facts["frames"] == [1, 32, 32, 3]
    name = "interval 3, branch 0"
    assert facts["failures"][0].startswith(f"{name}: psnr is ")
    assert result.stderr.startswith(f"lightcache-fx: {name}: psnr is ")
    assert yaml.safe_load(facts["ways"][name]["policy"]) == {"cache": {"cut": 0, "interval": 3}}


def test_bench_of_identical_videos(folders):
    given = (folders / "svd", "--image", folders / "first.png", *SMALL, "--frames", 3, "--rounds", 1)
    result = run("bench", *given, "--interval", 1, "--device", "cpu")
    assert "the same" in result.stdout
    assert "1.0000" in result.stdout


def test_bench_asks_what_the_folder_says(folders, tmp_path):
    folder = tmp_path / "svd"
    shutil.copytree(folders / "svd", folder)
    shutil.copy(folders / "first.png", folder)
    text = "{image: first.png, height: 32, width: 32, frames: 2, arguments: {motion_bucket_id: 3, fps: 4}}"
    (folder / "example.yaml").write_text(text)
    given = ("--steps", 2, "--rounds", 1, "--device", "cpu", "--argument", "fps=5", "--interval", 2, "--json")
    facts = json.loads(run("bench", folder, *given).stdout)
    assert facts["asked"]["arguments"] == {"motion_bucket_id": 3, "fps": 5}
    assert facts["asked"]["image"] == "first.png"  # no path of this machine
    assert facts["frames"] == [2, 32, 32, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere, and it is no model id such as "),
        (["."], "no pipeline in . (it has no model_index.json): name a folder that save_pretrained wrote"),
        (["broken"], "cannot load the pipeline in broken: "),
        (["sd"], "StableDiffusionPipeline needs a prompt: give --prompt TEXT"),
        (["sd", "--image", "first.png"], "StableDiffusionPipeline takes no image: leave out --image, and give --prom"),
        (["sd", "--prompt", "a", "--frames", 3], "StableDiffusionPipeline takes no frames: leave out --frames"),
        (["svd"], "StableVideoDiffusionPipeline begins with a picture: give --image FILE"),
        (["svd", "--prompt", "a"], "StableVideoDiffusionPipeline takes no prompt: leave out --prompt, and give --im"),
        (["svd", "--image", "nowhere.png"], "there is no picture nowhere.png"),
        (["svd", "--image", "bad.yaml"], "bad.yaml is no picture that can be read"),
        (["sd", "--prompt", "a", "--rounds", 0], "--rounds must be at least 1, got 0"),
        (["sd", "--prompt", "a", "--warm-ups", 0], "--warm-ups must be at least 1, got 0"),
        (["sd", "--prompt", "a", "--steps", -1], "--steps must be at least 1, got -1"),
        (["sd", "--prompt", "a", "--policy", "nowhere.yaml"], "there is no policy file nowhere.yaml"),
        (["sd", "--prompt", "a", "--policy", "bad.yaml"], "unknown key 'cashe'; did you mean 'cache'?"),
        (["sd", "--prompt", "a", "--policy", "bad.yaml", "--interval", 2], "--policy says all: leave out --preset, "),
        (["sd", "--prompt", "a", "--preset", "svd-xtt"], "no settings of 'svd-xtt'; did you mean 'svd-xt'?"),
        (["sd", "--prompt", "a", "--interval", 0], "interval: Input should be greater than or equal to 1"),
        (["sd", "--prompt", "a", "--memory-budget", "much"], "memory_budget: expected a number of bytes"),
        (["sd", "--prompt", "a", "--argument", "guidance"], "--argument must read NAME=VALUE, such as guidance_scale"),
        (["sd", "--prompt", "a", "--argument", "gidance_scale=3"], "takes no such argument; did you mean 'guidance_s"),
        (["sd", "--prompt", "a", "--argument", "generator=3"], "--argument generator: that is set here; leave it out"),
        (["sd", "--prompt", "a", "--argument", "guidance_scale=x"], "StableDiffusionPipeline cannot be called so: "),
        (["sd", "--prompt", "a", "--device", "tpu"], "expected cpu, cuda or cuda:N, got 'tpu'"),
        (["sd", "--prompt", "a", "--fail-below", "flip=3"], "flip is better when lower"),
        (["sd", "--prompt", "a", "--out", "first.png/x.json"], "cannot write first.png/x.json: "),
    ],
)  # fmt: skip
def test_mistakes_of_bench_are_one_line(folders, tmp_path, monkeypatch, arguments, message):
    for path in folders.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("cashe: {cut: 0, interval: 3}\n")
    Path("broken").mkdir()
    shutil.copy("sd/model_index.json", "broken")
    assert message in mistake("bench", *arguments)


def test_a_model_id_is_passed_on(monkeypatch):
    asked = []

    def load(source, **settings):
        asked.append((source, settings))
        raise OSError("there is no such model\nand more")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    line = mistake("bench", "someone/some-model", "--prompt", "a", "--device", "cpu", "--dtype", "bfloat16")
    assert line == "cannot load the model someone/some-model: there is no such model"
    assert asked == [("someone/some-model", {"dtype": torch.bfloat16})]


def test_policies_have_the_names_of_their_files(tmp_path):
    for name in ("a/one.yaml", "b/one.yaml", "b/plain.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("cache: {cut: 0, interval: 2}\n")
    a, b, plain = (tmp_path / name for name in ("a/one.yaml", "b/one.yaml", "b/plain.yaml"))
    assert list(read_policies([a], None, None, None, None)) == ["one"]
    assert list(read_policies([a, b], None, None, None, None)) == [str(a), str(b)]
    assert list(read_policies([plain], None, None, None, None)) == [str(plain)]
    with pytest.raises(PolicyError, match="named twice"):
        read_policies([a, a], None, None, None, None)


def test_options_make_a_policy():
    cache = lc.Cache(cut=1, interval=5)
    assert read_policies([], None, 5, 1, None) == {"interval 5, branch 1": lc.Policy(cache=cache)}
    assert read_policies([], None, None, None, "2MiB") == {"within 2MiB": lc.Policy(memory_budget="2MiB")}
    assert read_policies([], "generic", None, None, None) == {"lightcache generic": lc.Policy.lightcache()}
    (policy,) = read_policies([], "svd-xt", 4, None, "6GiB").values()
    assert policy.memory_budget == 6 * 2**30
    assert policy.cache == lc.Cache(cut=0, interval=4)


# demo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), [("modelscope", 3), ("sd", 1)])
def test_demo_of_another_pipeline(folders, tmp_path, name, frames):
    given = ("--model", folders / name, "--prompt", "a box", *SMALL, "--repeats", 1, "--out", tmp_path / "out")
    result = run("demo", *given, *(("--frames", frames) if frames > 1 else ()))
    assert "PSNR" in result.stdout
    with np.load(tmp_path / "out" / "frames.npz") as arrays:
        assert arrays["plain"].shape == arrays["accelerated"].shape == (frames, 32, 32, 3)
    for file in ("side_by_side.gif", "side_by_side.mp4", "contact_sheet.png", "report.json", "stages.png"):
        assert (tmp_path / "out" / file).stat().st_size
    run("report", tmp_path / "page.html", "--run", tmp_path / "out")


def test_demo_without_a_model_says_where_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightcache_fx.cli.demo.__file__", str(tmp_path / "lib" / "lightcache_fx" / "cli" / "demo.py"))
    assert mistake("demo") == (
        "the small model is not in the wheel, and examples/small_model/svd-sprites is not here: name a pipeline's"
        " folder with --model, or run this in a checkout of the repository"
    )


def test_the_shipped_model_is_found_and_says_what_to_ask():
    from examples.small_model.sample import first_frame, heldout_clip
    from examples.small_model.sprites import FPS, IMAGE_SIZE
    from lightcache_fx.cli.demo import shipped_model

    assert shipped_model() == SHIPPED
    asked, clip = example_of(str(SHIPPED)), heldout_clip(0)
    assert (asked.height, asked.width, asked.fps) == (IMAGE_SIZE, IMAGE_SIZE, FPS)
    assert asked.arguments == {"fps": FPS, "motion_bucket_id": clip.motion_bucket_id}
    with Image.open(asked.image) as image:
        assert (np.asarray(image) == np.asarray(first_frame(clip))).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "there is no folder nowhere"),
        (["--repeats", 0], "--repeats must be at least 1, got 0"),
        (["--model", "svd"], "begins with a picture: give --image FILE"),
        (["--model", "svd", "--image", "first.png", "--out", "first.png/x"], "cannot write to first.png/x: Not a dir"),
    ],
)
def test_mistakes_of_demo_are_one_line(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    given = [*arguments] if "--out" in arguments else [*arguments, "--out", "out"]
    assert message in mistake("demo", *given)


# What is asked of a pipeline ------------------------------------------------------------------------------------------


def test_a_contact_sheet_has_a_row_a_video():
    pixels = np.zeros((10, 64, 48, 3), dtype=np.uint8)
    sheet = contact_sheet([("one", pixels), ("two", pixels)], most=4)
    assert sheet.size == (MARGIN + 4 * (48 + MARGIN), MARGIN + 2 * (HEADER + 64 + MARGIN))


def test_arguments_are_read_as_yaml():
    assert read_arguments(["a=6", "b=x y", "c=[1, 2]", "d=null", "e=a=b"]) == {
        "a": 6, "b": "x y", "c": [1, 2], "d": None, "e": "a=b",
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="NAME=VALUE"):
        read_arguments(["a: [1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("steps: 0", "steps: "), ("sise: 3", "sise: "), ("[", "cannot be read"), ("3", "Input should")],
)
def test_a_bad_example_is_told(tmp_path, text, message):
    (tmp_path / "example.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        example_of(str(tmp_path))


def test_what_is_given_comes_before_what_is_there():
    there = Asked(prompt="there", steps=5, arguments={"a": 1, "b": 2})
    assert Asked(steps=3, arguments={"b": 3}).over(there) == Asked(prompt="there", steps=3, arguments={"a": 1, "b": 3})


@pytest.mark.parametrize("name", ["sd", "svd"])
def test_a_folder_generates_what_its_pipeline_does(folders, name):
    case = PIPELINES[name]
    pipe = open_pipeline(str(folders / name), torch.float32)
    image = str(folders / "first.png") if name == "svd" else None
    prompt = None if name == "svd" else "box 3"
    call = call_of(pipe, Asked(prompt=prompt, image=image, height=32, width=32, steps=2))
    frames = generator_of(pipe, call, seed=3)()
    assert frames.ndim == 4
    arguments = {"image": call["image"]} if name == "svd" else {"prompt": "box 3"}
    again = case.build()(
        **arguments,
        height=32,
        width=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    )
    expected = again.frames[0] if name == "svd" else again.images
    assert (frames == np.asarray(expected, dtype=np.float32)).all()
    assert generating.steps_of(pipe, Asked()) in (25, 50)

"""Measures of a video beside another: known values, properties, files, and what cannot be compared or measured."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import types
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lightcache_fx.errors import LightcacheError, MissingExtraError, QualityError
from lightcache_fx.quality import MEASURES, NotAvailable, Quality, as_frames, compare_videos, perceptual, read_video

FAST = ("psnr", "ssim", "flip", "temporal")


def video(seed=0, frames=3, height=20, width=24, low=0.3, high=0.7, channels=3):
    random = np.random.default_rng(seed)
    return random.uniform(low, high, (frames, height, width, channels)).astype(np.float32)


def moving(frames=4, size=48, speed=2):
    """A smooth texture that moves to the right by whole pixels."""
    y, x = np.meshgrid(np.arange(size), np.arange(size + frames * speed), indexing="ij")
    texture = 0.5 + 0.2 * np.sin(0.45 * x) * np.cos(0.35 * y) + 0.1 * np.sin(0.21 * x + 0.3 * y)
    whole = np.stack([texture[:, (frames - t) * speed : (frames - t) * speed + size] for t in range(frames)])
    return whole[..., None].repeat(3, axis=-1).astype(np.float32)


# Known values ---------------------------------------------------------------------------------------------------------


def test_identical_videos():
    a = moving()
    quality = compare_videos(a, a.copy(), measures=(*FAST, "warping"))
    assert quality.identical
    assert quality.max_difference == 0
    assert quality.psnr.mean == quality.psnr.worst == math.inf
    assert quality.ssim.mean == pytest.approx(1, abs=1e-6)
    assert quality.flip.mean == quality.flip.worst == 0
    assert quality.temporal.mean == 0
    assert quality.warping.frames == pytest.approx([quality.warping.mean] * 3, rel=5)
    assert quality.warping.mean == quality.warping.reference > 0


def test_a_constant_shift_is_exact_and_does_not_flicker():
    a = video()
    quality = compare_videos(a, a + np.float32(0.1), measures=("psnr", "temporal"))
    assert quality.psnr.mean == pytest.approx(20, abs=1e-4)
    assert quality.psnr.frames == pytest.approx([20] * 3, abs=1e-4)
    assert quality.max_difference == pytest.approx(0.1, abs=1e-6)
    assert quality.temporal.mean == pytest.approx(0, abs=1e-6)
    assert not quality.identical
    assert quality.ssim is None


def test_the_mean_psnr_is_of_the_mean_squared_error():
    a = video(frames=4)
    b = a.copy()
    b[2] += np.float32(0.2)
    quality = compare_videos(a, b, measures=("psnr",))
    assert quality.psnr.mean == pytest.approx(-10 * math.log10(0.2**2 / 4), abs=1e-4)
    assert quality.psnr.frames == pytest.approx([math.inf, math.inf, -10 * math.log10(0.04), math.inf], abs=1e-4)
    assert (quality.psnr.worst_frame, quality.psnr.worst) == (2, quality.psnr.frames[2])


def test_ssim_of_constant_frames_has_a_closed_form():
    a, b = (np.full((2, 9, 11, 3), level, dtype=np.float32) for level in (0.4, 0.6))
    stabilizer = 0.01**2
    expected = (2 * 0.4 * 0.6 + stabilizer) / (0.4**2 + 0.6**2 + stabilizer)
    assert compare_videos(a, b, measures=("ssim",)).ssim.mean == pytest.approx(expected, abs=1e-4)


def test_the_worst_ssim_is_the_least():
    a = video(frames=3)
    b = a.copy()
    b[1] = video(seed=9, frames=1)[0]
    found = compare_videos(a, b, measures=("ssim",)).ssim
    assert found.worst_frame == 1
    assert found.worst == min(found.frames) < found.mean < 1
    assert found.mean == pytest.approx(np.mean(found.frames))


def test_flip_is_1_between_the_colours_that_its_paper_scales_it_by():
    green, blue = np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 16, 16, 3), np.float32)
    green[..., 1] = blue[..., 2] = 1
    assert compare_videos(green, blue, measures=("flip",)).flip.mean == pytest.approx(1, abs=1e-3)


def test_flip_of_grey_is_that_of_grey_rgb_and_its_worst_is_the_largest():
    a, b = video(channels=1), video(seed=1, channels=1)
    b[0] = a[0]
    grey = compare_videos(a, b, measures=("flip",)).flip
    rgb = compare_videos(a.repeat(3, axis=-1), b.repeat(3, axis=-1), measures=("flip",)).flip
    assert grey == rgb
    assert grey.frames[0] == 0 < grey.worst == max(grey.frames)
    assert grey.worst_frame in (1, 2)


def test_flicker_is_what_the_temporal_difference_measures():
    a = np.full((5, 8, 8, 3), 0.5, dtype=np.float32)
    b = a.copy()
    b[::2] += np.float32(0.1)
    found = compare_videos(a, b, measures=("temporal",)).temporal
    assert found.frames == pytest.approx([0.1] * 4, abs=1e-6)
    assert found.reference == 0
    changing = a * np.linspace(0.2, 1, 5, dtype=np.float32)[:, None, None, None]
    other = compare_videos(changing, a, measures=("temporal",)).temporal
    assert other.frames == pytest.approx([0.1] * 4, abs=1e-6)
    assert other.reference == pytest.approx(0.1, abs=1e-6)


def test_noise_that_stands_still_does_not_flicker_and_new_noise_does():
    a = np.full((6, 64, 64, 1), 0.5, dtype=np.float32)
    noise = np.random.default_rng(0).normal(0, 0.05, a.shape).clip(-0.3, 0.3).astype(np.float32)
    still = compare_videos(a, a + noise[:1], measures=("temporal",)).temporal
    fresh = compare_videos(a, a + noise, measures=("temporal",)).temporal
    assert still.mean == pytest.approx(0, abs=1e-6)
    assert fresh.mean == pytest.approx(math.sqrt(2) * 0.05, rel=0.03)


def test_warping_follows_the_motion():
    a = moving()
    found = compare_videos(a, a, measures=("warping",)).warping
    unwarped = np.square(np.diff(a, axis=0)).mean()
    assert found.reference < unwarped / 50, "what moves must be taken back along its motion"


def test_warping_counts_only_what_is_visible_in_both_frames():
    a = moving()
    b = a.copy()
    b[0, :, -2:] = 1 - b[0, :, -2:]  # they leave the frame
    b[-1, :, 0] = 1 - b[-1, :, 0]  # and this has come into it
    plain, spoilt = (compare_videos(a, video, measures=("warping",)).warping for video in (a, b))
    assert spoilt.frames == pytest.approx(plain.frames, rel=0.01)
    b[0, :, 20] = 0  # this stays
    assert compare_videos(a, b, measures=("warping",)).warping.frames[0] > 100 * plain.frames[0]


def test_flicker_raises_the_warping_error_by_its_square():
    a = moving()
    b = a.copy()
    b[::2] += np.float32(0.1)
    found = compare_videos(a, b, measures=("warping",)).warping
    assert found.mean == pytest.approx(found.reference + 0.1**2, rel=0.1)


def test_the_motion_is_the_plain_videos():
    a = moving()
    assert (
        compare_videos(a, a[::-1], measures=("warping",)).warping.mean
        > 10 * compare_videos(a, a, measures=("warping",)).warping.mean
    )


# Properties -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), channels=st.sampled_from([1, 3]))
def test_the_order_of_the_videos_does_not_matter(seed, channels):
    a, b = video(seed, channels=channels), video(seed + 1, channels=channels)
    there, back = (compare_videos(x, y, measures=FAST) for x, y in ((a, b), (b, a)))
    for name in FAST:
        assert there.figure(name) == pytest.approx(back.figure(name), rel=1e-4), name
    assert there.max_difference == back.max_difference
    assert 0 <= there.flip.mean <= 1
    assert -1 <= there.ssim.mean < 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), small=st.floats(0.02, 0.4), more=st.floats(1.3, 2.5))
def test_more_of_the_same_noise_is_worse(seed, small, more):
    a = video(seed)
    noise = video(seed + 1, low=-0.25, high=0.25)
    less, worse = (compare_videos(a, a + np.float32(scale) * noise, measures=FAST) for scale in (small, small * more))
    for name in FAST:
        better, other = (less, worse) if MEASURES[name] == "lower" else (worse, less)
        assert better.figure(name) < other.figure(name), name
    gap = less.psnr.mean - worse.psnr.mean
    assert gap == pytest.approx(20 * math.log10(more), abs=0.01)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 4))
def test_json_reads_back_as_it_was(seed, frames):
    a = video(seed, frames=frames)
    b = a.copy()
    b[0] = 1 - b[0]
    quality = compare_videos(a, b, measures=("psnr", "ssim", "temporal", "lpips"))
    text = quality.to_json()
    assert Quality.model_validate_json(text) == quality
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == quality.as_dict()


def test_an_infinite_psnr_is_null_in_json_and_nothing_else_is():
    a = video()
    facts = compare_videos(a, a, measures=("psnr", "ssim")).as_dict()
    assert facts["psnr"] == {"mean": None, "worst": None, "worst_frame": 0, "frames": [None] * 3}
    assert facts["identical"] is True
    assert facts["ssim"]["mean"] == pytest.approx(1)
    assert facts["flip"] is None
    assert Quality.model_validate(facts).psnr.mean == math.inf


# What cannot be measured ----------------------------------------------------------------------------------------------


def test_one_frame_has_no_motion_and_tiny_frames_no_windows():
    one = compare_videos(video(frames=1), video(seed=1, frames=1))
    assert one.temporal.not_available == one.warping.not_available == "there is only one frame"
    tiny = compare_videos(video(height=6), video(seed=1, height=6), measures=("ssim", "warping", "lpips", "psnr"))
    assert "24 x 6 are smaller than its windows" in tiny.ssim.not_available
    assert "too small for optical flow" in tiny.warping.not_available
    assert "too small for AlexNet" in tiny.lpips.not_available
    assert tiny.psnr.mean > 0


def test_figures_by_name():
    a, b = video(), video(seed=1)
    quality = compare_videos(a, b, measures=("psnr", "lpips"))
    assert quality.figure("psnr") == quality.figure("psnr.mean") == quality.psnr.mean
    assert quality.figure("psnr.worst") == quality.psnr.worst
    assert quality.figure("max_difference") == quality.max_difference
    for name, message in {
        "pnsr": "no figure 'pnsr'; did you mean 'psnr'?",
        "psnr.best": "no figure 'psnr.best'",
        "lpips": "cannot judge by lpips, not available: ",
        "ssim": "cannot judge by ssim, it was not asked for",
    }.items():
        with pytest.raises(QualityError, match=message.replace("?", r"\?").replace(".", r"\.")):
            quality.figure(name)


def _no_network(*_args, **_kwargs):
    pytest.fail("something was to be downloaded")


class _StandInLpips(torch.nn.Module):
    """With the names of the package's AlexNet, and a distance that depends on its weights."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert (net, pnet_rand, verbose) == ("alex", True, False), "left to itself the package downloads"
        self.net = torch.nn.Module()
        self.net.slice1 = torch.nn.Sequential()
        self.net.slice1.add_module("0", torch.nn.Conv2d(3, 1, 1))
        self.net.slice2 = torch.nn.Sequential()
        self.net.slice2.add_module("3", torch.nn.Conv2d(1, 1, 1))

    def forward(self, a, b, normalize):
        assert normalize, "values are in 0..1"
        assert a.shape[:2] == b.shape[:2] == (1, 3)
        layers = torch.nn.Sequential(self.net.slice1, self.net.slice2)
        return (layers(a) - layers(b)).abs().mean()


@pytest.fixture
def lpips_here(monkeypatch, tmp_path):
    """Stand-ins for lpips and torchvision, and a folder for torch.hub; returns where the weights go and their name."""
    trunk = {"features.0.weight": torch.full((1, 3, 1, 1), 1 / 3), "features.0.bias": torch.zeros(1),
             "features.3.weight": torch.full((1, 1, 1, 1), 2.0), "features.3.bias": torch.zeros(1),
             "classifier.1.weight": torch.zeros(2, 2)}  # fmt: skip
    file = tmp_path / "trunk.pth"
    torch.save(trunk, file)
    name = f"alexnet-owt-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    entry = types.SimpleNamespace(url=f"https://download.example/models/{name}")
    models = types.ModuleType("torchvision.models")
    models.AlexNet_Weights = types.SimpleNamespace(IMAGENET1K_V1=entry)
    package = types.ModuleType("lpips")
    package.LPIPS = _StandInLpips
    for module in (models, package, types.ModuleType("torchvision")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _no_network)
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    (tmp_path / "checkpoints").mkdir()
    return file, tmp_path / "checkpoints" / name


def test_lpips_without_its_packages_is_reported(monkeypatch):
    for name in ("lpips", "torchvision.models"):
        models = types.ModuleType("torchvision.models")
        monkeypatch.setitem(sys.modules, "torchvision.models", models)
        monkeypatch.setitem(sys.modules, name, None)
        found = compare_videos(video(height=40, width=40), video(1, height=40, width=40), measures=("lpips",)).lpips
        assert isinstance(found, NotAvailable)
        assert found.not_available == f"the package {name.partition('.')[0]} is not installed"
        monkeypatch.undo()


def test_lpips_with_a_torchvision_of_another_build_is_reported(monkeypatch):
    def refuse(_name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(perceptual.importlib, "import_module", refuse)
    found = perceptual.lpips(video(height=40, width=40), video(1, height=40, width=40))
    assert found.not_available == "the package torchvision cannot be imported: operator torchvision::nms does not exist"


def test_lpips_without_its_weights_is_reported_and_nothing_is_downloaded(lpips_here):
    found = compare_videos(video(height=40, width=40), video(1, height=40, width=40), measures=("lpips",)).lpips
    assert "are not among torch.hub's checkpoints, and nothing is downloaded" in found.not_available
    assert lpips_here[1].name in found.not_available


def test_lpips_with_damaged_weights_is_reported(lpips_here):
    file, place = lpips_here
    place.write_bytes(file.read_bytes() + b"x")
    found = compare_videos(video(height=40, width=40), video(1, height=40, width=40), measures=("lpips",)).lpips
    assert "does not have the hash in its name" in found.not_available


def test_lpips_is_that_of_the_weights_in_the_file(lpips_here):
    file, place = lpips_here
    place.write_bytes(file.read_bytes())
    a, b = video(height=40, width=40), video(1, height=40, width=40)
    torch.manual_seed(3)
    expected_random = torch.randn(2)
    torch.manual_seed(3)
    found = compare_videos(a, b, measures=("lpips",)).lpips
    assert torch.equal(torch.randn(2), expected_random), "the user's random numbers must not depend on this"
    expected = [2 * np.abs(x.mean(-1) - y.mean(-1)).mean() for x, y in zip(a, b, strict=True)]
    assert found.frames == pytest.approx(expected, rel=1e-4)


def test_flip_without_its_package_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    found = compare_videos(video(), video(1), measures=("flip", "psnr"))
    assert found.flip.not_available == "the package flip-evaluator is not installed"
    assert found.psnr.mean > 0


# Videos in all forms --------------------------------------------------------------------------------------------------


def pixels(seed=0, frames=4, height=16, width=20):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_files_of_all_kinds_hold_the_same_frames(tmp_path):
    flat = np.repeat(np.array([[10, 20, 30], [200, 100, 50], [0, 0, 0], [255, 255, 255]], np.uint8), 16 * 20, axis=0)
    frames = flat.reshape(4, 16, 20, 3)
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "v.gif", save_all=True, append_images=others, loop=0)
    np.save(tmp_path / "v.npy", frames)
    np.savez(tmp_path / "one.npz", video=frames)
    np.savez(tmp_path / "two.npz", plain=frames, other=frames[::-1])
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in zip((8, 9, 10, 11), frames, strict=True):
        iio.imwrite(folder / f"frame_{number}.png", frame)
    (folder / "notes.txt").write_text("not a picture")
    expected = frames.astype(np.float32) / 255
    for source in ("v.gif", "v.npy", "one.npz", "two.npz:plain", "frames"):
        found = read_video(tmp_path / source)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected), source
    assert np.array_equal(read_video(f"{tmp_path / 'two.npz'}:other"), expected[::-1])
    assert np.array_equal(read_video(folder / "frame_9.png"), expected[1:2])


def test_mp4_is_read(tmp_path):
    frames = np.stack([np.full((32, 48, 3), 40 * t + 20, np.uint8) for t in range(5)])
    iio.imwrite(tmp_path / "v.mp4", frames, plugin="FFMPEG", fps=8, codec="libx264", macro_block_size=2)
    found = read_video(tmp_path / "v.mp4")
    assert found.shape == (5, 32, 48, 3)
    assert np.abs(found * 255 - frames).max() < 6


def test_mp4_without_ffmpeg_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "v.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtraError, match=r"imageio_ffmpeg, .*: pip install 'lightcache-fx\[video\]'"):
        read_video(tmp_path / "v.mp4")


def test_arrays_tensors_and_pictures():
    frames = pixels()
    expected = frames.astype(np.float32) / 255
    first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    assert np.array_equal(as_frames(frames), expected)
    assert np.array_equal(as_frames(first, layout="FCHW"), expected)
    assert np.array_equal(as_frames(torch.from_numpy(frames), layout="FHWC"), expected)
    assert np.array_equal(as_frames([Image.fromarray(frame) for frame in frames]), expected)
    assert np.array_equal(as_frames(expected.astype(np.float64)), expected)
    assert np.array_equal(as_frames(frames.astype(np.uint16) * 257), expected)
    half = first.to(torch.bfloat16).div(256).requires_grad_()
    assert np.abs(as_frames(half, layout="FCHW") - expected).max() < 0.01
    assert as_frames([np.zeros((4, 5), np.uint8)] * 2).shape == (2, 4, 5, 1)
    opaque = np.concatenate([frames, np.full_like(frames[..., :1], 255)], axis=-1)
    assert np.array_equal(as_frames(opaque), expected)


def _with(value):
    frames = video()
    frames[1, 2, 3, 0] = value
    return frames


@pytest.mark.parametrize(
    ("value", "settings", "message"),
    [
        (torch.zeros(3, 3, 8, 8), {}, "say how a torch tensor of shape [3, 3, 8, 8] is to be read: layout='FCHW'"),
        (torch.zeros(3, 8, 8, 3), {"layout": "FCHW"}, "expected 1 channel or 3 second, got shape [3, 8, 8, 3]"),
        (np.zeros((3, 3, 8, 8)), {}, "got shape [3, 3, 8, 8]; for channels first pass layout='FCHW'"),
        (np.zeros((3, 8, 8, 5)), {}, "expected 1 channel or 3 last, got shape [3, 8, 8, 5]"),
        (np.zeros((8, 8, 3)), {}, "(frames, height, width, channels), got [8, 8, 3]"),
        (np.zeros((1, 3, 8, 8, 3)), {}, "got [1, 3, 8, 8, 3]; of a batch of videos pass one"),
        (np.zeros((0, 8, 8, 3)), {}, "expected at least one frame and one pixel, got shape [0, 8, 8, 3]"),
        (np.zeros((3, 8, 8, 3), np.int64), {}, "expected uint8, uint16 or floats in 0..1, got int64"),
        (np.zeros((3, 8, 8, 3), bool), {}, "expected uint8, uint16 or floats in 0..1, got bool"),
        (_with(np.nan), {}, "NaN or an infinite value in frame 1"),
        (_with(np.inf), {}, "NaN or an infinite value in frame 1"),
        (_with(-0.5), {}, "expected floats in 0..1, got -0.5 to 0.6998; map -1..1 by (x + 1) / 2"),
        (_with(200.0), {}, "to 200; divide by 255, or pass uint8"),
        (_with(1.5), {}, "to 1.5"),
        (np.zeros((2, 8, 8, 4), np.uint8), {}, "some pixels are transparent"),
        (video(), {"layout": "HWC"}, "layout must be 'FHWC' or 'FCHW', got 'HWC'"),
        ([np.zeros((4, 4, 3)), np.zeros((4, 5, 3))], {}, "pictures of one video differ: [4, 4, 3] and [4, 5, 3]"),
        ([], {}, "expected at least one frame"),
        (7, {}, "a list of pictures, got int"),
    ],
)
def test_what_is_no_video_is_refused(value, settings, message):
    with pytest.raises(QualityError) as caught:
        as_frames(value, **settings)
    assert message in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    for name in ("broken.gif", "broken.png", "broken.npy", "broken.npz", "broken.mp4", "film.xyz"):
        (tmp_path / name).write_bytes(b"not what the name says" * 10)
    np.savez(tmp_path / "two.npz", a=pixels(), b=pixels())
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    iio.imwrite(mixed / "1.png", pixels()[0])
    iio.imwrite(mixed / "2.png", pixels(height=8)[0])
    cases = {
        "nowhere.gif": "there is no file or folder",
        "broken.gif": "cannot read",
        "broken.png": "cannot read",
        "broken.npy": "cannot read",
        "broken.npz": "cannot read",
        "broken.mp4": "cannot read",
        "pickled.npy": "cannot read",
        "film.xyz": "expected a folder of pictures or a file that ends in one of .gif",
        "two.npz": "two.npz holds a, b: name one behind a colon, as in two.npz:a",
        "two.npz:c": "there is no 'c', as in two.npz:a",
        "empty": "has no pictures",
        "mixed": "1.png is 16 x 20 x 3, 2.png is 8 x 20 x 3",
    }
    for name, message in cases.items():
        with pytest.raises(QualityError) as caught:
            read_video(tmp_path / name)
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (video(frames=2), "3 frames and 2"),
        (video(width=16), "24 x 20 pixels and 16 x 20"),
        (video(channels=1), "3 channels and 1"),
    ],
)
def test_videos_that_do_not_match_are_refused(other, message):
    with pytest.raises(QualityError) as caught:
        compare_videos(video(), other)
    assert f"the videos do not match: {message}; compare videos of one size and length" == str(caught.value)


def test_messages_name_the_video_and_the_measure(tmp_path):
    np.save(tmp_path / "bad.npy", _with(np.nan))
    with pytest.raises(QualityError, match=r"bad\.npy: NaN"):
        compare_videos(video(), tmp_path / "bad.npy")
    with pytest.raises(QualityError, match="the plain video: NaN"):
        compare_videos(_with(np.nan), video())
    with pytest.raises(QualityError, match="no measure 'pnsr'; did you mean 'psnr'"):
        compare_videos(video(), video(), measures=("pnsr",))


def test_measures_are_taken_in_order_and_told():
    told = []
    quality = compare_videos(video(), video(1), measures=("temporal", "psnr"), progress=told.append)
    assert told == list(quality.measured()) == ["psnr", "temporal"]


def test_the_package_imports_without_the_extra_and_says_what_is_missing(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lightcache_fx.quality")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(MissingExtraError, match=r"videos needs .*skimage.*lightcache-fx\[quality\]") as caught:
        __import__("lightcache_fx.quality")
    assert isinstance(caught.value, LightcacheError)
    assert isinstance(caught.value, ImportError)
    assert "lightcache_fx.quality" not in Path(sys.modules["lightcache_fx"].__file__).read_text()

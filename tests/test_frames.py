"""Frames a few at a time: handed out one by one, and the approximation for decoders that mix them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lightcache_fx as lc
from axis_rules.vaes import VAES
from lightcache_fx import Decode, Policy
from lightcache_fx.errors import ArgumentError, PolicyError, RegionError
from lightcache_fx.measure import measure_peak

TOLERANCE = 1e-5
FRAMES = 6


def image_vae() -> Any:
    return VAES["kl"].build()


def video_vae() -> Any:
    return VAES["svd"].build()


def latents(vae: Any, count: int = FRAMES, size: tuple[int, int] = (6, 8)) -> torch.Tensor:
    return torch.randn(count, vae.config.latent_channels, *size, generator=torch.Generator().manual_seed(0))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("frames", "sizes"), [(1, [1] * 6), (4, [4, 2]), (9, [6])])
def test_frames_are_handed_out_in_order(frames: int, sizes: list[int]) -> None:
    vae = image_vae()
    parts = list(lc.decode_frames(lc.transform(vae, Policy(decode=Decode(frames=frames))), latents(vae)))
    assert [len(part) for part in parts] == sizes
    with torch.no_grad():
        assert error(torch.cat(parts), vae.decode(latents(vae)).sample) <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 2])
def test_independent_frames_are_bitwise_those_decoded_alone(frames: int) -> None:
    """What differs from the whole batch is how kernels round at another batch size."""
    vae = image_vae()
    given = latents(vae)
    sliced = lc.transform(vae, Policy(decode=Decode(frames=frames)))
    with torch.no_grad():
        alone = torch.cat([vae.decode(part).sample for part in given.split(frames)])
    assert torch.equal(sliced.decode(given).sample, alone)
    assert torch.equal(torch.cat(list(lc.decode_frames(sliced, given))), alone)


def test_nothing_but_one_part_is_held() -> None:
    vae = image_vae()
    given = latents(vae, 12, (24, 24))
    sliced = lc.transform(vae, Policy(decode=Decode(frames=2)))
    whole = lc.transform(vae)

    def drain() -> None:
        for part in lc.decode_frames(sliced, given):
            assert len(part) == 2

    drain()  # captures
    whole.decode(given)
    gc.collect()
    peaks = [measure_peak(run).peak_bytes for run in (drain, lambda: whole.decode(given))]
    assert peaks[0] < peaks[1] / 5


def test_frames_that_depend_on_each_other_are_not_handed_out() -> None:
    vae = video_vae()
    with pytest.raises(RegionError, match="frames depend on each other"):
        lc.decode_frames(lc.transform(vae, Policy(decode=Decode(frames=1))), latents(vae), num_frames=FRAMES)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_approximation_is_that_of_slices_decoded_alone(frames: int) -> None:
    vae = video_vae()
    given = latents(vae)
    approximate = lc.transform(vae, Policy(decode=Decode(frames=frames, approximate=True)))
    with torch.no_grad():
        alone = [vae.decode(part, num_frames=len(part)).sample for part in given.split(frames)]
        whole = vae.decode(given, num_frames=FRAMES).sample
    found = approximate.decode(given, num_frames=FRAMES)
    assert torch.equal(found.sample, torch.cat(alone))
    assert error(found.sample, whole) > 100 * TOLERANCE, "it is called an approximation"
    assert torch.equal(approximate.decode(given, FRAMES, return_dict=False)[0], found.sample)
    assert torch.equal(torch.cat(list(lc.decode_frames(approximate, given, num_frames=FRAMES))), found.sample)


def test_the_approximation_says_that_it_is_one() -> None:
    vae = video_vae()
    policy = Policy(decode=Decode(frames=2, approximate=True))
    plan = lc.plan(vae, (latents(vae, 2),), {"num_frames": 2}, policy)
    assert "approximate: frames of different slices are decoded as if they were of different videos" in str(plan)
    assert not Decode().approximate


def test_slices_do_not_reach_into_the_next_video() -> None:
    vae = video_vae()
    given = latents(vae)
    approximate = lc.transform(vae, Policy(decode=Decode(frames=2, approximate=True)))
    with torch.no_grad():
        alone = [vae.decode(part, num_frames=len(part)).sample for video in given.split(3) for part in video.split(2)]
    assert torch.equal(approximate.decode(given, num_frames=3).sample, torch.cat(alone))


def wrong_policy() -> object:
    vae = image_vae()
    return lc.decode_frames(lc.transform(vae, Policy(decode=Decode(budget="1GiB"))), latents(vae))


def not_transformed() -> object:
    return lc.decode_frames(image_vae(), torch.zeros(1))


def not_images() -> object:
    vae = image_vae()
    return lc.decode_frames(lc.transform(vae, Policy(decode=Decode(frames=1))), latents(vae)[None])


def no_whole_number_of_videos() -> object:
    vae = video_vae()
    approximate = lc.transform(vae, Policy(decode=Decode(frames=1, approximate=True)))
    return approximate.decode(latents(vae), num_frames=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            wrong_policy,
            r"transformed with Policy\(decode=Decode\(frames=...\)\), got AutoencoderKL with Decode\(frames=None",
        ),
        (not_transformed, r"decode_frames: expected an autoencoder that was transformed .* got AutoencoderKL"),
        (not_images, r"z are taken a few frames .* got \(1, 6, 4, 6, 8\); a decoder of whole videos"),
        (no_whole_number_of_videos, r"6 latents do not divide into videos of num_frames=4"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_budget_is_exact_and_so_not_approximate() -> None:
    with pytest.raises(PolicyError, match="give frames, not a budget"):
        Decode(budget="1GiB", approximate=True)

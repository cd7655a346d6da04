"""The shipped image-to-video model: it loads, it is small, its data and training repeat, and it is really trained."""

import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.small_model import config, data, losses, sample, sprites, train  # noqa: E402
from examples.small_model.fit import FitOptions, Run, fit  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"  # diffusers' scheduler, numpy 2
)

MAX_MODEL_BYTES = 12_000_000
TINY = config.ModelConfig(
    latent_channels=4, vae_channels=(32, 32, 32), unet_channels=(32, 32), embedding_dim=32, clip_patch=56
)


@pytest.fixture(scope="module")
def pipeline():
    """The shipped pipeline in float32."""
    return sample.load_pipeline()


@pytest.fixture(scope="module")
def heldout(pipeline):
    """Eight held-out clips encoded by the shipped autoencoder."""
    frames = data.load_frame_pool(data.HELDOUT_SEED_OFFSET, 8)
    return data.encode_pool(pipeline.vae, frames, seed=1)


def test_folder_loads_as_the_svd_pipeline(pipeline):
    names = {name: type(component).__name__ for name, component in pipeline.components.items()}
    assert names["image_encoder"] == "CLIPVisionModelWithProjection"
    assert names["unet"] == "UNetSpatioTemporalConditionModel"
    assert names["vae"] == "AutoencoderKLTemporalDecoder"
    assert names["scheduler"] == "EulerDiscreteScheduler"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_folder_is_small_and_half_precision():
    files = [path for path in train.MODEL_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_MODEL_BYTES
    weights = torch.cat([tensor.flatten() for tensor in _tensors(files)])
    assert weights.dtype == torch.float16
    assert bool(weights.isfinite().all())


def _tensors(files):
    from safetensors.torch import load_file

    return [tensor for path in files if path.suffix == ".safetensors" for tensor in load_file(path).values()]


def test_clips_repeat_for_a_seed_and_differ_between_seeds():
    first, second = (sprites.render_clips(3, range(2))[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, sprites.render_clips(4, range(2))[0])


@pytest.mark.parametrize("index", range(20))
def test_sprites_move_the_way_they_face_by_the_bucket_s_speed(index):
    spec = sprites.sample_clip(0, index)
    for sprite in spec.sprites:
        centred = replace(sprite, start=(sprites.IMAGE_SIZE / 2,) * 2)
        centres, directions = sprites.trajectory(centred, spec.speed, num_frames=2)
        assert np.allclose(directions[0], [np.cos(sprite.heading), np.sin(sprite.heading)], atol=1e-6)
        assert np.allclose(centres[1] - centres[0], spec.speed * directions[0], atol=1e-4)
        assert spec.speed == pytest.approx(sprites.PIXELS_PER_FRAME_AT_127 * spec.motion_bucket_id / 127)


def test_a_side_view_is_mirrored_with_its_heading():
    sprite = sprites.SpriteSpec("fish", "red", 7.0, (16.0, 16.0), 0.0)
    spec = sprites.ClipSpec("sea", 24.0, (sprite,), 100)
    right = sprites.render_clip(spec, num_frames=1)[0, :, 2:-2]
    left = sprites.render_clip(replace(spec, sprites=(replace(sprite, heading=np.pi),)), num_frames=1)[0, :, 2:-2]
    assert np.array_equal(right, left[:, :, ::-1])


def test_a_sprite_turns_round_at_the_border():
    sprite = sprites.SpriteSpec("car", "blue", 7.0, (24.0, 16.0), 0.0)
    centres, directions = sprites.trajectory(sprite, speed=2.0, num_frames=3)
    assert centres[:, 0].tolist() == pytest.approx([24.0, 24.0, 22.0])
    assert directions[:, 0].tolist() == [1.0, -1.0, -1.0]


def _tiny_run(folder, pool, steps):
    torch.manual_seed(0)
    options = FitOptions(folder, seed=0, steps=steps, learning_rate=1e-3, decay_steps=1, evaluate_every=1)
    run = Run(config.Denoiser(TINY), options)
    fit(run, functools.partial(train.unet_loss, pool=pool), lambda _: {"heldout_loss": 0.0})
    return run


def test_a_resumed_run_is_bitwise_the_uncut_one(tmp_path):
    torch.manual_seed(0)
    pool = data.encode_pool(config.make_vae(TINY), data.load_frame_pool(0, 4), seed=0)
    uncut = _tiny_run(tmp_path / "uncut", pool, steps=3)
    checkpoint = tmp_path / "cut" / "checkpoint.pt"
    _tiny_run(tmp_path / "cut", pool, steps=2)
    assert checkpoint.exists()
    resumed = _tiny_run(tmp_path / "cut", pool, steps=3)
    assert resumed.step == uncut.step == 3
    for name, tensor in uncut.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name
    for first, second in zip(uncut.average.values, resumed.average.values, strict=True):
        assert torch.equal(first, second)


def _heldout_loss(unet, image_encoder, pool):
    denoiser = config.Denoiser(config.ModelConfig())
    denoiser.unet, denoiser.image_encoder = unet, image_encoder
    with torch.no_grad():
        return train.evaluate_unet(denoiser, pool=pool)["heldout_loss"]


def test_the_model_denoises_held_out_clips_far_better_than_an_untrained_one(pipeline, heldout):
    trained = _heldout_loss(pipeline.unet, pipeline.image_encoder, heldout)
    torch.manual_seed(0)
    untrained = config.Denoiser(config.ModelConfig())
    assert trained < 0.35 * _heldout_loss(untrained.unet, untrained.image_encoder, heldout)


def test_the_first_frame_matters(pipeline, heldout):
    """A model that ignored its condition would not mind another clip's first frame."""
    swapped = replace(
        heldout,
        image_latents=heldout.image_latents.roll(1, dims=0),
        first_frames=heldout.first_frames.roll(1, dims=0),
    )
    own = _heldout_loss(pipeline.unet, pipeline.image_encoder, heldout)
    assert _heldout_loss(pipeline.unet, pipeline.image_encoder, swapped) > 1.5 * own


def test_latents_have_unit_scale_and_the_decoder_restores_the_frames(pipeline):
    pixels = data.to_model_range(data.load_frame_pool(data.HELDOUT_SEED_OFFSET, 2).pixels).flatten(0, 1)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        decoded = pipeline.vae.decode(latents, num_frames=sprites.NUM_FRAMES).sample
    assert 0.7 < float((latents * pipeline.vae.config.scaling_factor).std()) < 1.4
    assert float((decoded - pixels).square().mean()) < 0.02


def test_the_noise_parametrisation_is_the_scheduler_s():
    """One exact prediction of v takes the scheduler from any noise level straight to the clean latents."""
    scheduler = config.make_scheduler()
    scheduler.set_timesteps(5)
    sigma = scheduler.sigmas[0]
    latents, values = torch.randn(2, 1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = losses.Noise(sigma.log()[None], values, torch.zeros(1, dtype=torch.bool))
    noisy, v = losses.mix(latents, noise)
    sample = latents + sigma * values
    assert torch.allclose(scheduler.scale_model_input(sample, scheduler.timesteps[0]), noisy, atol=1e-5)
    step = scheduler.step(v, scheduler.timesteps[0], sample)
    assert torch.allclose(step.pred_original_sample, latents, atol=1e-3)
    assert torch.allclose(scheduler.timesteps[0], sigma.log() / 4)
    assert losses.UNET_LEVELS.log_sigma_at(torch.tensor([0.5])).item() == pytest.approx(losses.UNET_LEVELS.mean)


def test_the_pipeline_keeps_the_sprite_and_its_place(pipeline):
    spec = next(spec for index in range(20) if len((spec := sample.heldout_clip(index)).sprites) == 1)
    frames = sample.generate(pipeline, spec, steps=10, max_guidance_scale=1.5, seed=0)
    figures = sample.compare(frames, spec)
    assert frames.shape == (sprites.NUM_FRAMES, 3, sprites.IMAGE_SIZE, sprites.IMAGE_SIZE)
    assert not figures["lost"]
    assert figures["psnr_db"] > 15

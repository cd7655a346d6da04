"""Train the small models on procedural sprites: `python -m examples.small_model.train --help`.

Stages, each resumed from its checkpoint when run again. The image-to-video model: `vae`, then `decoder` and `unet` (in
any order, or side by side), then `export`. The text-to-video model learns the latents of the exported autoencoder:
`dit`, then `export-dit`.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLTemporalDecoder, LattePipeline, StableVideoDiffusionPipeline

from examples.small_model import config, data, dit, losses
from examples.small_model.fit import FitOptions, Run, fit
from examples.small_model.sprites import NUM_FRAMES

NUM_TRAINING_CLIPS = 4096
NUM_HELDOUT_CLIPS = 64
BATCH_CLIPS = 4
NUM_CAPTIONED_CLIPS = 6144
VAE_IMAGES = 8
"""Images a step while the autoencoder trains; its temporal decoder is then tuned on one whole clip a step."""

RUNS = Path("runs/small_model")
MODEL_FOLDER = Path(__file__).parent / "svd-sprites"
DIT_FOLDER = Path(__file__).parent / "latte-sprites"

app = typer.Typer(add_completion=False, help=__doc__)
Folder = Annotated[Path, typer.Option(help="Checkpoints, logs and cached data.")]
Seed = Annotated[int, typer.Option(help="Decides data, initial weights and every draw.")]
Threads = Annotated[int, typer.Option(help="Torch threads; results repeat bitwise for the same number.")]
Minutes = Annotated[float | None, typer.Option(help="Stop (resumable) after this many minutes.")]


def _frames(folder: Path, seed: int, threads: int) -> tuple[data.FramePool, data.FramePool]:
    """Return the training and the held-out clips."""
    cache = folder / "data"
    return (
        data.load_frame_pool(seed, NUM_TRAINING_CLIPS, cache, threads),
        data.load_frame_pool(seed + data.HELDOUT_SEED_OFFSET, NUM_HELDOUT_CLIPS, cache),
    )


def vae_loss(vae: AutoencoderKLTemporalDecoder, generator: torch.Generator, *, frames: data.FramePool) -> torch.Tensor:
    """Return the loss of one batch of single frames of random clips."""
    num_clips, num_frames = frames.pixels.shape[:2]
    clips = torch.randint(num_clips, (VAE_IMAGES,), generator=generator)
    times = torch.randint(num_frames, (VAE_IMAGES,), generator=generator)
    pixels = data.to_model_range(frames.pixels[clips, times])[:, None]
    return losses.reconstruction_loss(vae, pixels, generator)


def decoder_loss(
    _: torch.nn.Module,
    generator: torch.Generator,
    *,
    vae: AutoencoderKLTemporalDecoder,
    frames: data.FramePool,
) -> torch.Tensor:
    """Return the loss of one random clip."""
    clip = torch.randint(len(frames.pixels), (1,), generator=generator)
    return losses.reconstruction_loss(vae, data.to_model_range(frames.pixels[clip]), generator)


def evaluate_vae(
    _: torch.nn.Module, *, vae: AutoencoderKLTemporalDecoder, frames: data.FramePool, num_frames: int
) -> dict[str, float]:
    """Return the held-out loss and the peak signal-to-noise ratio in dB, decoding `num_frames` at once."""
    pixels = data.to_model_range(frames.pixels[:8]).flatten(0, 1).unflatten(0, (-1, num_frames))
    loss = losses.reconstruction_loss(vae, pixels, torch.Generator().manual_seed(0))
    latents = vae.encode(pixels.flatten(0, 1)).latent_dist.mode()
    decoded = vae.decode(latents, num_frames=pixels.shape[1]).sample.clamp(-1, 1)
    errors = (decoded - pixels.flatten(0, 1)).square().mean(dim=(1, 2, 3)) / 4
    return {"heldout_loss": float(loss), "psnr_db": float(-10 * errors.log10().mean())}


def unet_loss(denoiser: config.Denoiser, generator: torch.Generator, *, pool: data.LatentPool) -> torch.Tensor:
    """Return the loss of one random batch of clips."""
    clips = torch.randint(len(pool), (BATCH_CLIPS,), generator=generator)
    shape = torch.Size((BATCH_CLIPS, *pool.latents.shape[1:]))
    return losses.denoising_losses(denoiser, pool, clips, losses.draw_noise(shape, generator)).mean()


def evaluate_unet(denoiser: config.Denoiser, *, pool: data.LatentPool) -> dict[str, float]:
    """Return the held-out loss over fixed noise, its noise levels at even quantiles of the training distribution."""
    noise = losses.even_noise(pool.latents.shape, losses.UNET_LEVELS)
    parts = [
        losses.denoising_losses(denoiser, pool, clips, noise[clips])
        for clips in torch.arange(len(pool)).split(BATCH_CLIPS)
    ]
    return {"heldout_loss": float(torch.cat(parts).mean())}


def dit_loss(
    denoiser: dit.TextDenoiser, generator: torch.Generator, *, pool: data.CaptionPool, batch: int = BATCH_CLIPS
) -> torch.Tensor:
    """Return the loss of one random batch of captioned clips."""
    clips = torch.randint(len(pool), (batch,), generator=generator)
    shape = torch.Size((batch, *pool.latents.shape[1:]))
    noise = losses.draw_noise(shape, generator, losses.DIT_LEVELS)
    return losses.text_denoising_losses(denoiser, pool, clips, noise).mean()


def evaluate_dit(denoiser: dit.TextDenoiser, *, pool: data.CaptionPool) -> dict[str, float]:
    """Return the held-out loss over fixed noise, and the same with the captions of other clips."""
    noise = losses.even_noise(pool.latents.shape, losses.DIT_LEVELS)
    exchanged = replace(pool, token_ids=pool.token_ids.roll(1, dims=0))
    figures = {}
    for name, asked in (("heldout_loss", pool), ("other_caption_loss", exchanged)):
        parts = [
            losses.text_denoising_losses(denoiser, asked, clips, noise[clips])
            for clips in torch.arange(len(pool)).split(BATCH_CLIPS)
        ]
        figures[name] = float(torch.cat(parts).mean())
    return figures


def _load_average(module: torch.nn.Module, folder: Path) -> int:
    """Load the averaged weights of a stage's checkpoint into `module`, frozen; return the checkpoint's step."""
    run = Run(module, FitOptions(folder, seed=0, steps=0, learning_rate=0.0))
    if not run.options.checkpoint.exists():
        raise typer.BadParameter(f"no checkpoint {run.options.checkpoint}; run the stage `{folder.name}` first")
    run.restore()
    run.average.apply()
    module.requires_grad_(False)
    return run.step


def image_vae(folder: Path, frames: data.FramePool) -> AutoencoderKLTemporalDecoder:
    """Return the autoencoder trained on images, its scaling factor measured on `frames`."""
    vae = config.make_vae(config.ModelConfig())
    _load_average(vae, folder / "vae")
    vae.register_to_config(scaling_factor=data.latent_scale(vae, frames))
    return vae


@app.command("vae")
def train_vae(
    folder: Folder = RUNS,
    seed: Seed = 0,
    threads: Threads = 1,
    steps: int = 3600,
    decay_steps: int = 900,
    minutes: Minutes = None,
    learning_rate: float = 1e-3,
) -> None:
    """Train the autoencoder on short clips."""
    torch.set_num_threads(threads)
    frames, heldout = _frames(folder, seed, threads)
    torch.manual_seed(seed)
    options = FitOptions(
        folder / "vae", seed, steps, learning_rate, decay_steps=decay_steps, ema_decay=0.98, minutes=minutes
    )
    vae = config.make_vae(config.ModelConfig())
    evaluate = functools.partial(evaluate_vae, vae=vae, frames=heldout, num_frames=1)
    fit(Run(vae, options), functools.partial(vae_loss, frames=frames), evaluate)


@app.command("decoder")
def train_decoder(
    folder: Folder = RUNS,
    seed: Seed = 0,
    threads: Threads = 1,
    steps: int = 600,
    decay_steps: int = 200,
    minutes: Minutes = None,
    learning_rate: float = 5e-4,
) -> None:
    """Tune the temporal decoder on whole clips, the encoder frozen; may run while the U-Net trains."""
    torch.set_num_threads(threads)
    frames, heldout = _frames(folder, seed, threads)
    vae = image_vae(folder, frames)
    vae.decoder.requires_grad_(True)
    options = FitOptions(
        folder / "decoder", seed, steps, learning_rate, decay_steps=decay_steps, ema_decay=0.98, minutes=minutes
    )
    evaluate = functools.partial(evaluate_vae, vae=vae, frames=heldout, num_frames=NUM_FRAMES)
    fit(Run(vae.decoder, options), functools.partial(decoder_loss, vae=vae, frames=frames), evaluate)


@app.command("unet")
def train_unet(
    folder: Folder = RUNS,
    seed: Seed = 0,
    threads: Threads = 1,
    steps: int = 12750,
    decay_steps: int = 1350,
    minutes: Minutes = None,
    learning_rate: float = 1e-3,
) -> None:
    """Train the U-Net and the image encoder on the autoencoder's latents."""
    torch.set_num_threads(threads)
    frames, heldout_frames = _frames(folder, seed, threads)
    vae = image_vae(folder, frames)
    pool = data.load_latent_pool(
        vae, frames, seed, folder / "data" / f"latents-{seed}-{len(frames.pixels)}.safetensors"
    )
    heldout = data.encode_pool(vae, heldout_frames, seed + data.HELDOUT_SEED_OFFSET)
    torch.manual_seed(seed)
    options = FitOptions(
        folder / "unet", seed, steps, learning_rate, decay_steps=decay_steps, evaluate_every=150, minutes=minutes
    )
    run = Run(config.Denoiser(config.ModelConfig()), options)
    fit(run, functools.partial(unet_loss, pool=pool), functools.partial(evaluate_unet, pool=heldout))


def shipped_vae() -> AutoencoderKLTemporalDecoder:
    """Return the exported autoencoder of the image-to-video model, in float32."""
    return AutoencoderKLTemporalDecoder.from_pretrained(MODEL_FOLDER, subfolder="vae", torch_dtype=torch.float32)


@app.command("dit")
def train_dit(
    folder: Folder = RUNS,
    seed: Seed = 0,
    threads: Threads = 1,
    steps: int = 12000,
    decay_steps: int = 3000,
    minutes: Minutes = None,
    learning_rate: float = 1.5e-3,
    batch: Annotated[int, typer.Option(help="Clips a step.")] = BATCH_CLIPS,
) -> None:
    """Train the transformer and the text encoder on captioned clips."""
    torch.set_num_threads(threads)
    vae = shipped_vae()
    pool = data.load_caption_pool(vae, seed, NUM_CAPTIONED_CLIPS, folder / "data")
    heldout = data.load_caption_pool(vae, seed + data.HELDOUT_SEED_OFFSET, NUM_HELDOUT_CLIPS, folder / "data")
    torch.manual_seed(seed)
    options = FitOptions(
        folder / "dit", seed, steps, learning_rate, decay_steps=decay_steps, evaluate_every=200, minutes=minutes
    )
    run = Run(dit.TextDenoiser(dit.DiTConfig()), options)
    fit(run, functools.partial(dit_loss, pool=pool, batch=batch), functools.partial(evaluate_dit, pool=heldout))


def _say_size(target: Path, step: int) -> None:
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    typer.echo(f"step {step}: wrote {size / 1e6:.2f} MB to {target.name}")


@app.command("export-dit")
def export_dit(folder: Folder = RUNS, target: Path = DIT_FOLDER) -> None:
    """Write the averaged weights of the text-to-video model as a float16 pipeline folder."""
    denoiser = dit.TextDenoiser(dit.DiTConfig())
    step = _load_average(denoiser, folder / "dit")
    pipeline = LattePipeline(
        tokenizer=dit.make_tokenizer(),
        text_encoder=denoiser.text_encoder.half(),
        vae=shipped_vae().half(),
        transformer=denoiser.transformer.half(),
        scheduler=config.make_scheduler(),
    )
    pipeline.save_pretrained(target)
    shutil.copytree(MODEL_FOLDER / "vae", target / "vae", dirs_exist_ok=True)  # saving writes where it was loaded from
    _say_size(target, step)


@app.command("export")
def export(folder: Folder = RUNS, seed: Seed = 0, threads: Threads = 1, target: Path = MODEL_FOLDER) -> None:
    """Write the averaged weights as a float16 pipeline folder."""
    torch.set_num_threads(threads)
    frames, _ = _frames(folder, seed, threads)
    vae = image_vae(folder, frames)
    _load_average(vae.decoder, folder / "decoder")
    denoiser = config.Denoiser(config.ModelConfig())
    step = _load_average(denoiser, folder / "unet")
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.half(),
        image_encoder=denoiser.image_encoder.half(),
        unet=denoiser.unet.half(),
        scheduler=config.make_scheduler(),
        feature_extractor=config.make_feature_extractor(),
    )
    pipeline.save_pretrained(target)
    _say_size(target, step)


if __name__ == "__main__":
    app()

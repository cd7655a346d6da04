"""The demo's pictures: videos, the side-by-side with its difference map, a contact sheet, a plot of the stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lightcache_fx.cli.demo_report import Comparison
from lightcache_fx.cli.stages import STAGES
from lightcache_fx.quality import Frames

PANEL = 256
"""Least pixels of a shown frame's height; smaller ones are enlarged by a whole factor."""
GAIN = 8
"""Differences are shown so many times as large."""
LOOPS = 4
"""How often the MP4 repeats the clip, which lasts about a second."""
SHEET_FRAMES = 8
"""On the contact sheet, at most."""
MARGIN, HEADER = 8, 32
PAPER, INK = (250, 250, 250), (30, 30, 30)
COLOURS = {"plain": "#7a8799", "accelerated": "#e0662f"}

Pixels = NDArray[np.uint8]
"""RGB: (frames, height, width, 3)."""


def to_pixels(frames: Frames) -> Pixels:
    """Map 0..1 to 0..255, enlarged so that single pixels can be seen."""
    factor = max(1, PANEL // frames.shape[1])
    return np.rint(frames * 255).clip(0, 255).astype(np.uint8).repeat(factor, axis=1).repeat(factor, axis=2)


def difference_map(plain: Frames, accelerated: Frames) -> Frames:
    """Colour the mean absolute difference of the channels, times `GAIN`: black where there is none."""
    difference = np.abs(plain - accelerated).mean(axis=-1) * GAIN
    coloured = mpl.colormaps["inferno"](difference.clip(0, 1))[..., :3]
    return np.asarray(coloured, dtype=np.float32)


def side_by_side(panels: Sequence[tuple[str, Pixels]]) -> Pixels:
    """Put labelled videos of one size next to each other."""
    num_frames, height, width, _ = panels[0][1].shape
    full_width = MARGIN + len(panels) * (width + MARGIN)
    full_height = HEADER + height + MARGIN
    # Even sides: the MP4's colours are stored for blocks of 2 x 2 pixels.
    sheet = Image.new("RGB", (full_width + full_width % 2, full_height + full_height % 2), PAPER)
    font = ImageFont.truetype(findfont("DejaVu Sans"), 15)
    draw = ImageDraw.Draw(sheet)
    lefts = [MARGIN + index * (width + MARGIN) for index in range(len(panels))]
    for left, (label, _) in zip(lefts, panels, strict=True):
        draw.text((left + width / 2, HEADER / 2), label, fill=INK, font=font, anchor="mm")
    video = np.asarray(sheet)[None].repeat(num_frames, axis=0)
    for left, (_, pixels) in zip(lefts, panels, strict=True):
        video[:, HEADER : HEADER + height, left : left + width] = pixels
    return video


def contact_sheet(panels: Sequence[tuple[str, Pixels]], most: int = SHEET_FRAMES) -> Image.Image:
    """Labelled videos of one size below each other, each a row of at most so many of its frames, evenly chosen."""
    num_frames, height, width, _ = panels[0][1].shape
    chosen = np.unique(np.linspace(0, num_frames - 1, min(most, num_frames)).round().astype(int))
    row = HEADER + height
    sheet = Image.new("RGB", (MARGIN + len(chosen) * (width + MARGIN), MARGIN + len(panels) * (row + MARGIN)), PAPER)
    font = ImageFont.truetype(findfont("DejaVu Sans"), 15)
    draw = ImageDraw.Draw(sheet)
    for number, (label, pixels) in enumerate(panels):
        top = MARGIN + number * (row + MARGIN)
        draw.text((MARGIN, top + HEADER / 2), label, fill=INK, font=font, anchor="lm")
        for place, frame in enumerate(chosen):
            sheet.paste(Image.fromarray(pixels[frame]), (MARGIN + place * (width + MARGIN), top + HEADER))
    return sheet


def write_gif(pixels: Pixels, path: Path, fps: int) -> None:
    """Write an endless GIF."""
    first, *others = [Image.fromarray(frame) for frame in pixels]
    first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)


def write_mp4(pixels: Pixels, path: Path, fps: int) -> None:
    """Write an H.264 video that every player shows."""
    iio.imwrite(path, pixels, plugin="FFMPEG", fps=fps, codec="libx264", quality=9, macro_block_size=2)


def write_videos(comparison: Comparison, folder: Path, fps: int) -> None:
    """Write the two GIFs, the side-by-side as GIF and MP4, and the contact sheet."""
    plain, accelerated = comparison.plain.frames, comparison.accelerated.frames
    seconds = comparison.accelerated.seconds["total"]
    panels = [
        (f"plain: {comparison.plain.seconds['total']:.2f} s", to_pixels(plain)),
        (f"accelerated: {seconds:.2f} s, {comparison.speedup('total'):.2f}×", to_pixels(accelerated)),
        (f"difference × {GAIN}", to_pixels(difference_map(plain, accelerated))),
    ]
    write_gif(panels[0][1], folder / "plain.gif", fps)
    write_gif(panels[1][1], folder / "accelerated.gif", fps)
    video = side_by_side(panels)
    write_gif(video, folder / "side_by_side.gif", fps)
    write_mp4(np.tile(video, (LOOPS, 1, 1, 1)), folder / "side_by_side.mp4", fps)
    contact_sheet(panels).save(folder / "contact_sheet.png", optimize=True)


def plot_stages(comparison: Comparison, path: Path) -> None:
    """Plot seconds and peak memory of each stage, plain beside accelerated."""
    variants = {"plain": comparison.plain, "accelerated": comparison.accelerated}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    _bars(time, {name: [v.seconds[stage] for stage in STAGES] for name, v in variants.items()}, "{:.2f}")
    _bars(memory, {name: [v.peak_bytes[stage] / 2**20 for stage in STAGES] for name, v in variants.items()}, "{:.1f}")
    time.set(title=f"time, {comparison.settings['steps']} steps", ylabel="seconds")
    memory.set(title="peak memory beside the weights", ylabel="MiB")
    time.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, heights: dict[str, list[float]], label: str) -> None:
    places = np.arange(len(STAGES))
    width = 0.38
    for index, (name, values) in enumerate(heights.items()):
        bars = axes.bar(places + (index - 0.5) * width, values, width, label=name, color=COLOURS[name])
        axes.bar_label(bars, fmt=label, padding=2, fontsize=9)
    axes.set_xticks(places, STAGES)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)

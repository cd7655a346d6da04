"""Contact sheets of clips and curves of training logs."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from examples.small_model.measures import Frames

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def sheet(pairs: list[tuple[Frames, Frames]], zoom: int = 3, gap: int = 4) -> Image.Image:
    """Lay out (real, generated) clips: one row of frames each, the real one above."""
    strips = []
    for pair in pairs:
        rows = [np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=255) for frames in pair]
        strips += [row.transpose(2, 0, 3, 1).reshape(row.shape[2], -1, 3) for row in rows]
        strips.append(np.full((gap, strips[-1].shape[1], 3), 255, dtype=np.uint8))
    picture = Image.fromarray(np.concatenate(strips[:-1]))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def plot_losses(logs: dict[str, Path], target: Path) -> None:
    """Plot training and held-out loss over steps, one panel a log."""
    figure, panels = plt.subplots(1, len(logs), figsize=(5 * len(logs), 3.2), squeeze=False)
    for panel, (title, path) in zip(panels[0], logs.items(), strict=True):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [record["step"] for record in records]
        panel.plot(steps, [record["train_loss"] for record in records], label="training", alpha=0.6)
        panel.plot(steps, [record["heldout_loss"] for record in records], label="held out, averaged weights")
        panel.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=90)


def captioned_sheet(clips: list[tuple[str, Frames]], zoom: int = 3) -> Image.Image:
    """Lay out clips, one row of frames each below its caption."""
    label_height = 14
    strips = [
        np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=255).transpose(2, 0, 3, 1)
        for _, frames in clips
    ]
    pictures = [Image.fromarray(strip.reshape(strip.shape[0], -1, 3)) for strip in strips]
    width, height = zoom * pictures[0].width, zoom * pictures[0].height
    picture = Image.new("RGB", (width, len(clips) * (height + label_height)), "white")
    draw = ImageDraw.Draw(picture)
    for number, ((prompt, _), row) in enumerate(zip(clips, pictures, strict=True)):
        top = number * (height + label_height)
        draw.text((2, top + 1), prompt, fill="black")
        picture.paste(row.resize((width, height), Image.Resampling.NEAREST), (0, top + label_height))
    return picture

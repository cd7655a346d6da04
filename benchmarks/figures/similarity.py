"""How alike the feature maps of each block stay from step to step (the LightCache paper's figure 2).

Each block's output is recorded by the compiler: it is what a cut at the block keeps, in a run whose steps are all full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import nn

import lightcache_fx as lc
from benchmarks.common import environment
from benchmarks.figures.style import FOLDER, written
from examples.small_model import sample, sample_dit
from examples.small_model.captions import caption

STEPS = 25


def record(module: nn.Module, install: Callable[[nn.Module], None], run: Callable[[], object]) -> lc.Recording:
    """What the blocks of a denoiser return at each step of one generation."""
    policy = lc.Policy(cache=lc.Cache(cut=lc.block_paths(module), interval=1))
    watched = lc.transform(module, policy)
    install(watched)
    with lc.record_kept(watched) as recording:
        run()
    install(module)
    return recording


def similarities(recordings: list[lc.Recording]) -> dict[str, list[list[float]]]:
    """The mean cosine similarity over generations, of each block's first result: (steps, steps) for each block."""
    names = [name for name in recordings[0].names if not name.endswith("]")]
    means = {name: torch.stack([each.similarity(name) for each in recordings]).mean(0) for name in names}
    return {name: [[round(float(x), 5) for x in row] for row in matrix] for name, matrix in means.items()}


def of_unet(clips: int) -> dict[str, Any]:
    """The small Stable-Video-Diffusion-shaped U-Net, on held-out first frames."""
    pipe = sample.load_pipeline()
    original, found = pipe.unet, []
    for index in range(clips):
        spec = sample.heldout_clip(index)

        def run(spec: Any = spec, index: int = index) -> None:
            sample.generate(pipe, spec, steps=STEPS, max_guidance_scale=1.5, seed=index)

        found.append(record(original, lambda module: setattr(pipe, "unet", module), run))
    return {"model": "U-Net: svd-sprites, Euler", "clips": clips, "similarity": similarities(found)}


def of_transformer(clips: int) -> dict[str, Any]:
    """The small Latte-shaped transformer, on held-out captions."""
    pipe = sample_dit.load_pipeline()
    original, found = pipe.transformer, []
    for index, spec in enumerate(sample_dit.heldout_clips(clips)):

        def run(spec: Any = spec, index: int = index) -> None:
            sample_dit.generate(pipe, caption(spec), steps=STEPS, guidance_scale=2.0, seed=index)

        found.append(record(original, lambda module: setattr(pipe, "transformer", module), run))
    return {"model": "DiT: latte-sprites, Euler", "clips": clips, "similarity": similarities(found)}


MODELS: Mapping[str, Callable[[int], dict[str, Any]]] = {"unet": of_unet, "dit": of_transformer}


def measure(clips: int) -> dict[str, Any]:
    """Both models; one that has not been trained is left out, and the result says why."""
    result: dict[str, Any] = {"environment": environment(), "steps": STEPS, "models": {}, "left_out": {}}
    for name, of_model in MODELS.items():
        try:
            result["models"][name] = of_model(clips)
        except FileNotFoundError as error:
            result["left_out"][name] = str(error)
    return result


def draw(result: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """One row a model: each block's likeness to the step before, and two blocks' likeness over all pairs of steps."""
    models = list(result["models"].values())
    with written("similarity", folder, figsize=(13, 4.4 * len(models))) as figure:
        grid = figure.subplots(len(models), 3, width_ratios=(1.5, 1, 1), squeeze=False)
        for model, row in zip(models, grid, strict=True):
            names = list(model["similarity"])
            matrices = {name: np.array(matrix) for name, matrix in model["similarity"].items()}
            before = np.array([np.diagonal(matrices[name], 1) for name in names])
            title = (
                f"{model['model']}, mean of {model['clips']} clips\neach block's output beside that of the step before"
            )
            image = _heat(row[0], before, title, least=float(np.floor(20 * before.min()) / 20))
            row[0].set(yticks=range(len(names)), yticklabels=names, xlabel="step")
            row[0].set_xticks(range(0, before.shape[1], 4), [str(step + 1) for step in range(0, before.shape[1], 4)])
            figure.colorbar(image, ax=row[0])
            least, most = names[int(before.mean(axis=1).argmax())], names[int(before.mean(axis=1).argmin())]
            for axes, name, changes in ((row[1], least, "least"), (row[2], most, "most")):
                image = _heat(axes, matrices[name], f"any two steps, changing {changes}:\n{name}")
                axes.set(xlabel="step", ylabel="step")
            figure.colorbar(image, ax=row[2], label="cosine similarity")


def _heat(axes: Axes, values: np.ndarray, title: str, least: float = 0.0) -> Any:
    axes.set_title(title)
    return axes.imshow(values, vmin=least, vmax=1, cmap="magma", aspect="auto", interpolation="nearest")

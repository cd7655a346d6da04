"""As people see it: FLIP, and LPIPS where its weights are on this machine. Neither downloads anything."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightcache_fx.quality.results import NotAvailable, PerFrame
from lightcache_fx.quality.videos import Frames

PIXELS_PER_DEGREE = 67.0
"""Of the viewer's field of view: a display of 3,840 pixels on 0.7 m, seen from 0.7 m; FLIP's default."""
LPIPS_MIN_SIZE = 32
"""Pixels of a side; AlexNet's poolings leave nothing of less."""


def flip(plain: Frames, accelerated: Frames) -> PerFrame | NotAvailable:
    """Mean LDR-FLIP error of each frame, 0 to 1, by the authors' package `flip-evaluator`.

    Source: Andersson et al., "FLIP: A Difference Evaluator for Alternating Images", HPG 2020.
    """
    module = _imported("flip_evaluator")
    if isinstance(module, NotAvailable):
        return module
    settings = {"ppd": PIXELS_PER_DEGREE}
    frames = [
        float(module.evaluate(a, b, "LDR", applyMagma=False, parameters=dict(settings))[1])
        for a, b in zip(_coloured(plain), _coloured(accelerated), strict=True)
    ]
    return PerFrame.of(frames, "lower")


def lpips(plain: Frames, accelerated: Frames) -> PerFrame | NotAvailable:
    """LPIPS 0.1 by AlexNet of each frame, by the authors' package `lpips`.

    AlexNet's weights are looked for where `torch.hub` keeps downloads, and must have the hash that their name gives.
    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018.
    """
    height, width = plain.shape[1:3]
    if min(height, width) < LPIPS_MIN_SIZE:
        return NotAvailable(not_available=f"frames of {width} x {height} are too small for AlexNet")
    weights = alexnet_weights()
    if isinstance(weights, NotAvailable):
        return weights
    model = _lpips_model(weights)
    pairs = zip(_coloured(plain), _coloured(accelerated), strict=True)
    with torch.no_grad():
        frames = [float(model(_tensor(a), _tensor(b), normalize=True)) for a, b in pairs]
    return PerFrame.of(frames, "lower")


def alexnet_weights() -> Path | NotAvailable:
    """The file with torchvision's AlexNet, if it and what reads it are here."""
    for package in ("torchvision.models", "lpips"):
        module = _imported(package)
        if isinstance(module, NotAvailable):
            return module
    name = str(_imported("torchvision.models").AlexNet_Weights.IMAGENET1K_V1.url).rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        return NotAvailable(
            not_available=f"AlexNet's weights, {name}, are not among torch.hub's checkpoints, and nothing is downloaded"
        )
    expected = path.stem.rpartition("-")[2]
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(expected):
        return NotAvailable(not_available=f"{name} among torch.hub's checkpoints does not have the hash in its name")
    return path


def _lpips_model(weights: Path) -> torch.nn.Module:
    """The package's model with AlexNet from a file; left to itself the package would download it."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of torchvision, about the arguments that the package passes to it
        model: torch.nn.Module = _imported("lpips").LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = torch.load(weights, map_location="cpu", weights_only=True)
    own = {name: name.split(".", 2) for name in model.state_dict() if name.startswith("net.")}
    parts = {name: f"features.{rest}" for name, (_, _, rest) in own.items()}  # net.slice2.3.weight: features.3.weight
    model.load_state_dict({name: trunk[part] for name, part in parts.items()}, strict=False)
    return model.eval()


def _tensor(frame: Frames) -> torch.Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1)[None]  # B C H W


def _coloured(video: Frames) -> Frames:
    """Grey as RGB."""
    return video if video.shape[-1] == 3 else np.repeat(video, 3, axis=-1)


def _imported(name: str) -> Any:
    """A module, or why there is none; torchvision of another build than torch fails as it is imported."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0].replace("_", "-")
        return NotAvailable(not_available=f"the package {missing} is not installed")
    except (ImportError, OSError, RuntimeError) as error:
        return NotAvailable(not_available=f"the package {package} cannot be imported: {str(error).splitlines()[0]}")

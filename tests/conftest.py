"""Settings that every test shares."""

from __future__ import annotations

import os
import shutil
import tempfile

import diffusers
import pytest
import torch

# Warnings of the libraries' own making, at places that a test cannot change.
UPSTREAM_WARNINGS = [
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",  # Chroma, of its own rotary embedding
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",  # Mochi, float32 autocast
    "ignore:Initializing zero-element tensors is a no-op:UserWarning",
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # Euler scheduler's sigmas
]


def pytest_configure(config: pytest.Config) -> None:
    for warning in UPSTREAM_WARNINGS:
        config.addinivalue_line("filterwarnings", warning)
    os.environ["LIGHTCACHE_FX_CACHE"] = tempfile.mkdtemp(
        prefix="lightcache_fx-tests-"
    )  # measurements stay out of ~/.cache
    torch.set_num_threads(1)  # small models; pytest-xdist takes the cores
    diffusers.utils.logging.set_verbosity_error()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["LIGHTCACHE_FX_CACHE"], ignore_errors=True)

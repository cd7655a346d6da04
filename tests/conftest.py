"""Settings that every test shares."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch._dynamo.backends.registry import _BACKENDS, _COMPILER_FNS, register_backend

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


@pytest.fixture
def backend() -> Iterator[Callable[[Callable[..., Any]], str]]:
    """Registers a function as a backend for the time of the test."""
    names: list[str] = []

    def register(function: Callable[..., Any]) -> str:
        names.append(f"test_backend_{len(names)}")
        register_backend(function, name=names[-1])
        return names[-1]

    yield register
    for name in names:
        _BACKENDS.pop(name, None)
        _COMPILER_FNS.pop(name, None)

"""Parts of programs that were compiled before a module was saved, found by what they compute and how arguments lie."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightcache_fx.errors import LoadError
from lightcache_fx.policy import Compile

Strides = tuple[Any, ...]
"""Of each argument of a part."""


def settings_text(settings: Compile) -> str:
    """What of the settings changes the code that is compiled."""
    return json.dumps({"mode": settings.mode, "options": settings.options}, sort_keys=True, default=repr)


def part_digest(settings: Compile, single: bool, structure: Hashable) -> str:
    """The same in every process for parts that compute the same and are compiled alike.

    Args:
        settings: by what it is compiled.
        single: whether it was made of a graph that returns one value and no tuple.
        structure: that of its graph, as `graph_key` has it.
    """
    return hashlib.sha256(repr((settings_text(settings), single, structure)).encode()).hexdigest()


@dataclass(frozen=True)
class Package:
    """A package of AOTInductor, checked.

    Attributes:
        part: digest of the part that it computes.
        strides: of the arguments that it takes.
        device: that it runs on.
        file: its name, for messages.
        content: of the file.
    """

    part: str
    strides: Strides
    device: torch.device
    file: str
    content: bytes


class Packages:
    """The packages of a loaded module. Their code is loaded by `open`, once all else of the module has been checked."""

    def __init__(self, packages: Sequence[Package]) -> None:
        self._packages = tuple(packages)
        self._parts = {package.part for package in packages}
        self._claimed: set[str] = set()
        self._runs: dict[tuple[str, Strides], Callable[..., Sequence[torch.Tensor]]] = {}

    def claim(self, part: str, program: str) -> None:
        """Note that a program has this part.

        Raises:
            LoadError: it is in no package.
        """
        if part not in self._parts:
            raise LoadError(
                f"program {program} has a part that none of the {len(self._packages)} packages is of: they were made of"
                f" other programs; save the module again, or load it without compiled=True"
            )
        self._claimed.add(part)

    def open(self) -> None:
        """Load the code of all packages.

        Raises:
            LoadError: a package is of no part, or cannot be loaded.
        """
        for package in self._packages:
            if package.part not in self._claimed:
                raise LoadError(
                    f"{package.file} is of a part that no program has: it was made of another module's; save the module"
                    f" again, or load it without compiled=True"
                )
        for package in self._packages:
            self._runs[package.part, package.strides] = _loaded(package)
        self._packages = ()

    def find(self, part: str, strides: Strides) -> Callable[..., Sequence[torch.Tensor]] | None:
        """What computes a part for arguments laid out so."""
        return self._runs.get((part, strides))


def _loaded(package: Package) -> Callable[..., Sequence[torch.Tensor]]:
    from torch._inductor import aoti_load_package  # a second to import

    index = package.device.index if package.device.type != "cpu" else -1
    with tempfile.TemporaryDirectory() as folder:  # the bytes that were checked, which nobody else can change now
        path = Path(folder) / "part.pt2"
        path.write_bytes(package.content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = aoti_load_package(str(path), device_index=index)
        except Exception as error:
            raise LoadError(
                f"{package.file} cannot be loaded by torch: {type(error).__name__}: {str(error)[:300]}; save the module"
                f" again, or load it without compiled=True"
            ) from error

    def run(*args: torch.Tensor) -> Sequence[torch.Tensor]:
        results: Sequence[torch.Tensor] = model.loader.boxed_run(list(args))
        return results

    return run

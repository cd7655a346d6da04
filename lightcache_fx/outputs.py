"""Result classes that models return and torch does not know how to take apart.

torch.export and the programs see a result as a tree of tensors. diffusers registers its output dataclasses; the
distribution that autoencoders return from `encode` is registered here, once diffusers is there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree


def register_distributions() -> None:
    """Let `DiagonalGaussianDistribution` be taken apart into its parameters; does nothing the second time."""
    module = sys.modules.get("diffusers.models.autoencoders.vae")
    if module is None or module.DiagonalGaussianDistribution in pytree.SUPPORTED_NODES:
        return
    kind = module.DiagonalGaussianDistribution

    def flatten(value: Any) -> tuple[list[Any], bool]:
        return [value.parameters], value.deterministic

    def unflatten(parts: Iterable[Any], deterministic: bool) -> Any:
        (parameters,) = parts
        if not isinstance(parameters, torch.Tensor):  # torch rebuilds trees of other things, to compare structures
            rebuilt = object.__new__(kind)
            vars(rebuilt).update(parameters=parameters, deterministic=deterministic)
            return rebuilt
        return kind(parameters, deterministic)

    pytree.register_pytree_node(kind, flatten, unflatten, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")

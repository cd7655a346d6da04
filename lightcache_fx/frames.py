"""An autoencoder's frames a few at a time: handed out as they finish, or decoded apart though they depend on others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightcache_fx.errors import ArgumentError

Call = tuple[tuple[Any, ...], dict[str, Any]]
_COUNT = "num_frames"
"""How decoders that mix frames call the number of frames of each video in a batch of frames."""


def calls_for_slices(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], frames: int) -> Iterator[Call]:
    """The calls of `decode` that decode the same latents, at most `frames` of one video at a time.

    Args:
        module: the autoencoder.
        args: of the whole call; the first is the latents, (frames, channels, height, width), or more videos of
            `num_frames` frames one after the other.
        kwargs: of the whole call.
        frames: at least 1.

    Raises:
        ArgumentError: the latents have no such shape, or do not divide into videos of `num_frames`.
    """
    bound = inspect.signature(type(module).decode).bind(module, *args, **kwargs)  # type: ignore[attr-defined]
    _, latents_name, *_ = bound.arguments
    latents = bound.arguments[latents_name]
    if not isinstance(latents, torch.Tensor) or latents.dim() != 4:
        shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ArgumentError(
            f"decode: {latents_name} are taken a few frames at a time where they are (frames, channels, height, width),"
            f" got {shape}; a decoder of whole videos mixes frames in time: give Decode(budget=...) instead of frames"
        )
    length = bound.arguments.get(_COUNT)
    video = length if isinstance(length, int) else len(latents)
    if video < 1 or len(latents) % video:
        raise ArgumentError(f"decode: {len(latents)} latents do not divide into videos of {_COUNT}={length}")
    for part in (part for whole in latents.split(video) for part in whole.split(frames)):
        bound.arguments[latents_name] = part
        if length is not None:
            bound.arguments[_COUNT] = len(part)
        yield bound.args[1:], dict(bound.kwargs)


def decode_apart(run: Callable[[Sequence[Any], Mapping[str, Any]], Any], calls: Iterator[Call]) -> Any:
    """The results of several calls as one, joined along their first dimension."""
    results = [run(args, kwargs) for args, kwargs in calls]
    return pytree.tree_map(lambda *parts: torch.cat(parts), *results)

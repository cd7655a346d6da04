"""The ways in which `benchmarks.systems` runs a pipeline: plain, by others' caches and memory savers, and by ours.

Each is switched on through its public interface. What a way does not support is a `Skip` with the reason; what it says
itself when it fails is reported as it stands.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lightcache_fx as lc
from benchmarks.graphs import cache_dit_config, first_block_config, taylor_seer_config
from benchmarks.swap_gpu import offload_groups, offload_models, remove_hooks
from lightcache_fx.cli.stages import denoiser_of


class Skip(Exception):  # noqa: N818 - no error: a way that does not apply
    """A way does not support a system, or the device; its text is the reason."""


@dataclass(frozen=True)
class Setup:
    """What a way is given.

    Attributes:
        pipe: with its weights where the device is.
        policy: of ours, everything on; its cache says the interval for others as well.
        device: to run on.
    """

    pipe: Any
    policy: lc.Policy
    device: torch.device

    @property
    def interval(self) -> int:
        """One step in so many is full."""
        assert self.policy.cache is not None
        return self.policy.cache.interval or 1

    def only(self, component: str, why: str) -> Any:
        """The denoiser, if it is that component.

        Raises:
            Skip: it is not.
        """
        if component not in self.pipe.components:
            raise Skip(f"{why}; {type(denoiser_of(self.pipe)).__name__} is none")
        return self.pipe.components[component]


Applied = tuple[Any, Callable[[], None]]
"""The pipeline to call, and what makes it forget what it keeps between generations."""


def _nothing() -> None:
    """Nothing is kept."""


@contextmanager
def plain(setup: Setup) -> Iterator[Applied]:
    """Diffusers as it is."""
    yield setup.pipe, _nothing


@contextmanager
def deepcache(setup: Setup) -> Iterator[Applied]:
    """The package `DeepCache`, at the same interval and branch 0."""
    setup.only("unet", "it caches U-Nets")
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=setup.pipe)
    helper.set_params(cache_interval=setup.interval, cache_branch_id=0)
    helper.enable()

    def forget() -> None:
        helper.disable()
        helper.enable()

    try:
        yield setup.pipe, forget
    finally:
        helper.disable()


@contextmanager
def _ours(setup: Setup, policy: lc.Policy) -> Iterator[Applied]:
    fast = lc.transform_pipeline(setup.pipe, policy)
    try:
        yield fast, lambda: lc.reset(denoiser_of(fast))
    finally:
        lc.restore(fast)


@contextmanager
def fme(setup: Setup) -> Iterator[Applied]:
    """FME's chunks with right arithmetic (`Policy.fme`), no cache; decoding as in ours where frames depend."""
    policy = lc.Policy.fme()
    if setup.policy.decode is not None:
        policy = policy.model_copy(update={"decode": setup.policy.decode})
    with _ours(setup, policy) as applied:
        yield applied


@contextmanager
def cached(setup: Setup) -> Iterator[Applied]:
    """Ours, the cache alone."""
    with _ours(setup, lc.Policy(cache=setup.policy.cache)) as applied:
        yield applied


@contextmanager
def lightcache(setup: Setup) -> Iterator[Applied]:
    """Ours: cache, swap, chunk and slice (`Policy.lightcache`)."""
    policy = setup.policy
    if setup.device.type == "cuda":
        setup.pipe.to("cpu", silence_dtype_warnings=True)
        policy = policy.model_copy(update={"swap": lc.Swap(device=str(setup.device))})
    with _ours(setup, policy) as applied:
        yield applied


@contextmanager
def lightcache_no_swap(setup: Setup) -> Iterator[Applied]:
    """Ours: cache, chunk and slice, all weights where they are (`Policy.lightcache(..., swap=False)`)."""
    with _ours(setup, setup.policy.model_copy(update={"swap": None})) as applied:
        yield applied


@contextmanager
def _of_the_autoencoder(setup: Setup, name: str) -> Iterator[Applied]:
    vae = setup.pipe.vae
    try:
        getattr(vae, f"enable_{name}")()
    except (AttributeError, NotImplementedError):
        raise Skip(f"{type(vae).__name__} has no enable_{name}") from None
    yield setup.pipe, _nothing


@contextmanager
def vae_slicing(setup: Setup) -> Iterator[Applied]:
    """Diffusers' sliced decoding."""
    with _of_the_autoencoder(setup, "slicing") as applied:
        yield applied


@contextmanager
def vae_tiling(setup: Setup) -> Iterator[Applied]:
    """Diffusers' tiled decoding, which is approximate."""
    with _of_the_autoencoder(setup, "tiling") as applied:
        yield applied


@contextmanager
def _offloaded(setup: Setup, offload: Callable[[Any, torch.device], None]) -> Iterator[Applied]:
    if setup.device.type == "cpu":
        raise Skip("it moves weights to an accelerator, and there is none")
    setup.pipe.to("cpu", silence_dtype_warnings=True)
    offload(setup.pipe, setup.device)
    try:
        yield setup.pipe, _nothing
    finally:
        remove_hooks(setup.pipe)


@contextmanager
def model_offload(setup: Setup) -> Iterator[Applied]:
    """Diffusers' `enable_model_cpu_offload`."""
    with _offloaded(setup, offload_models) as applied:
        yield applied


@contextmanager
def group_offload(setup: Setup) -> Iterator[Applied]:
    """Diffusers' `apply_group_offloading`, by leaves, with a stream."""
    with _offloaded(setup, offload_groups) as applied:
        yield applied


@contextmanager
def _hooked(setup: Setup, apply: Callable[[nn.Module, Any], None], config: Any) -> Iterator[Applied]:
    """Diffusers' caches, which are hooks on the modules of a transformer."""
    model = setup.only("transformer", "it caches transformers")
    before = _hooks_of(model)
    apply(model, config)
    if _hooks_of(model) == before:
        raise Skip(f"it finds nothing to cache in {type(model).__name__}")

    def forget() -> None:
        for module in model.modules():
            if (registry := vars(module).get("_diffusers_hook")) is not None:
                registry.reset_stateful_hooks(recurse=False)

    try:
        yield setup.pipe, forget
    finally:
        remove_hooks(setup.pipe)


def _hooks_of(model: nn.Module) -> int:
    registries = (vars(module).get("_diffusers_hook") for module in model.modules())
    return sum(len(registry.hooks) for registry in registries if registry is not None)


@contextmanager
def first_block_cache(setup: Setup) -> Iterator[Applied]:
    """Diffusers' FirstBlockCache, threshold 0.2."""
    from diffusers.hooks import apply_first_block_cache

    with _hooked(setup, apply_first_block_cache, first_block_config()) as applied:
        yield applied


@contextmanager
def taylor_seer(setup: Setup) -> Iterator[Applied]:
    """Diffusers' TaylorSeer, at interval 3."""
    from diffusers.hooks import apply_taylorseer_cache

    with _hooked(setup, apply_taylorseer_cache, taylor_seer_config()) as applied:
        yield applied


@contextmanager
def pab(setup: Setup) -> Iterator[Applied]:
    """Diffusers' Pyramid Attention Broadcast, attention of every 2nd step between timesteps 100 and 800."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    def timestep() -> int:
        scheduler = setup.pipe.scheduler
        return int(scheduler.timesteps[scheduler.step_index or 0])

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 800),
        current_timestep_callback=timestep,
    )
    with _hooked(setup, apply_pyramid_attention_broadcast, config) as applied:
        yield applied


@contextmanager
def cache_dit(setup: Setup) -> Iterator[Applied]:
    """The package cache-dit, DBCache."""
    setup.only("transformer", "it caches transformers")
    if importlib.util.find_spec("cache_dit") is None:
        raise Skip("cache-dit is not installed: pip install 'lightcache-fx[bench]'")
    import cache_dit as peer

    peer.enable_cache(setup.pipe, cache_config=cache_dit_config())
    try:
        yield setup.pipe, _nothing
    finally:
        peer.disable_cache(setup.pipe)


@contextmanager
def torch_compile(setup: Setup) -> Iterator[Applied]:
    """`torch.compile` of the denoiser, by Inductor, no cache."""
    torch.compiler.reset()
    name = "unet" if "unet" in setup.pipe.components else "transformer"
    setattr(setup.pipe, name, torch.compile(denoiser_of(setup.pipe)))
    try:
        yield setup.pipe, _nothing
    finally:
        torch.compiler.reset()


WAYS: Mapping[str, Callable[[Setup], Any]] = {
    "plain": plain,
    "deepcache": deepcache,
    "fme": fme,
    "vae-slicing": vae_slicing,
    "vae-tiling": vae_tiling,
    "model-offload": model_offload,
    "group-offload": group_offload,
    "first-block-cache": first_block_cache,
    "taylor-seer": taylor_seer,
    "pab": pab,
    "cache-dit": cache_dit,
    "torch-compile": torch_compile,
    "cached": cached,
    "lightcache-no-swap": lightcache_no_swap,
    "lightcache": lightcache,
}
OURS = ("fme", "cached", "lightcache-no-swap", "lightcache")
"""What runs this package's code."""

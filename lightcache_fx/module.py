"""`transform`: the drop-in module that a pipeline takes in place of its denoiser."""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightcache_fx.budgets import with_memory
from lightcache_fx.calls import CallReader
from lightcache_fx.capture import Capture, capture
from lightcache_fx.capture_lock import CAPTURE_LOCK
from lightcache_fx.compiler import Compiler
from lightcache_fx.cuts import paths_to_mark
from lightcache_fx.errors import ArgumentError, TransformError
from lightcache_fx.fetching import WeightsAway
from lightcache_fx.frames import calls_for_slices, decode_apart
from lightcache_fx.hardware import Hardware
from lightcache_fx.ledger import Ledger
from lightcache_fx.outputs import register_distributions
from lightcache_fx.placement import placement_of
from lightcache_fx.plan import Plan, make_plan
from lightcache_fx.policy import Policy
from lightcache_fx.repertoire import homes_of
from lightcache_fx.runs import branch_name
from lightcache_fx.runtime import Runtime
from lightcache_fx.saved_weights import SavedWeights
from lightcache_fx.views import second_view

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)
_UNTRANSFORMED = Policy()
_AUTOENCODER_METHODS = ("decode", "encode")


_COMPILED_OUTSIDE = (
    "torch.compile around a transformed module compiles nothing, since its programs are graphs already; pass"
    " Policy(compile=True) to transform, or use torch.compile(module, backend='lightcache') on the original"
)


def _untraced() -> Callable[..., Any]:
    """Calls a function without Dynamo, for modules that are called from what `torch.compile` compiles; says so once."""
    told: list[bool] = []

    def run(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not told:
            log.warning(_COMPILED_OUTSIDE)
            told.append(True)
        return function(*args, **kwargs)

    return torch.compiler.disable(run, reason=_COMPILED_OUTSIDE)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Added:
    """What a transformed module has beside its original's attributes."""

    original: nn.Module
    policy: Policy
    runtimes: Mapping[str, Runtime]

    @property
    def runtime(self) -> Runtime:
        """That of the main method: forward, or an autoencoder's decode."""
        return next(iter(self.runtimes.values()))


class TransformedModule(nn.Module):
    """Mixin of every transformed module; its other base is the class of the original.

    Parameters, buffers, submodules, `config`, hooks and attributes are the original's own, so `state_dict`, `to`,
    `save_pretrained` and adapters work on both alike. Only `forward` differs: it runs programs.
    """

    __slots__ = ()
    _lightcache: Added
    _untraced: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As every module's; it waits for a capture in another thread before the first hook runs."""
        if torch.compiler.is_dynamo_compiling():
            return self._untraced(super().__call__, args, kwargs)
        with CAPTURE_LOCK.running():
            return super().__call__(*args, **kwargs)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Name the guidance branch of the calls made inside, as diffusers' pipelines do around each pass."""
        with branch_name(name):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return transform(copy.deepcopy(self._lightcache.original, memo), self._lightcache.policy)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TransformError(
            "a transformed module cannot be pickled; pickle lightcache_fx.restore(module), or its state_dict"
        )


def transform(module: M, policy: Policy = _UNTRANSFORMED) -> M:
    """A drop-in for `module` that runs static programs instead of its forward.

    Nothing is captured before the first call with a new signature (tree, shapes, dtypes, devices, other arguments,
    module structure). The original is untouched and shares all its weights with the drop-in.

    Args:
        module: a denoiser, or any module, in evaluation mode when called; called with a latent and a timestep.
        policy: what to do; `Policy()` changes nothing in the results, bitwise.

    Returns:
        an instance of a subclass of the module's class.

    Raises:
        ArgumentError: `module` is no `nn.Module`, `policy` is no `Policy`, or its rates name no parameter of forward.
        TransformError: it is transformed already, something has replaced its forward on the instance, or the policy
            swaps to a device that there is none of, or that the weights cannot be used from.
        CutError: the policy cuts at a module path that does not exist.
    """
    return transform_component(module, policy, Ledger())


def transform_component(module: M, policy: Policy, ledger: Ledger, *, may_stay_eager: bool = False) -> M:
    """As `transform`, for one of several modules that have the device in turns.

    Args:
        module: as for `transform`.
        policy: as for `transform`.
        ledger: shared by these modules.
        may_stay_eager: whether a module that cannot be captured runs as it is, its weights fetched as a whole.
    """
    _check_module("transform", module)
    if not isinstance(policy, Policy):
        raise ArgumentError(
            f"transform: policy must be a lightcache_fx.Policy, got {type(policy).__name__}; read files with"
            f" Policy.from_yaml"
        )
    if isinstance(module, TransformedModule):
        raise TransformError(
            f"transform: this {type(module).__name__} is transformed already; call lightcache_fx.restore(module)"
            f" first, or pass the original"
        )
    if _forward_is_replaced(module):
        raise TransformError(
            f"transform: forward of this {type(module).__name__} has been replaced on the instance (offload hooks"
            f" and some cache"
            f" helpers do that); remove these hooks first, and enable them on the transformed module"
        )
    if not is_autoencoder(module):
        policy = policy.resolved(module)
    methods = _AUTOENCODER_METHODS if is_autoencoder(module) else ("forward",)
    homes = homes_of(module, policy)
    runtimes = {
        method: Runtime(
            Compiler(module, policy_for(module, policy, method), method, homes=homes, ledger=ledger),
            may_stay_eager=may_stay_eager,
        )
        for method in methods
    }
    return second_view(module, module_mixin(type(module), methods), Added(module, policy, runtimes))


def policy_for(module: nn.Module, policy: Policy, method: str) -> Policy:
    """What of a policy applies to a method of a module."""
    return policy.of_autoencoder(method) if is_autoencoder(module) else policy


def is_autoencoder(module: nn.Module | type[nn.Module]) -> bool:
    """Whether a module, or those of a class, are used through `decode` and `encode` and not through their forward."""
    cls = module if isinstance(module, type) else type(module)
    return all(callable(getattr(cls, name, None)) for name in _AUTOENCODER_METHODS)


def _forward_is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's; what removed hooks leave behind is cleared away."""
    found = vars(module).get("forward")
    if isinstance(found, types.MethodType) and found.__self__ is module and found.__func__ is type(module).forward:
        del vars(module)["forward"]
        return False
    return found is not None


def module_mixin(
    cls: type[nn.Module], methods: Sequence[str], base: type[TransformedModule] = TransformedModule
) -> type[TransformedModule]:
    """The mixin with methods that show the signatures of the original's, since pipelines inspect them."""

    def by_programs(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(cls, name))
        def method(self: TransformedModule, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                return self._untraced(partial(method, self), args, kwargs)
            added = self._lightcache
            decode = added.policy.decode
            if name == "decode" and decode is not None and decode.approximate:
                return decode_apart(added.runtime, calls_for_slices(added.original, args, kwargs, decode.frames or 1))
            return added.runtimes[name](args, kwargs)

        return method

    namespace = {name: by_programs(name) for name in methods}
    untraced = staticmethod(_untraced())
    return type(base.__name__, (base,), {"__slots__": (), "_untraced": untraced, **namespace})


def restore_module(module: M) -> M:
    """The very module that was given to `transform`, its weights on the device that they were on."""
    if not isinstance(module, TransformedModule):
        raise TransformError(f"restore: this {type(module).__name__} is not transformed")
    if _forward_is_replaced(module):
        raise TransformError(
            f"restore: hooks that replace forward were put on this {type(module).__name__} after transform; remove"
            f" them first (pipe.remove_all_hooks(), or accelerate.hooks.remove_hook_from_module)"
        )
    original: Any = module._lightcache.original
    if isinstance(original, SavedWeights):
        raise TransformError(
            f"restore: this {type(module).__name__} was loaded from a folder, so there is no original; make it by its"
            f" own class, and load_state_dict(module.state_dict())"
        )
    module._lightcache.runtime.recall()
    return original  # type: ignore[no-any-return]


def _behind_dynamo(module: nn.Module) -> list[Runtime]:
    """What runs a module that was given to `torch.compile` with this package's backend; the latest first."""
    from lightcache_fx.backend import graphs_of

    graphs = graphs_of(getattr(module, "_orig_mod", module))
    return [graph.runtime for graph in reversed(graphs) if graph.runtime is not None]


def runtime_of(module: nn.Module, method: str | None = None) -> Runtime:
    """The runtime of a transformed module's method, by default of its main one."""
    _check_module("inspect", module)
    if not isinstance(module, TransformedModule) and (found := _behind_dynamo(module)):
        return found[0]
    if isinstance(original := getattr(module, "_orig_mod", None), nn.Module):
        raise TransformError(
            f"inspect: no program of this compiled {type(original).__name__} has run; compile it with"
            f" torch.compile(..., backend='lightcache'), and call it once"
        )
    if not isinstance(module, TransformedModule):
        raise TransformError(
            f"inspect: this {type(module).__name__} is not transformed; call lightcache_fx.transform on it"
        )
    runtimes = module._lightcache.runtimes
    if method is not None and method not in runtimes:
        raise ArgumentError(f"inspect: {type(module).__name__} runs {', '.join(runtimes)} by programs, not {method!r}")
    return module._lightcache.runtime if method is None else runtimes[method]


def decode_frames(vae: nn.Module, *args: Any, **kwargs: Any) -> Iterator[torch.Tensor]:
    """Decode a few frames at a time and hand each part out as it is done, so that the video is never held whole.

        vae = transform(vae, Policy(decode=Decode(frames=1)))
        for part in decode_frames(vae, latents / vae.config.scaling_factor):
            video.append(part.cpu())

    Args:
        vae: a transformed autoencoder; its policy's `Decode` says how many frames a part has.
        args: as for its `decode`; the latents are (frames, channels, height, width).
        kwargs: as for its `decode`.

    Returns:
        an iterator over (at most `frames`, channels, height, width), in order.

    Raises:
        ArgumentError: `vae` is not transformed so, or the latents have another shape.
        RegionError: frames depend on each other, and the policy does not say `approximate`.
    """
    policy = vae._lightcache.policy.decode if isinstance(vae, TransformedModule) else None
    if not isinstance(vae, TransformedModule) or policy is None or policy.budget is not None:
        raise ArgumentError(
            f"decode_frames: expected an autoencoder that was transformed with Policy(decode=Decode(frames=...)), got"
            f" {type(vae).__name__}" + (f" with {policy!r}" if policy is not None else "")
        )
    added, frames = vae._lightcache, policy.frames or 1
    calls = partial(calls_for_slices, added.original, args, kwargs)
    if not policy.approximate:
        two_slices = next(calls(2 * frames))  # planning them refuses frames that depend on each other
        added.runtime.compile(added.runtime.reader.read(*two_slices))
    parts = (added.runtime(*call) for call in calls(frames))
    return (next(leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)) for part in parts)


def reset(module: nn.Module) -> None:
    """Forget the calling thread's run: slots and hoisted values are freed, and the next call begins a run."""
    first = runtime_of(module)
    runtimes = module._lightcache.runtimes.values() if isinstance(module, TransformedModule) else [first]
    for runtime in runtimes:
        runtime.tracker.reset()


def plan(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    policy: Policy = _UNTRANSFORMED,
    *,
    method: str | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    hardware: Hardware | None = None,
) -> Plan:
    """What `transform` would do for one call.

    Works from fake tensors and on the meta device, with no weights allocated.

    Args:
        module: in evaluation mode, its weights real, fake or on the meta device.
        args: the call's positional arguments, of the same kind.
        kwargs: its keyword arguments.
        policy: as for `transform`.
        method: which method is called; by default forward, or an autoencoder's decode.
        device: predict memory for this kind of device; by default for the one that the tensors are on.
        hardware: what the machine computes and copies in a second; by default as measured here, or as is typical.

    Raises:
        CaptureError, CutError, ScheduleError, BudgetError, RegionError, ArgumentError, TransformError, SwapError: as
            `transform`, or the transformed module on its first call, would.
    """
    _, found = capture_and_plan(module, args, kwargs, policy, method=method, device=device, hardware=hardware)
    return found


def capture_and_plan(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    policy: Policy,
    *,
    method: str | None,
    device: Literal["cpu", "cuda"] | None,
    hardware: Hardware | None,
    takes_turns: bool = False,
) -> tuple[Capture, Plan]:
    """As `plan`, with the capture that `build_programs` makes programs of.

    `takes_turns` where the module has the device in turns with others.
    """
    register_distributions()
    _check_module("plan", module)
    if isinstance(module, TransformedModule):
        module = module._lightcache.original
    if device not in (None, "cpu", "cuda"):
        raise ArgumentError(
            f"plan: device must be 'cpu' or 'cuda', the kind that memory is predicted for, got {device!r}"
        )
    if method is not None and not callable(getattr(type(module), method, None)):
        raise ArgumentError(f"plan: {type(module).__name__} has no method {method!r}; leave it out for the main one")
    if method is None:
        method = "decode" if is_autoencoder(module) else "forward"
    policy = policy_for(module, policy, method).resolved(module)
    reader = CallReader(module, rates=policy.rates, method=method)
    marked = paths_to_mark(policy.caches, module)
    call = reader.read(tuple(args), dict(kwargs or {}))
    placement = placement_of(module, policy)
    computes_on = placement.device_for(reader.owner, call.tensors)
    away = WeightsAway(computes_on) if placement.hosted and computes_on.type != "cpu" else None
    captured = capture(module, call, mark=marked, away=away)
    on_cuda = None if device is None else device == "cuda"
    found = with_memory(
        captured, make_plan(captured, policy, module), cuda=on_cuda, hardware=hardware, takes_turns=takes_turns
    )
    return captured, found


def _check_module(function: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise ArgumentError(
            f"{function}: expected a torch.nn.Module, got {type(module).__name__}; for a whole pipeline use"
            f" transform_pipeline"
        )

"""`torch.compile(model, backend="lightcache")`: the same passes behind Dynamo, whose guards say what is compiled anew.

Dynamo gives a graph of the model's forward. It becomes a module that looks like the model (`graph_model`), and that one
is captured, planned and run as any other: the same programs, schedule and rules about state as by `transform`.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from lightcache_fx.compiler import Compiler
from lightcache_fx.dynamo_sources import Frame
from lightcache_fx.errors import ArgumentError, PolicyError, TransformError
from lightcache_fx.graph_model import GraphModel, graph_model
from lightcache_fx.ledger import Ledger
from lightcache_fx.module import is_autoencoder
from lightcache_fx.policy import Compile, Policy
from lightcache_fx.runtime import Runtime, ThreadState

log = logging.getLogger(__name__)


def backend(policy: Policy | None = None) -> Callable[..., Callable[..., Any]]:
    """A backend for `torch.compile` that runs a model by programs.

        unet = torch.compile(unet, backend=lightcache_fx.backend(Policy.deepcache(interval=3)))

    What a policy says about compiling is the compiler behind the programs: Inductor by default, `compile="eager"` for
    none. A model that Dynamo breaks into several graphs runs without a cache, since its parts do not know the step.
    Results are without gradients.

    Args:
        policy: as for `transform`; the modules' paths are those of the compiled model.

    Raises:
        ArgumentError: `policy` is no `Policy`.
    """
    if policy is not None and not isinstance(policy, Policy):
        raise ArgumentError(
            f"backend: policy must be a lightcache_fx.Policy, got {type(policy).__name__}; options by name go to"
            f" torch.compile(..., backend='lightcache', options=...)"
        )

    def lightcache_backend(graph_module: fx.GraphModule, inputs: Sequence[Any], **_: object) -> Callable[..., Any]:
        return CompiledGraph(graph_module, inputs, lambda: policy or Policy())

    return lightcache_backend


def lightcache(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that is registered as `lightcache`; PyTorch calls it.

    Args:
        graph_module: Dynamo's graph.
        inputs: an example of each of its inputs.
        mode: of Inductor, as `torch.compile` takes it.
        options: a `Policy` by its fields, or as `{"policy": Policy(...)}`.

    Raises:
        PolicyError: the options are no policy; raised by the first call of the compiled model, as it is.
    """

    def policy() -> Policy:
        given = dict(options or {})
        found = given.pop("policy", None)
        if found is not None and (given or not isinstance(found, Policy)):
            raise PolicyError(
                f"options: 'policy' must be a lightcache_fx.Policy and stand alone, got {type(found).__name__}"
                + (f" beside {', '.join(map(repr, given))}" if given else "")
            )
        made = found if found is not None else Policy(**given)
        if mode in (None, "default"):
            return made
        if made.compile is not None:
            raise PolicyError(f"mode={mode!r}: the options say how to compile already; put the mode into compile=...")
        return made.model_copy(update={"compile": Compile(mode=mode)})  # type: ignore[arg-type]

    return CompiledGraph(graph_module, inputs, policy)


class _Model:
    """What the graphs of one model have in common: a run goes on in another one when a size changes."""

    def __init__(self) -> None:
        self.local = ThreadState()
        self.ledger = Ledger()
        self.graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


_MODELS: weakref.WeakValueDictionary[tuple[int, str], _Model] = weakref.WeakValueDictionary()
"""By the identity of a weight, which the model's graphs keep alive, and the policy."""


_NUMBERS = itertools.count()


class CompiledGraph:
    """What the backend makes of one graph; called with its inputs, weights among them.

    Args:
        graph_module: Dynamo's graph.
        inputs: an example of each of its inputs.
        policy: says what to do; asked at the first call, so that its errors reach the caller as they are.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any], policy: Callable[[], Policy]) -> None:
        frame = Frame.current()
        reason = getattr(graph_module, "compile_subgraph_reason", None)
        self.model: GraphModel = graph_model(graph_module, inputs, frame)
        self.runtime: Runtime | None = None
        self.number = next(_NUMBERS)
        self._policy = policy
        self._broken = getattr(reason, "graph_break", False) or frame.is_rest
        self._reason = str(getattr(reason, "reason", "")).strip().partition("\n")[0]
        self._shared: _Model | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph's programs."""
        if torch.is_grad_enabled():
            for place, value in zip(self.model.places, inputs, strict=True):
                if place.kind == "argument" and isinstance(value, torch.Tensor) and value.requires_grad:
                    raise TransformError(
                        f"lightcache: argument {place.name} requires a gradient, and programs have none; call the model"
                        f" under torch.no_grad(), or compile it for training by another backend"
                    )
        if self.runtime is None:
            self.runtime = self._make_runtime()
        return self.runtime((), self.model.bind(inputs))

    def _make_runtime(self) -> Runtime:
        policy, model = self._policy(), self.model
        if policy.compile is None:
            policy = policy.model_copy(update={"compile": Compile()})
        if policy.calibration is not None:
            raise PolicyError(
                "calibration: it is of a model, and behind torch.compile there is only its graph; compile with the"
                " cache that it gives, as in options={'policy': Calibration.load(FILE).policy(speedup=2.0)}"
            )
        weight = next(model.parameters(), None)
        refuse_moving_weights(policy, weight)
        if self._broken and policy.cache is not None:
            log.warning(
                "torch.compile broke %s into several graphs (%s): they run without a cache; see"
                " torch._dynamo.explain, or use lightcache_fx.transform",
                type(model).__name__,
                self._reason,
            )
            policy = policy.model_copy(update={"cache": None})
        if model.model_class is not None and is_autoencoder(model.model_class):
            policy = policy.of_autoencoder(model.method)
        key = (id(weight if weight is not None else self), repr(policy))
        self._shared = _MODELS.setdefault(key, _Model())
        self._shared.graphs.add(self)
        shared = self._shared
        compiler = Compiler(model, policy, model.method, ledger=shared.ledger, varying=model.varying)
        return Runtime(compiler, local=shared.local)


def refuse_moving_weights(policy: Policy, weight: torch.Tensor | None) -> None:
    """Raise a `PolicyError` where weights would leave an accelerator behind Dynamo's back."""
    swaps = policy.swap is not None and policy.swap.weights
    if (swaps or policy.memory_budget is not None) and weight is not None and weight.device.type != "cpu":
        raise PolicyError(
            f"{'swap' if swaps else 'memory_budget'}: Dynamo's guards expect the weights on {weight.device}, so behind"
            f" torch.compile they cannot be kept elsewhere; use lightcache_fx.transform with Policy(compile=...), or"
            f" Swap(weights=False)"
        )


def graphs_of(module: nn.Module) -> list[CompiledGraph]:
    """The graphs that the backend has made of a module and that have run, the latest last."""
    weights = {id(weight) for weight in module.parameters()}
    found = [graph for (weight, _), model in _MODELS.items() if weight in weights for graph in model.graphs]
    return sorted(found, key=lambda graph: graph.number)

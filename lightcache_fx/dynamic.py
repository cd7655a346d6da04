"""Sizes that vary: one capture for calls that differ only in sizes of their tensors, where export proves it.

A second size is a reason to try (torch.compile's automatic dynamic shapes): the dimensions in which it differs from the
one known before become symbols. What the trace took for granted of these (guards, ranges, equal sizes) is read from its
`ShapeEnv`, and a call for which it does not hold is captured by itself, as one of an unknown size always was. Nothing
is believed unchecked: the graph is compared with eager at both sizes, and at each further one when it comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
from torch import fx, nn

from lightcache_fx.caching import Auto
from lightcache_fx.calls import Call, CallLayout
from lightcache_fx.capture import Capture, capture, check_at_another_size, explain_failure
from lightcache_fx.compiled import Compiled, Signature
from lightcache_fx.errors import CaptureError
from lightcache_fx.graphs import expression, module_path, tensors_of
from lightcache_fx.lowering import WITH_CUDA_GRAPHS
from lightcache_fx.module_state import ModuleState
from lightcache_fx.plan import Plan, make_plan
from lightcache_fx.policy import Policy
from lightcache_fx.program import build_programs
from lightcache_fx.resizing import resized, with_numbers
from lightcache_fx.sizes import SMALLEST, Sizes, Values, at, differences, pattern_of
from lightcache_fx.tracing import Varying

log = logging.getLogger(__name__)

MOST_SIZES = 64
"""Sizes of one dynamic capture that are remembered as checked; more are checked again when they come again."""


def may_be_dynamic(policy: Policy, method: str) -> bool:
    """Whether one capture may serve several sizes: what is planned in bytes is planned for each size by itself."""
    in_bytes = (
        policy.chunk is not None or policy.is_about_memory() or (policy.decode is not None and method != "forward")
    )
    with_graphs = policy.compile is not None and policy.compile.mode in WITH_CUDA_GRAPHS
    decides = policy.adaptive is not None
    return policy.dynamic is not False and not in_bytes and not with_graphs and not decides


@dataclass(eq=False)
class DynamicCapture:
    """A capture that holds for many sizes, with the programs that all of them share.

    Attributes:
        capture: its sizes are symbols.
        sizes: what it holds for.
        plan: made for the size that it was captured for; its figures are those of that size.
        made: what calls of any size run.
        refused: layouts for which it computed something else than the model.
    """

    capture: Capture
    sizes: Sizes
    plan: Plan
    made: Compiled | None = None
    refused: set[CallLayout] = field(default_factory=set)


def at_its_size(made: Compiled, module: nn.Module) -> Compiled | None:
    """What a dynamic capture made for one size, with numbers in the programs in the place of symbols; for saving.

    None where a plan for that size would keep something else, so that it would not be what has run.
    """
    dynamic = made.signature.dynamic
    assert dynamic is not None
    captured = with_numbers(dynamic.capture, dynamic.sizes, made.capture.layout)
    plan = make_plan(captured, dynamic.plan.policy, module)
    if _kept(plan) != _kept(dynamic.plan):
        return None
    return Compiled(Signature(captured, plan, made.signature.state), plan, build_programs(captured, plan), {})


def _kept(plan: Plan) -> tuple[object, ...]:
    """The nodes of what a plan keeps between steps and computes once."""
    return [(slot.node, slot.base) for slot in plan.slots], {value.node for value in plan.hoist.values}


class DynamicSizes:
    """Finds or makes the dynamic capture for a call.

    Args:
        module: the user's.
        policy: for which `may_be_dynamic` holds.
        mark: as for `capture`.
        build: makes programs of a signature and its plan.
        varying: by an argument's name, dimensions that are left open from the first call on.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: Policy,
        mark: Sequence[str],
        build: Callable[[Signature, Plan], Compiled],
        varying: Mapping[str, Sequence[int]],
    ) -> None:
        self.module, self.policy, self.mark = module, policy, tuple(mark)
        self._build = build
        self._varying = dict(varying)
        self._tried: dict[Hashable, None] = {}

    def programs_for(self, call: Call, known: Sequence[Compiled], state: ModuleState) -> Compiled | None:
        """The programs of a dynamic capture that was checked for this call; None where there is none.

        Args:
            call: of a signature that is not known.
            known: what has been made, the one that was used last at the end.
            state: of the module now.
        """
        pattern = pattern_of(call.layout)
        alike = [
            made
            for made in reversed(known)
            if made.signature.state.key == state.key and pattern_of(made.capture.layout) == pattern
        ]
        captures = dict.fromkeys(made.signature.dynamic for made in alike)
        for dynamic in captures:
            if isinstance(dynamic, DynamicCapture) and self._holds(dynamic, call):
                return self._for_size(dynamic, call, state)
        for varying, base in self._candidates(alike, call):
            key = (pattern, state.key, tuple(varying.items()))
            if key in self._tried:
                continue
            dynamic = self._captured(varying, call, base, state)
            if dynamic is not None:
                return self._for_size(dynamic, call, state)
            self._tried[key] = None
            if len(self._tried) > MOST_SIZES:
                del self._tried[next(iter(self._tried))]
        return None

    def _candidates(self, alike: Sequence[Compiled], call: Call) -> list[tuple[Varying, Compiled | None]]:
        """Dimensions to leave open, and what is known for the size at which to begin."""
        if not alike:
            every = {
                i: tuple(dim for dim, n in enumerate(t.shape) if n >= SMALLEST and self._is_open(leaf.name, dim))
                for i, (leaf, t) in enumerate(zip(call.layout.leaves, call.tensors, strict=True))
            }
            found = {i: dims for i, dims in every.items() if dims}
            return [(found, None)] if found else []
        differing = [differences(made.capture.layout, call.layout) for made in alike]
        nearest, base = min(zip(differing, alike, strict=True), key=lambda pair: sum(map(len, pair[0].values())))
        places = sorted({(index, dim) for one in differing for index, dims in one.items() for dim in dims})
        ever: dict[int, list[int]] = {}
        for index, dim in places:
            ever.setdefault(index, []).append(dim)
        open_now = [made.signature.dynamic.sizes for made in alike if made.signature.dynamic is not None]
        candidates = [{index: tuple(dims) for index, dims in one.items()} for one in (ever, nearest)]
        candidates = [one for one in candidates if not any(sizes.is_open(one) for sizes in open_now)]
        return [(one, base) for i, one in enumerate(candidates) if one not in candidates[:i]]

    def _is_open(self, name: str, dim: int) -> bool:
        """Whether a dimension is left open before a second size of it has come."""
        return self.policy.dynamic is True or dim in self._varying.get(name, ())

    def _holds(self, dynamic: DynamicCapture, call: Call) -> bool:
        """Whether a dynamic capture is valid for a call, and computes what the model does for it."""
        if call.layout in dynamic.refused:
            return False
        why = dynamic.sizes.why_not(call.layout) or self._beyond_limits(dynamic, call.layout)
        if not why:
            try:
                check_at_another_size(dynamic.capture, self.module, call)
            except Exception as error:  # noqa: BLE001 - whatever it is, a capture for this size alone has its turn
                why = explain_failure(error)
                dynamic.refused.add(call.layout)
        if why:
            log.info("%s: a size of its own is captured by itself: %s", type(self.module).__name__, why)
        return not why

    def _captured(
        self, varying: Varying, call: Call, base: Compiled | None, state: ModuleState
    ) -> DynamicCapture | None:
        """A dynamic capture for two sizes, checked at both; None where that cannot be, and why is logged."""
        try:
            dynamic = self._made(varying, call, base, state)
        except Exception as error:  # noqa: BLE001 - whatever it is, a capture for this size alone has its turn
            log.info("%s: sizes stay fixed: %s", type(self.module).__name__, explain_failure(error))
            return None
        log.info("%s: one capture for sizes that vary: %s", type(self.module).__name__, dynamic.sizes)
        return dynamic

    def _made(self, varying: Varying, call: Call, base: Compiled | None, state: ModuleState) -> DynamicCapture:
        first = call if base is None else resized(call, base.capture.layout)
        captured = capture(self.module, first, mark=self.mark, varying=varying)
        sizes = Sizes.of(captured)
        fixed = sizes.fixed(varying)
        if not sizes.symbols or (base is not None and fixed):
            raise CaptureError(f"the trace has made numbers of sizes that vary: {', '.join(fixed)}")
        if why := sizes.why_not(first.layout) or sizes.why_not(call.layout):
            raise CaptureError(why)
        plan = make_plan(with_numbers(captured, sizes, first.layout), self.policy, self.module)
        if base is not None:
            _check_cut(captured, plan, base)
            check_at_another_size(captured, self.module, call)
        dynamic = DynamicCapture(replace(captured, route=f"{captured.route}, {sizes}"), sizes, plan)
        if why := self._beyond_limits(dynamic, call.layout):
            raise CaptureError(why)
        dynamic.made = self._build(Signature(dynamic.capture, plan, state, dynamic=dynamic), plan)
        return dynamic

    def _for_size(self, dynamic: DynamicCapture, call: Call, state: ModuleState) -> Compiled:
        """The shared programs as what was made for one size: its calls are a run of their own."""
        made = dynamic.made
        assert made is not None
        captured = replace(dynamic.capture, layout=call.layout)
        return Compiled(
            Signature(captured, dynamic.plan, state, dynamic=dynamic), dynamic.plan, made.programs, made.bound
        )

    def _beyond_limits(self, dynamic: DynamicCapture, layout: CallLayout) -> str:
        """Which of the policy's limits, which are in bytes, the plan does not keep at a size; empty for none."""
        plan, values = dynamic.plan, dynamic.sizes.values(layout)
        nodes = {node.name: node for node in dynamic.capture.graph_module.graph.nodes}
        auto = next((cache.cut for cache in self.policy.caches if isinstance(cache.cut, Auto)), None)
        limits = {
            "max_kept_bytes": (
                auto.max_kept_bytes if auto is not None else None,
                [slot.node for slot in plan.slots],
            ),
            "max_hoisted_bytes": (self.policy.max_hoisted_bytes, [value.node for value in plan.hoist.values]),
        }
        for name, (limit, kept) in limits.items():
            if limit is not None and sum(_bytes_at(nodes[node], values) for node in kept) > limit:
                return f"{name}={limit} is not kept"
        return ""


def _bytes_at(node: fx.Node, values: Values) -> int:
    return sum(
        int(at(sympy.sympify(sympy.prod(map(expression, tensor.shape))), values)) * tensor.element_size()
        for tensor in tensors_of(node)
    )


def _check_cut(captured: Capture, plan: Plan, base: Compiled) -> None:
    """Raise a `CaptureError` where a plan keeps something else than that of the size before."""
    known = base.capture
    assert isinstance(known, Capture)
    before, now = (_cut_of(one.graph_module.graph, made) for one, made in ((known, base.plan), (captured, plan)))
    if base.signature.dynamic is not None:  # whose bytes are those of another size
        before, now = ([place for *place, _ in cut] for cut in (before, now))
    if before != now:
        raise CaptureError(f"the cut would be {now}, where it is {before} at the size before")


def _cut_of(graph: fx.Graph, plan: Plan) -> list[list[object]]:
    """What a cut keeps, told by where it is made and not by the names of nodes."""
    nodes = {node.name: node for node in graph.nodes}

    def place(name: str | None) -> tuple[object, ...]:
        return () if name is None else (module_path(nodes[name]), str(nodes[name].target))

    return [[*place(slot.node), *place(slot.base), slot.num_bytes] for slot in plan.slots]

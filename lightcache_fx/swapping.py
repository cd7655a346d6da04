"""From programs to what the swap planner looks at, and its decision as the runtime looks at it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

from torch import fx
from torch._ops import OpOverload

from lightcache_fx.arena import is_dense
from lightcache_fx.chunked import ChunkedRegion
from lightcache_fx.costs import Machine, is_free, slowdown
from lightcache_fx.direct_writes import written_by
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import (
    alias_root,
    calls,
    concrete_size,
    input_of,
    is_or_views,
    is_view,
    num_bytes,
    output_node,
    outputs,
    placeholders,
    tensors_of,
)
from lightcache_fx.hardware import Hardware
from lightcache_fx.homes import Tier
from lightcache_fx.liveness import timeline
from lightcache_fx.passes.insert_transfers import LocalStay, Transfers
from lightcache_fx.stores import SlotPlace
from lightcache_fx.swap_planner import SwapPlan
from lightcache_fx.swap_transfers import places_of_slots
from lightcache_fx.units import format_bytes
from lightcache_fx.workload import Link, Movable, Op, Step, Workload

SMALLEST = 2**14
"""Weights of fewer bytes stay on the device: a copy's latency costs more than their room is worth."""
_PAYS = 0.1
"""Swapping that makes a step slower by more than this share is warned of."""
_SMALL_SHARE = 1 / 256
"""Of all weights: a larger one may be away however small it is."""


@dataclass(frozen=True)
class PricedProgram:
    """A program as the planner sees it.

    Attributes:
        name: of the program.
        ops: its calls, but for views of what can be away, which cost nothing and are made again where they are read.
        movables: what it reads or makes that can be away.
    """

    name: str
    ops: tuple[Op, ...]
    movables: Mapping[str, Movable]


@dataclass(frozen=True)
class SwapSchedule:
    """What is copied when: for each call of a period, and for the prologue.

    Attributes:
        names: the program of each call, denoising step by denoising step; in the first they are full, in all others
            they reuse something.
        weights: all that can be away: while another model runs they are.
        transfers: of each step.
        prologue: of the program that runs once a generation.
        plan: what was decided for the period, with what it is predicted to take.
        whole_seconds: what a period would take with everything on the device and nothing cut.
        workload: what was planned for.
        hardware: likewise.
        tier: where things are kept.
        branches: how many calls a denoising step has, one for each branch of guidance.
        keeps_residents: whether weights that stay on the device do so while the prologue runs.
        once: what the prologue was planned for, where there is one.
        history_away: whether older values of slots are away but in the calls that read them.
    """

    names: tuple[str, ...]
    weights: frozenset[str]
    transfers: tuple[Transfers, ...]
    prologue: Transfers
    plan: SwapPlan
    whole_seconds: float
    workload: Workload
    hardware: Hardware
    tier: Tier
    branches: int = 1
    keeps_residents: bool = True
    once: Workload | None = None
    history_away: bool = False

    @cached_property
    def found_at_begin(self) -> Mapping[str, int]:
        """Bytes of the weights that a generation finds on the device as it begins, in order of first use.

        They are there if the stage before has handed them over, and otherwise fetched then.
        """
        kept = self.resident if self.keeps_residents or self.once is None else frozenset[str]()
        ops, found = self.workload.ops[: self.workload.starts[1]], dict[str, int]()
        if self.once is not None:
            found = _sizes_of(self.once, self.once.ops, kept | _handed_over(self.prologue))
            return found | _sizes_of(self.workload, ops, kept - found.keys())
        return _sizes_of(self.workload, ops, kept | _handed_over(self.transfers[0]))

    @property
    def moves(self) -> bool:
        """Whether anything leaves the device while the model runs."""
        return any(transfers.moves for transfers in (*self.transfers, self.prologue))

    @cached_property
    def resident(self) -> frozenset[str]:
        """The weights that stay on the device from one step to the next."""
        moving = {stay.name for stay in self.plan.residence.stays} | {stay.name for stay in self.prologue.stays}
        return self.weights - moving | self.weights & self.plan.residence.resident

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """For each call, the name of its program among those that copy at other moments: `reuse`, `reuse_2`, ..."""
        known: dict[tuple[str, Transfers], str] = {}
        for name, transfers in zip(self.names, self.transfers, strict=True):
            same_name = sum(base == name for base, _ in known)
            known.setdefault((name, transfers), name if not same_name else f"{name}_{same_name + 1}")
        return tuple(known[pair] for pair in zip(self.names, self.transfers, strict=True))

    def seconds_of(self, calls: int) -> float:
        """Predicted time of so many calls, the first of them with nothing on the device yet."""
        first, steady = self.plan.simulation.first.seconds, self.plan.simulation.seconds
        if not self.workload.cyclic:
            return calls * first
        return first - steady + steady * calls / len(self.names)

    def whole_seconds_of(self, calls: int) -> float:
        """The same with everything there from the begin, and nothing cut."""
        return self.whole_seconds * calls / len(self.names)

    def copied_bytes_of(self, calls: int) -> float:
        """Bytes copied to the device in so many calls."""
        first, steady = self.plan.simulation.first, self.plan.simulation.steady
        if not self.workload.cyclic:
            return calls * first.to_device_bytes
        return first.to_device_bytes + steady.to_device_bytes * max(0.0, calls / len(self.names) - 1)

    @property
    def warning(self) -> str | None:
        """What to say where swapping costs much time."""
        plan, steady = self.plan, self.plan.simulation.steady
        if plan.slowdown <= _PAYS or not self.workload.cyclic:
            return None
        copying = 1e3 * (steady.to_device_seconds + steady.from_device_seconds)
        return (
            f"swapping does not pay within {format_bytes(plan.budget)}: copying takes {copying:.1f} ms of a period in"
            f" which computing takes {1e3 * plan.simulation.compute_seconds:.1f} ms, so computing waits"
            f" {1e3 * steady.stalled_seconds:.1f} ms ({plan.slowdown:.0%}); all weights and cached values on the device"
            f" would take {format_bytes(plan.peak_bytes + plan.movable_bytes - plan.resident_bytes)} at most"
        )

    def step_for(self, name: str, before: Sequence[str], until_full: int | None) -> int:
        """The step of the period that a step is most like.

        Where all but the first are reuse steps, by its distance from the full steps around it: the last step of a
        period drops the slots, so it is taken only before a full step, or where there is but one. Otherwise by its
        program and by those before it, as far back as these are alike: the last one hands it copies.

        Args:
            name: of the step's program; in the period.
            before: the programs of the steps from the last full one on, in order.
            until_full: how many steps ahead the next full one is, where that is known.
        """
        steps = self.names[:: self.branches]
        if set(steps) - {"full", "reuse"}:
            found = [step for step, program in enumerate(steps) if program == name]
            return max(found, key=lambda step: _alike_at_the_end(steps[:step], before))
        count = len(steps)
        if until_full is not None:
            return max(1, count - until_full)
        return min(len(before), max(1, count - 2))

    @cached_property
    def slot_places(self) -> tuple[tuple[Mapping[str, SlotPlace], ...], ...]:
        """For each call, where the slots of each branch are when it begins, by their names in programs."""
        residence, workload = self.plan.residence, self.workload
        return tuple(places_of_slots(residence, workload, call, self.branches) for call in range(len(self.names)))


def _alike_at_the_end(some: Sequence[str], others: Sequence[str]) -> int:
    """How many of the last entries are the same."""
    pairs = zip(reversed(some), reversed(others), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _handed_over(transfers: Transfers) -> frozenset[str]:
    """The weights whose copies a program is given, to read them."""
    stays = transfers.stays
    return frozenset(stay.name for stay in stays if stay.kind == "weight" and stay.prefetch is None and stay.reads)


def _sizes_of(workload: Workload, ops: Sequence[Op], names: Container[str]) -> dict[str, int]:
    read = (name for op in ops for name in op.reads if name in names)
    return {name: workload.movables[name].num_bytes for name in read}


def fixed_inputs(graph: fx.Graph, *, least: int, weights: bool, features: bool) -> set[str]:
    """Weights and slots that must stay on the device for this program's sake.

    Those that it returns or writes to, those with gaps between their elements, and small weights.

    Args:
        graph: of a program.
        least: bytes of a weight that is not small.
        weights: whether weights may be away at all.
        features: whether slots may be.
    """
    returned = {alias_root(node) for node in output_node(graph).all_input_nodes}
    fixed = set()
    for node in placeholders(graph):
        given = input_of(node)
        held = node in returned or _is_written(node) or not all(map(is_dense, tensors_of(node)))
        small = given.kind == "weight" and num_bytes(node) < least
        may_move = {"weight": weights, "slot": features}.get(given.kind, False)
        if held or small or not may_move:
            fixed.add(given.name)
    return fixed


def least_movable(weight_bytes: int) -> int:
    """How large a weight is that may be away, in a model with so many bytes of weights."""
    return min(SMALLEST, int(_SMALL_SHARE * weight_bytes))


def priced(
    name: str, graph: fx.Graph, machine: Machine, fixed: Container[str] = (), *, cuda: bool | None = None
) -> PricedProgram:
    """A program's calls with their times, bytes, and what they read and make that can be away.

    Args:
        name: of the program.
        graph: complete, its regions chunked, without transfers.
        machine: what its device does in a second.
        fixed: weights and slots that must stay on the device.
        cuda: as for `timeline`.
    """
    line = timeline(graph, cuda=cuda)
    sources = dict(_movable_inputs(graph, line.rounding, fixed))
    made = {node: slot for node, slot in _made_slots(graph, line.rounding) if slot.name not in fixed}
    seconds = seconds_of_calls(graph, machine, cuda=line.cuda)
    places = {step.node: index for index, step in enumerate(line.steps)}
    since = {slot.name: places[_maker(node)] for node, slot in made.items()}
    ops = []
    for index, step in enumerate(line.steps):
        node = step.node
        if alias_root(node) in sources:
            continue
        read = [sources[root].name for root in _roots_read(node) if root in sources]
        read += [
            slot.name for slot_node, slot in made.items() if index > since[slot.name] and _touches(node, slot_node)
        ]
        own = sum(slot.num_bytes for slot in made.values() if since[slot.name] <= index)
        written = tuple(slot.name for slot_node, slot in made.items() if _maker(slot_node) is node)
        ops.append(Op(node.name, seconds[node], step.peak - own, tuple(read), written))
    movables = {movable.name: movable for movable in (*sources.values(), *made.values())}
    named = {op_name for op in ops for op_name in (*op.reads, *op.writes)}
    return PricedProgram(name, tuple(ops), {name: m for name, m in movables.items() if name in named})


def behind_probe(program: PricedProgram, probe: PricedProgram) -> PricedProgram:
    """The rest of a step as its probe runs before it: beside that is whatever the first call is to find there."""
    if not program.ops:
        return program
    first, *others = program.ops
    most = max(first.live_bytes, *(op.live_bytes for op in probe.ops))
    return replace(program, ops=(replace(first, live_bytes=most), *others))


def without(program: PricedProgram, num_bytes: int) -> PricedProgram:
    """A program beside which so many bytes less are on the device than are said to be there all the time."""
    return replace(program, ops=tuple(replace(op, live_bytes=op.live_bytes - num_bytes) for op in program.ops))


@dataclass(frozen=True)
class HistoryReads:
    """The older values of slots that a program reads: their copies are begun as it begins, and gone behind the reads.

    Attributes:
        stays: one for each.
        sizes: their bytes on the device, in the same order.
    """

    stays: tuple[LocalStay, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, graph: fx.Graph, rounding: int) -> HistoryReads:
        """Those of a program without transfers."""
        sources = [node for node in placeholders(graph) if input_of(node).kind == "history"]
        readers = {
            source: [n.name for n in calls(graph) if alias_root(n) is not source and source in _roots_read(n)]
            for source in sources
        }
        return cls(
            tuple(LocalStay(input_of(source).name, "history", None, tuple(readers[source])) for source in sources),
            tuple(rounded(source, rounding) for source in sources),
        )

    def waits(self, program: PricedProgram, link: Link) -> float:
        """Seconds for which the first read waits for all of them, if nothing else is copied then."""
        first = min(_places(program)[stay.reads[0]] for stay in self.stays)
        return max(0.0, sum(map(link.arriving, self.sizes)) - sum(op.seconds for op in program.ops[:first]))

    def beside(self, program: PricedProgram, link: Link) -> PricedProgram:
        """The program with their bytes, and with what its first read waits."""
        places = _places(program)
        first = min(places[stay.reads[0]] for stay in self.stays)
        until = [places[stay.reads[-1]] for stay in self.stays]
        ops = []
        for place, op in enumerate(program.ops):
            held = sum(size for size, last in zip(self.sizes, until, strict=True) if place <= last)
            seconds = op.seconds + (self.waits(program, link) if place == first else 0.0)
            ops.append(replace(op, live_bytes=op.live_bytes + held, seconds=seconds))
        return replace(program, ops=tuple(ops))


def _places(program: PricedProgram) -> dict[str, int]:
    return {op.name: place for place, op in enumerate(program.ops)}


def _roots_read(node: fx.Node) -> dict[fx.Node, None]:
    """Whose storages a call is given, in order."""
    return dict.fromkeys(map(alias_root, node.all_input_nodes))


def rounded(node: fx.Node, rounding: int) -> int:
    """A node's bytes as the device's allocator rounds them."""
    return -(-num_bytes(node) // rounding) * rounding


def _movable_inputs(graph: fx.Graph, rounding: int, fixed: Container[str]) -> Iterator[tuple[fx.Node, Movable]]:
    for node in placeholders(graph):
        given = input_of(node)
        if given.name in fixed:
            continue
        if given.kind == "weight":
            yield node, Movable(given.name, rounded(node, rounding), "weight")
        elif given.kind == "slot":
            yield node, Movable(given.name, rounded(node, rounding), "slot")


def _is_written(node: fx.Node) -> bool:
    """Whether a call writes to an input or to a view of it."""
    return any(
        user.op == "call_function"
        and isinstance(user.target, OpOverload)
        and (user.target._schema.is_mutable or (is_view(user) and _is_written(user)))
        for user in node.users
    )


def _made_slots(graph: fx.Graph, rounding: int) -> Iterator[tuple[fx.Node, Movable]]:
    for node in outputs(graph):
        if isinstance(node, fx.Node) and "lightcache_slot" in node.meta:
            yield node, Movable(node.meta["lightcache_slot"], rounded(node, rounding), "slot")


def _maker(node: fx.Node) -> fx.Node:
    """The call whose result a slot is, or is taken out of."""
    while is_view(node) and isinstance(node.args[0], fx.Node) and node.args[0].op != "placeholder":
        node = node.args[0]
    return node


def _touches(node: fx.Node, slot: fx.Node) -> bool:
    """Whether a call reads a slot or a view of it."""
    maker = _maker(slot)
    return any(_maker(argument) is maker and is_or_views(argument, slot) for argument in node.all_input_nodes)


def seconds_of_calls(graph: fx.Graph, machine: Machine, *, cuda: bool) -> dict[fx.Node, float]:
    """Predicted time of each call; a region's is that of all its chunks, one after the other."""
    flops = count_flops(graph)
    found: dict[fx.Node, float] = {}
    for node in calls(graph):
        region = node.meta.get("lightcache_region")
        if isinstance(region, ChunkedRegion):
            found[node] = _region_seconds(region, machine, cuda=cuda)
        elif is_free(node, flops.get(node, 0)):
            found[node] = 0.0
        else:
            found[node] = _call_seconds(node, flops.get(node, 0), machine, cuda=cuda)
    return found


def _call_seconds(node: fx.Node, flops: int, machine: Machine, *, cuda: bool) -> float:
    slower = 1.0
    if flops and not cuda and tensors_of(node.all_input_nodes[0]):
        slower = slowdown(node, [concrete_size(size) for size in tensors_of(node.all_input_nodes[0])[0].shape])
    moving = sum(map(machine.moving, (num_bytes(node), *map(num_bytes, node.all_input_nodes))))
    return machine.seconds(flops * slower, moving) + machine.allocating(0 if is_view(node) else num_bytes(node))


def _region_seconds(region: ChunkedRegion, machine: Machine, *, cuda: bool) -> float:
    bodies = [region.body(index).graph for index in range(len(region.bodies))]
    each = [sum(seconds_of_calls(graph, machine, cuda=cuda).values()) for graph in bodies]
    copied = [[n for i, n in enumerate(outputs(graph)) if i != written_by(graph)] for graph in bodies]
    written = [sum(machine.moving(num_bytes(node)) + machine.launch for node in nodes) for nodes in copied]
    return sum(each[chunk.body] + written[chunk.body] for chunk in region.chunks)


def workload_of(programs: Sequence[PricedProgram], held_bytes: int, *, cyclic: bool, branches: int = 1) -> Workload:
    """A period in which these programs run one after the other.

    Args:
        programs: one for each denoising step.
        held_bytes: what is on the device beside what the programs allocate and what can be away.
        cyclic: as in `Workload`.
        branches: so many times in a row each of them runs, each time with slots of its own where it is more than once.
    """
    places = [None] if branches == 1 else list(range(branches))
    known: dict[tuple[int, int | None], Step] = {}
    movables: dict[str, Movable] = {}
    for program in programs:
        for place in places:
            if (id(program), place) not in known:
                own = {name: m if place is None else m.of_branch(place) for name, m in program.movables.items()}
                known[id(program), place] = Step(
                    program.name, tuple(_placed(op, held_bytes, own) for op in program.ops)
                )
                movables |= {movable.name: movable for movable in own.values()}
    return Workload(tuple(known[id(program), place] for program in programs for place in places), movables, cyclic)


def _placed(op: Op, held_bytes: int, own: Mapping[str, Movable]) -> Op:
    reads, writes = (tuple(own[name].name for name in names) for names in (op.reads, op.writes))
    return Op(op.name, op.seconds, op.live_bytes + held_bytes, reads, writes)

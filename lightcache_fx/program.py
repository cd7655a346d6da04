"""Programs: pure functions `(inputs, state) -> (outputs, state)` held as graphs, one per kind of denoising step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import fx, nn

from lightcache_fx.boxed import BoxedCodeGen
from lightcache_fx.capture import Capture
from lightcache_fx.chunk_planner import ChunkPlan
from lightcache_fx.extrapolation import as_tensor, coefficients_name, slot_and_age
from lightcache_fx.flops import total_flops
from lightcache_fx.graphs import (
    GraphInput,
    calls,
    copy_graph,
    input_of,
    is_only_measured,
    num_bytes,
    outputs,
    placeholders,
)
from lightcache_fx.lowering import CompileState, has_cuda_graphs, lower
from lightcache_fx.module_state import weight_slots
from lightcache_fx.packages import Packages
from lightcache_fx.passes.base import Pass, run_passes
from lightcache_fx.passes.extrapolate import extrapolate
from lightcache_fx.passes.insert_transfers import Transfers, insert_transfers
from lightcache_fx.passes.read_cache import read_cache
from lightcache_fx.passes.remove_dead_code import remove_dead_code
from lightcache_fx.passes.remove_marks import remove_marks
from lightcache_fx.passes.split_probe import INDICATOR, probe_of, split_probe
from lightcache_fx.passes.split_run_invariants import prologue_of, split_run_invariants
from lightcache_fx.passes.write_cache import write_cache
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Compile
from lightcache_fx.static_slots import SlotBuffers, writing_to_buffers
from lightcache_fx.stores import SLOT, Copies, Stores, version_of
from lightcache_fx.transfers import OFFLOAD, PREFETCH, WAIT

StateKind = Literal["slot", "copy", "hoisted", "next", "change", "indicator", "handed"]


@dataclass(frozen=True)
class Program:
    """One static program.

    Attributes:
        name: `prologue`, `probe`, `full`, `reuse` or, where several things are kept, as `program_name` has it.
        graph_module: the graph; its placeholders carry `GraphInput` bindings.
        inputs: the bindings in order.
        num_outputs: how many of the returned tensors are the model's; the rest is state.
        state: what the rest is, in order: a slot, the device's copy of a weight or slot that is kept elsewhere, or that
            of a weight of the model that runs next.
        transfers: what it copies to and from the device.
    """

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[GraphInput, ...]
    num_outputs: int
    state: tuple[tuple[StateKind, str], ...] = ()
    transfers: Transfers = field(default_factory=Transfers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that one run of the program reads."""
        read = {
            input_of(n).name: num_bytes(n)
            for n in placeholders(self.graph_module.graph)
            if _is_weight(input_of(n), self)
        }
        return sum(read.values())

    @cached_property
    def flops(self) -> int:
        """FLOPs of one run."""
        return total_flops(self.graph_module.graph)

    @property
    def num_calls(self) -> int:
        """How many operators and regions it calls."""
        return sum(1 for _ in calls(self.graph_module.graph))

    @property
    def num_regions(self) -> int:
        """How many regions run chunk by chunk."""
        return sum("lightcache_region" in node.meta for node in self.graph_module.graph.nodes)

    @property
    def num_transfers(self) -> int:
        """How many copies to the device and from it one run begins."""
        return sum(node.target in (PREFETCH, OFFLOAD) for node in calls(self.graph_module.graph))


def build_programs(capture: Capture, plan: Plan) -> dict[str, Program]:
    """Carry out a plan: the captured graph becomes `full`, and `prologue`, `reuse` and others where the plan has them.

    Where weights are swapped, steps that copy at other moments have programs of their own: `reuse`, `reuse_2`, ...
    """
    programs = {}
    wholes = whole_programs(capture, plan)
    others = _fetchable(capture, plan, wholes["full"].graph)
    for name, whole in wholes.items():
        graph = _chunked(whole.graph, plan.chunks.get(name))
        for variant, transfers in _variants(plan, name):
            copied, _ = copy_graph(graph)
            programs[variant] = _with_transfers(variant, capture, copied, transfers, plan, others)
    return programs


def build_last(
    capture: Capture, plan: Plan, base: str, name: str, transfers: Transfers, following: Mapping[str, torch.Tensor]
) -> Program:
    """A program that fetches for another model as well, which runs next.

    Args:
        capture: of the model.
        plan: of the model.
        base: `full` or `reuse`.
        name: of the program.
        transfers: what it copies.
        following: fake tensors like the weights of the other model that it fetches, by name.
    """
    wholes = whole_programs(capture, plan)
    others = _fetchable(capture, plan, wholes["full"].graph) | {("next", key): like for key, like in following.items()}
    graph = _chunked(wholes[base].graph, plan.chunks.get(base))
    return _with_transfers(name, capture, graph, transfers, plan, others)


def _chunked(whole: fx.Graph, chunk: ChunkPlan | None) -> fx.Graph:
    """A copy with its regions, in which new nodes have the names that they had while transfers were planned.

    A graph never gives a name twice, not even that of a node that was removed; the planner looked at a copy too.
    """
    graph, _ = copy_graph(whole)
    if chunk is not None:
        chunk.chunking.apply(graph)
    return graph


def _fetchable(capture: Capture, plan: Plan, full: fx.Graph) -> dict[tuple[str, str], torch.Tensor]:
    """Fake tensors like all that a program may fetch without reading it, by kind and name."""
    inputs = placeholders(capture.graph_module.graph)
    found = {("weight", input_of(n).name): n.meta["val"] for n in inputs if input_of(n).kind == "weight"}
    for node in outputs(full):
        if isinstance(node, fx.Node) and "lightcache_slot" in node.meta:
            slot = node.meta["lightcache_slot"]
            found |= {("slot", f"{slot}@{branch}"): node.meta["val"] for branch in range(plan.branches)}
    return found


def _with_transfers(
    name: str,
    capture: Capture,
    graph: fx.Graph,
    transfers: Transfers,
    plan: Plan,
    others: Mapping[tuple[str, str], torch.Tensor],
) -> Program:
    """A program of a graph, which is changed in place."""
    insert = partial(insert_transfers, plan=transfers, others=others)
    run_passes(graph, [("insert_transfers", insert)], keeps_outputs=False)
    return _program(name, capture, graph, transfers, plan)


def _variants(plan: Plan, name: str) -> Iterable[tuple[str, Transfers]]:
    """What a program copies, once for each way in which it does."""
    if plan.swap is None:
        return {name: Transfers()}.items()
    once = {"prologue": plan.swap.prologue, "probe": Transfers()}
    if name in once:
        return {name: once[name]}.items()
    steps = zip(plan.swap.variants, plan.swap.names, plan.swap.transfers, strict=True)
    return {variant: transfers for variant, base, transfers in steps if base == name}.items()


def whole_programs(capture: Capture, plan: Plan) -> dict[str, fx.GraphModule]:
    """The programs before anything is chunked or swapped."""
    graphs: dict[str, fx.Graph] = {}
    if plan.hoist.values:
        graphs["prologue"] = prologue_of(capture.graph_module.graph, plan=plan.hoist)
        run_passes(graphs["prologue"], [("remove_marks", remove_marks)])
    if plan.probe is not None:
        graph, _ = copy_graph(capture.graph_module.graph)
        split_run_invariants(graph, plan=plan.hoist)
        graphs["probe"] = probe_of(graph, plan=plan.probe)
        run_passes(graphs["probe"], [("remove_marks", remove_marks)])
    for name, passes in _pipelines(plan).items():
        graphs[name], _ = copy_graph(capture.graph_module.graph)
        run_passes(graphs[name], passes, keeps_outputs=not plan.made_by(name))
    return {name: fx.GraphModule(modules_of(capture, graph), graph) for name, graph in graphs.items()}


def _pipelines(plan: Plan) -> dict[str, list[tuple[str, Pass]]]:
    """The passes of each program, in order."""
    split: tuple[str, Pass] = ("split_run_invariants", partial(split_run_invariants, plan=plan.hoist))
    before = [split]
    if plan.probe is not None:
        before.append(("split_probe", partial(split_probe, plan=plan.probe)))
    clean: list[tuple[str, Pass]] = [
        ("remove_marks", remove_marks),  # last: slots are named after marked places
        ("remove_dead_code", remove_dead_code),
    ]
    return {name: [*before, *_writing(plan, name), *_reading(plan, name), *clean] for name in plan.programs}


def _writing(plan: Plan, name: str) -> Iterable[tuple[str, Pass]]:
    """The pass by which a program also returns what later steps reuse."""
    made = plan.made_by(name)
    if made:
        yield "write_cache", partial(write_cache, slots=made)


def _reading(plan: Plan, name: str) -> Iterable[tuple[str, Pass]]:
    """The passes by which a program takes from the state what it does not compute."""
    read = plan.read_by(name)
    if read:
        yield "read_cache", partial(read_cache, slots=read)
    for cache in dict.fromkeys(slot.cache for slot in read):
        slots, coefficients = [slot for slot in read if slot.cache == cache], coefficients_name(cache)
        yield "extrapolate", partial(extrapolate, slots=slots, order=plan.order_of(cache), name=coefficients)


def _is_weight(given: GraphInput, program: Program) -> bool:
    fetched = {stay.name for stay in program.transfers.stays if stay.kind == "weight"}
    return given.kind == "weight" or (given.kind == "copy" and given.name in fetched)


def _program(name: str, capture: Capture, graph: fx.Graph, transfers: Transfers, plan: Plan) -> Program:
    base = name.partition("_")[0]
    returned, copies = outputs(graph), [("copy", copy) for copy in transfers.copies]
    match base:
        case "prologue":
            state = [("hoisted", value.node) for value in plan.hoist.values]
        case "probe":
            assert plan.probe is not None
            handed = [("handed", value.node) for value in plan.probe.handed]
            state = [("change", INDICATOR), ("indicator", INDICATOR), *handed]
        case _:
            kept = {slot.name for slot in transfers.made if slot.handed_on and slot.release is None}
            made = [slot.name for slot in plan.made_by(base)]
            state = [("copy" if slot in kept else "slot", slot) for slot in made] + copies
    state += [("next", weight) for weight in transfers.for_next]
    if transfers.moves:
        graph.set_codegen(BoxedCodeGen())
    graph_module = fx.GraphModule(modules_of(capture, graph), graph, class_name=name.capitalize())
    inputs = tuple(map(input_of, placeholders(graph)))
    return Program(name, graph_module, inputs, len(returned) - len(state), tuple(state), transfers)  # type: ignore[arg-type]


def modules_of(capture: Capture, graph: fx.Graph) -> dict[str, Any]:
    """What a graph's nodes call by name: the capture's opaque submodules and subgraphs, and chunked regions."""
    return {
        str(node.target): node.meta["lightcache_region"]
        if "lightcache_region" in node.meta
        else operator.attrgetter(str(node.target))(capture.graph_module)
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }


@dataclass(frozen=True)
class Moment:
    """Where in its run a call stands.

    Attributes:
        peers: what the guidance branches of its step keep, by their places in the step.
        calls_left: how many calls of the model follow in the run, where that is known.
        is_last_step: whether its branch is known not to be called again.
        coefficients: of extrapolated slots, as `extrapolation.coefficients` gives them, by the input's name.
        following: the program that is expected to run next, of another model.
        handed: takes the copies that are fetched for it.
    """

    peers: Sequence[Stores] = ()
    calls_left: int | None = None
    is_last_step: bool = False
    coefficients: Mapping[str, Sequence[float]] = field(default_factory=dict)
    following: BoundProgram | None = None
    handed: Copies | None = None


_NOWHERE = Moment()


class BoundProgram:
    """A program and where its inputs come from in one live module, so that a call is a list of lookups.

    Weights are looked up in the module's own tables at every call: `.to()`, fused adapters and in-place edits are seen.
    A copy that the program before was to hand over and did not is fetched now: slower, and as right. What is fetched
    for a call that does not come, because the run ends before, is not: its program gets an empty tensor to copy.

    Attributes:
        late_copies: how many copies were to be handed over and were not.
        runs: how often it has run to its end.
        compiled: what runs the graph: `eager` is one operator after the other.
        slot_buffers: where it writes the slots that it makes; None where they are made anew each time.
    """

    def __init__(
        self,
        program: Program,
        module: nn.Module,
        constants: Mapping[str, torch.Tensor],
        user_names: Sequence[str],
        resident: frozenset[str] = frozenset(),
        settings: Compile | None = None,
        packages: Packages | None = None,
        beside: BoundProgram | None = None,
    ) -> None:
        self.program = program
        self._tables = weight_slots(module)
        index = {name: i for i, name in enumerate(user_names)}
        self._weights = [self._tables[i.name] for i in program.inputs if i.kind == "weight"]
        keys: dict[str, Mapping[str, Any]] = {"constant": constants, "user": index}
        nodes = placeholders(program.graph_module.graph)
        self._keys: list[tuple[fx.Node, Any]] = [
            (node, keys[i.kind][i.name] if i.kind in keys else i.name)
            for node, i in zip(nodes, program.inputs, strict=True)
        ]
        named = zip(nodes, program.inputs, strict=True)
        self.user_inputs = [index[i.name] for node, i in named if i.kind == "user" and not is_only_measured(node)]
        self.fetched = {stay.name for stay in program.transfers.stays if stay.kind == "weight"}
        self._history = {stay.name for stay in program.transfers.stays if stay.kind == "history"}
        self._of_others = {stay.name: stay for stay in program.transfers.stays if stay.branch is not None}
        self._ahead = {s.name: s.ahead for s in program.transfers.stays if s.is_for_later and s.kind != "next"}
        self._sent_away = {slot.name for slot in program.transfers.made if slot.release is not None}
        again = {stay.name for stay in program.transfers.stays if stay.prefetch is not None and stay.reads}
        self._only_for_later = self._sent_away - again
        self.late_copies = 0
        self.runs = 0
        self.slots_read = {i.name for i in program.inputs if i.kind == "slot" and i.name not in self._of_others} | {
            stay.name for stay in program.transfers.stays if stay.kind == "slot" and stay.branch is None
        }
        self._run: Callable[..., Sequence[torch.Tensor]] = program.graph_module.forward
        self.compile_state: CompileState | None = None
        self.slot_buffers: SlotBuffers | None = None
        self._buffers: list[int] = []
        if settings is not None and program.name != "prologue":  # which runs once a generation: no compiler pays off
            graph_module = program.graph_module
            if not program.transfers.moves and has_cuda_graphs(settings, map(_value, nodes)):
                graph_module = self._with_slot_buffers(beside)
            self._run, self.compile_state = lower(graph_module, settings, program.name, packages)
        self.keep_resident(resident)

    def _with_slot_buffers(self, beside: BoundProgram | None) -> fx.GraphModule:
        """The program, with buffers for the slots that it makes as more arguments; the program itself without any.

        They are those of the full program `beside`, where there is one: what reads a slot finds it at one address.
        """
        program = self.program
        places = {name: program.num_outputs + i for i, (kind, name) in enumerate(program.state) if kind == "slot"}
        if not places:
            return program.graph_module
        if beside is not None and beside.slot_buffers is not None:
            self.slot_buffers, all_names = beside.slot_buffers, [name for _, name in beside.program.state]
            self._buffers = [all_names.index(name) for name in places]
        else:
            returned = outputs(program.graph_module.graph)
            self.slot_buffers = SlotBuffers([_value(returned[place]) for place in places.values()])
            self._buffers = list(range(len(places)))
        return writing_to_buffers(program.graph_module, list(places.values()))

    @property
    def compiled(self) -> str:
        """By what it is compiled, and how much of it has been: `eager`, or `inductor: 3 of 4 parts`."""
        return "eager" if self.compile_state is None else str(self.compile_state)

    def keep_resident(self, names: frozenset[str]) -> None:
        """Let copies of these weights, and of no others, stay on the device as long as the model is there."""
        self.resident = names
        self._sources: list[tuple[str, Any, torch.Tensor]] = [
            (_source_kind(node, names), key, node.meta["val"]) for node, key in self._keys
        ]
        self.wanted = names | {i.name for i in self.program.inputs if i.kind == "copy"}

    def elsewhere(self, resident: frozenset[str]) -> set[str]:
        """Weights that are not where the program computes, and that it would read as they are, were those resident."""
        read = [(name, node.meta["val"]) for node, name in self._keys if _source_kind(node, resident) == "weight"]
        return {name for name, like in read if self.weight(name).device != like.device}

    def first_needs(self) -> dict[str, torch.Tensor]:
        """Fake tensors like the weights whose copies a call finds on the device as it begins, in order of first use."""
        order = {node: place for place, node in enumerate(self.program.graph_module.graph.nodes)}
        found = [
            (min(order[user] for user in node.users), name, like)
            for (node, _), (kind, name, like) in zip(self._keys, self._sources, strict=True)
            if node.users and (kind == "resident" or (kind == "copy" and name in self.fetched))
        ]
        return {name: like for _, name, like in sorted(found, key=lambda entry: entry[0])}

    def weights(self) -> list[torch.Tensor]:
        """The weights that the program reads, as they are now, but for those that are handed over."""
        return [table[name] for table, name in self._weights]

    def __call__(
        self, tensors: Sequence[torch.Tensor], stores: Stores, moment: Moment = _NOWHERE
    ) -> list[torch.Tensor]:
        """Run once; what the program returns beside the model's outputs goes into the stores."""
        stores.weight_copies.keep_only(self.wanted)
        sources = self._sources
        args = [self._argument(kind, key, like, tensors, stores, moment) for kind, key, like in sources]
        for place, (kind, _, _) in enumerate(sources):
            if kind == "resident":  # all of them have been begun by now
                WAIT(args[place])
        versions = {
            name: version_of(self.weight(name)) for name in self.program.transfers.copies if name in self.fetched
        }
        following = moment.following
        versions_of_next = {
            name: version_of(following.weight(name)) for name in self.program.transfers.for_next if following
        }
        if self.slot_buffers is not None:
            buffers = self.slot_buffers.of(stores)
            args += [buffers[place] for place in self._buffers]
        results = list(self._run(args) if self.program.transfers.moves else self._run(*args))
        del args
        outputs, state = results[: self.program.num_outputs], results[self.program.num_outputs :]
        for (kind, name), value in zip(self.program.state, state, strict=True):
            if kind == "hoisted":
                stores.hoisted = {**stores.hoisted, name: value}
            elif kind == "handed":
                stores.handed[name] = value
            elif kind == "change":
                stores.change = value
            elif kind == "indicator":
                stores.newest = value
            elif kind == "slot":
                if not (moment.is_last_step and name in self._only_for_later):
                    stores.put_slot(name, value, at_home=name in self._sent_away)
            elif not value.numel():
                continue  # fetched for nobody
            elif kind == "next":
                assert moment.handed is not None
                moment.handed.put(name, value, versions_of_next[name])
            elif name in self.fetched:
                stores.weight_copies.put(name, value, versions[name])
            elif name in self._of_others:
                self._other_stores(name, moment).slot_copies.put(self._of_others[name].slot, value, SLOT)
            elif not (moment.is_last_step and name in self._only_for_later):
                stores.slot_copies.put(name, value, SLOT)
        return outputs

    def _for_later(self, name: str, stores: Stores, moment: Moment) -> torch.Tensor:
        """What to fetch for a later call; an empty tensor where that will not come, or has no need."""
        found: torch.Tensor | None = None
        if moment.calls_left is not None and self._ahead[name] > moment.calls_left:
            pass
        elif name in self.fetched:
            found = self.weight(name)
        elif name not in self._of_others:
            found = stores.slots[name]
        elif self._of_others[name].branch in range(len(moment.peers)):
            peer, slot = self._other_stores(name, moment), self._of_others[name].slot
            found = peer.slots[slot] if slot in peer.at_home and slot not in peer.slot_copies else None
        return torch.empty(0) if found is None else found

    def _other_stores(self, name: str, moment: Moment) -> Stores:
        """What the branch keeps that a slot belongs to."""
        branch = self._of_others[name].branch
        assert branch is not None
        return moment.peers[branch]

    def _passing(self, name: str, stores: Stores) -> torch.Tensor:
        """A copy on its way to a later call; where it is not, that call fetches it if it comes."""
        if name in self.fetched:
            copy = stores.weight_copies.take(name, version_of(self.weight(name)))
        else:
            copy = stores.slot_copies.take(name, SLOT)
        return torch.empty(0) if copy is None else copy

    def _argument(
        self,
        kind: str,
        key: Any,
        like: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        stores: Stores,
        moment: Moment,
    ) -> torch.Tensor:
        match kind:
            case "weight":
                return self.weight(key)
            case "away":
                return self.weight(key) if key in self.fetched else stores.slots[key]
            case "later":
                return self._for_later(key, stores, moment)
            case "passing":
                return self._passing(key, stores)
            case "next":
                return _as_planned(moment.following, key, like)
            case "resident":
                return self._resident(key, like, stores)
            case "copy":
                return self._copy(key, like, stores)
            case "home":
                if moment.is_last_step and key in self._only_for_later:
                    return torch.empty(0, dtype=torch.uint8)
                assert stores.buffer is not None
                return stores.buffer(like.numel())
            case "user":
                found: torch.Tensor = tensors[key]
            case "constant":
                found = key
            case _:
                found = _state(kind, key, like, stores, moment)
        return found

    def weight(self, name: str) -> torch.Tensor:
        """A weight of the module, as it is now."""
        table, key = self._tables[name]
        found: torch.Tensor = table[key]
        return found

    def _copy(self, name: str, like: torch.Tensor, stores: Stores) -> torch.Tensor:
        """The device's copy of a weight or slot, handed over or begun now; nobody else holds it afterwards."""
        if name in self._history:
            return stores.copy_of_older(*slot_and_age(name), like)
        if name not in self.fetched:
            copy, source = stores.slot_copies.take(name, SLOT), stores.slots.get(name)
        else:
            source = self.weight(name)
            copy = stores.weight_copies.take(name, version_of(source))
        if copy is not None:
            return copy
        self.late_copies += 1
        assert source is not None
        late: torch.Tensor = PREFETCH(source, like.device, name)
        return late

    def _resident(self, name: str, like: torch.Tensor, stores: Stores) -> torch.Tensor:
        """The device's copy of a weight that is there as long as the model is; it stays in the stores."""
        weight = self.weight(name)
        version = version_of(weight)
        copy = stores.weight_copies.take(name, version)
        copy = PREFETCH(weight, like.device, name) if copy is None else copy
        stores.weight_copies.put(name, copy, version)
        return copy


def _value(node: fx.Node) -> torch.Tensor:
    """The fake tensor that a node stands for."""
    found: torch.Tensor = node.meta["val"]
    return found


def _state(kind: str, key: str, like: torch.Tensor, stores: Stores, moment: Moment) -> torch.Tensor:
    """What an earlier program has left on the device, or what it is weighed by."""
    match kind:
        case "slot":
            return stores.slot_on_device(key, like.device)
        case "history":
            return stores.older(*slot_and_age(key), like)
        case "coefficients":
            return as_tensor(moment.coefficients[key], like.device)
        case "handed":
            return stores.handed[key]
        case "indicator":
            return stores.indicator_like(like)
        case _:
            return stores.hoisted[key]


def _as_planned(following: BoundProgram | None, name: str, like: torch.Tensor) -> torch.Tensor:
    """A weight for the program that runs next, to be copied; an empty tensor where it is not as it was planned for."""
    found = following.weight(name) if following is not None else None
    if found is None or (found.shape, found.stride(), found.dtype) != (like.shape, like.stride(), like.dtype):
        return torch.empty(0)
    return found


def _source_kind(node: fx.Node, resident: frozenset[str]) -> str:
    """As the input's kind, but by what is done with it.

    `away` for what is fetched, `later` for what is fetched for another program alone, `passing` for a copy that nothing
    reads here, and `resident` for a weight whose copy stays.
    """
    given, users = input_of(node), list(node.users)
    if given.kind in ("weight", "slot") and users and all(user.target is PREFETCH for user in users):
        readers = {reader.op for user in users for reader in user.users}
        return "later" if readers == {"output"} else "away"
    if given.kind == "copy" and all(user.op == "output" for user in users):
        return "passing"
    return "resident" if given.kind == "weight" and given.name in resident else given.kind

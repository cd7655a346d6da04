"""Swapping: a program fetches weights and slots just before it needs them, and sends away what it made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import fx

from lightcache_fx.errors import PassError
from lightcache_fx.graphs import (
    GraphInput,
    InputKind,
    alias_root,
    calls,
    input_of,
    is_impure,
    is_or_views,
    num_bytes,
    output_node,
    outputs,
    placeholders,
)
from lightcache_fx.passes.base import PassResult, find_kept
from lightcache_fx.transfers import OFFLOAD, PREFETCH, RELEASE, WAIT

MovableKind = Literal["weight", "slot", "history", "next"]


@dataclass(frozen=True)
class LocalStay:
    """A stretch of one program during which a weight or a slot is on the device.

    Attributes:
        name: of the weight or slot.
        kind: which of the two; or `history`: an older value of a slot; or `next`: a weight of the model that runs next,
            which is only fetched here.
        prefetch: the node before which a copy to the device is begun; None where the caller hands the copy over.
        reads: the nodes that read it, in order; none where it only passes through, or is fetched for the next program.
        handed_on: whether the copy is returned, for the program that runs next.
        ahead: of what is fetched here and not read here: how many calls of the model later it is.
        branch: of a slot of another guidance branch, which is only fetched here: that branch's place in the step. The
            name is then that of `slot` and of the branch.
    """

    name: str
    kind: MovableKind
    prefetch: str | None
    reads: tuple[str, ...]
    handed_on: bool = False
    ahead: int = 0
    branch: int | None = None

    @property
    def is_for_later(self) -> bool:
        """Whether it is fetched here for a later program alone."""
        return self.prefetch is not None and self.handed_on and not self.reads

    @property
    def slot(self) -> str:
        """The slot's name in the programs of its own branch."""
        return self.name if self.branch is None else self.name.removesuffix(f"@{self.branch}")


@dataclass(frozen=True)
class MadeSlot:
    """A slot that the program makes.

    Attributes:
        name: of the slot.
        release: the node behind which its copy from the device must have ended; None where it is not sent away.
        handed_on: whether the device's own copy is returned, for the program that runs next.
    """

    name: str
    release: str | None
    handed_on: bool


@dataclass(frozen=True)
class Transfers:
    """All copies of one program.

    Attributes:
        stays: of weights and slots, in the order in which their copies are begun.
        made: slots, in the order in which the program returns them.
    """

    stays: tuple[LocalStay, ...] = ()
    made: tuple[MadeSlot, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether the program is rewritten at all."""
        return bool(self.stays) or any(slot.release is not None for slot in self.made)

    @property
    def copies(self) -> tuple[str, ...]:
        """Names of the copies that the program returns behind its slots, in order."""
        return tuple(stay.name for stay in self.stays if stay.handed_on and stay.kind != "next") + tuple(
            slot.name for slot in self.made if slot.handed_on and slot.release is not None
        )

    @property
    def for_next(self) -> tuple[str, ...]:
        """Names of the copies for the model that runs next, which the program returns last, in order."""
        return tuple(stay.name for stay in self.stays if stay.kind == "next")


def insert_transfers(
    graph: fx.Graph, *, plan: Transfers, others: Mapping[tuple[str, str], torch.Tensor] = MappingProxyType({})
) -> PassResult:
    """Weight and feature swapping, as nodes (after the offload of vDNN, Rhu et al. 2016, planned ahead).

        %w = weight "w"                        %w = weight "w"                                        (1) fetched
        %a = op_a(%x)                   ->     %w_arriving = lightcache.prefetch(%w, device, "w"); %a = op_a(%x)
        %b = op_b(%a, %w)                      %w_here = lightcache.wait(%w_arriving); %b = op_b(%a, %w_here)

        %b = op_b(%a, %w)               ->     %w_copy = copy "w"                                     (2) handed over
                                               %w_here = lightcache.wait(%w_copy); %b = op_b(%a, %w_here)
        return (%y,)                    ->     return (%y, %w_here)                                   (3) handed on

        %h = op(%x)                            %h_home = home "h"; %h = op(%x)                        (4) sent away
        %y = op_y(%z)                   ->     %h_leaving = lightcache.offload(%h, %h_home, "h"); %y = op_y(%z)
        return (%y, %h)                        %h_gone = lightcache.release(%h_leaving, %h); return (%y, %h_gone)

        %z = op_z(%y, %h)               ->     %h_arriving = lightcache.prefetch(%h_gone, device, "h")   (5) read again
                                               %h_here = lightcache.wait(%h_arriving); %z = op_z(%y, %h_here)

    An older value of a slot (`history`) is handed over, as in (2), by a caller who begins the copy.

    What a program fetches for the next one alone has an input of its own, so that a caller who knows that there is no
    next one gives an empty tensor there. It need not be something that the program reads: `others` has (fake) tensors
    of such weights and slots, and of weights of the model that runs next, by kind and name. Views of a weight are made
    again beside each use, or they would hold its memory between its stays. Tier: bitwise. Invariants: the model's
    outputs stay first, slots follow in their order, then copies that are handed on, those for another model last.
    """
    if not plan.moves:
        return PassResult(graph, False)
    if any(input_of(node).kind in ("copy", "home") for node in placeholders(graph)) or any(
        node.target is PREFETCH for node in calls(graph)
    ):
        raise PassError("insert_transfers: this graph has transfers already; apply it to a copy of the program")
    inserter = _Inserter(graph, others)
    returned = list(outputs(graph))
    kept = []
    for slot in plan.made:
        index, node = inserter.made(slot.name)
        if slot.release is not None:
            returned[index] = inserter.send_away(slot.name, node, slot.release)
            kept += [node] if slot.handed_on else []
    begun = [*map(inserter.begin, plan.stays)]  # all of them first: no copy is begun behind a wait at its place
    copies = [inserter.read(stay, copy) for stay, copy in zip(plan.stays, begun, strict=True)]
    handed = [(stay, copy) for copy, stay in zip(copies, plan.stays, strict=True) if stay.handed_on]
    own, following = ([copy for stay, copy in handed if (stay.kind == "next") == is_next] for is_next in (False, True))
    output_node(graph).args = ((*returned, *own, *kept, *following),)
    inserter.clean_up()
    fetched = sum(stay.prefetch is not None for stay in plan.stays)
    sent = sum(slot.release is not None for slot in plan.made)
    return PassResult(graph, True, {"fetched": fetched, "handed over": len(plan.stays) - fetched, "sent away": sent})


class _Inserter:
    """One graph while transfers are put into it."""

    def __init__(self, graph: fx.Graph, others: Mapping[tuple[str, str], torch.Tensor]) -> None:
        self.graph = graph
        self.others = others
        self.by_name = {node.name: node for node in graph.nodes}
        self.inputs = {(input_of(n).kind, input_of(n).name): n for n in placeholders(graph)}
        self.last_input = placeholders(graph)[-1]
        self.gone: dict[str, tuple[fx.Node, fx.Node]] = {}
        """Slots that this program has sent away, and from where it may fetch them again."""

    def begin(self, stay: LocalStay) -> fx.Node:
        """The copy of one stay, not yet whole."""
        key = stay.kind, stay.name
        _, gone = self._sent_away(stay)
        source = self.inputs.get(key, gone)
        if source is not None:
            value, name = source.meta["val"], source.name
        elif key in self.others:
            value, name = self.others[key], _identifier(stay.name)
        else:
            raise _unknown(stay.kind, stay.name)
        if stay.prefetch is None:
            return self._input("copy", stay.name, f"{name}_copy", value)
        before = find_kept(self.by_name, stay.prefetch, "insert_transfers")
        if source is None:
            source = self.inputs[key] = self._input(stay.kind, stay.name, name, value)
        elif stay.is_for_later and source.op == "placeholder":
            source = self._input(stay.kind, stay.name, f"{name}_later", value)
        with self.graph.inserting_before(before):
            copy = self._call(PREFETCH, (source, value.device, stay.name), f"{name}_arriving", before)
        copy.meta["val"] = torch.empty_like(value)
        return copy

    def read(self, stay: LocalStay, copy: fx.Node) -> fx.Node:
        """Let what reads the weight within a stay read its copy, once that is whole; returns the copy to hand on."""
        if not stay.reads:
            return copy
        made, _ = self._sent_away(stay)
        source = self.inputs.get((stay.kind, stay.name), made)
        if source is None:
            raise _unknown(stay.kind, stay.name)
        reads = [find_kept(self.by_name, name, "insert_transfers") for name in stay.reads]
        with self.graph.inserting_before(reads[0]):
            here = self._call(WAIT, (copy,), f"{source.name}_here", reads[0])
        here.meta["val"] = source.meta["val"]
        for reader in reads:
            self._read_from(reader, source, here)
        return here

    def _sent_away(self, stay: LocalStay) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
        """Of a slot that this program makes and sends away: the slot, and from where it may be fetched again."""
        return self.gone.get(stay.name, (None, None)) if stay.kind == "slot" else (None, None)

    def _read_from(self, reader: fx.Node, source: fx.Node, here: fx.Node) -> None:
        """Let one call read a copy, through views of its own where it read views."""
        for argument in dict.fromkeys(reader.all_input_nodes):
            lives_in = alias_root(argument) is source if source.op == "placeholder" else is_or_views(argument, source)
            if not lives_in:
                continue
            stand_ins = {source: here}
            for view in _views_between(source, argument):
                with self.graph.inserting_before(reader):
                    again = self.graph.node_copy(view, _renaming(stand_ins))
                again.meta = dict(view.meta)
                stand_ins[view] = again
            reader.replace_input_with(argument, stand_ins[argument])

    def made(self, name: str) -> tuple[int, fx.Node]:
        """A slot's place among the outputs, and its node."""
        for index, node in enumerate(outputs(self.graph)):
            if isinstance(node, fx.Node) and node.meta.get("lightcache_slot") == name:
                return index, node
        raise _unknown("returned slot", name)

    def send_away(self, name: str, node: fx.Node, release: str) -> fx.Node:
        """Copy a slot into its buffer behind the node that makes it; returns the buffer, whole."""
        behind = find_kept(self.by_name, release, "insert_transfers")
        with torch.no_grad():
            bytes_ = node.meta["val"].new_empty((num_bytes(node),), dtype=torch.uint8)
        home = self._input("home", name, f"{node.name}_home", bytes_)
        with self.graph.inserting_after(node):
            leaving = self._call(OFFLOAD, (node, home, name), f"{node.name}_leaving", node)
        with self.graph.inserting_after(behind if behind > node else leaving):  # it may be what a slot is taken out of
            gone = self._call(RELEASE, (leaving, node), f"{node.name}_gone", node)
        leaving.meta["val"] = gone.meta["val"] = node.meta["val"]
        self.gone[name] = node, gone
        return gone

    def clean_up(self) -> None:
        """Remove the original views of what moves, which would hold it, and inputs that nothing reads any more."""
        moved = {node for node in self.inputs.values() if input_of(node).kind in ("weight", "slot", "history")}
        for node in reversed(list(calls(self.graph))):
            if node.users or is_impure(node):
                continue
            if alias_root(node) in moved or any(is_or_views(node, made) for made, _ in self.gone.values()):
                self.graph.erase_node(node)
        for node in moved:
            if not node.users:
                self.graph.erase_node(node)

    def _input(self, kind: InputKind, name: str, node_name: str, value: torch.Tensor) -> fx.Node:
        with self.graph.inserting_after(self.last_input):
            node = self.graph.placeholder(node_name)
        node.target = node.name  # which is unique: names of weights that differ may be the same as names of nodes
        node.meta = {
            "val": value,
            "lightcache_input": GraphInput(kind, name, "const" if kind in ("weight", "next") else "latent"),
        }
        self.last_input = node
        return node

    def _call(self, target: torch._ops.OpOverload, args: tuple[object, ...], name: str, like: fx.Node) -> fx.Node:
        node = self.graph.create_node("call_function", target, args, name=name)  # type: ignore[arg-type]
        node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
        return node


def _views_between(source: fx.Node, view: fx.Node) -> Iterator[fx.Node]:
    """The views that lead from a value to a view of it, in order."""
    chain = []
    while view is not source:
        chain.append(view)
        found = view.args[0]
        assert isinstance(found, fx.Node)
        view = found
    return reversed(chain)


def _unknown(kind: str, name: str) -> PassError:
    return PassError(f"insert_transfers: the program has no {kind} {name!r}; was it planned for another?")


def _renaming(stand_ins: Mapping[fx.Node, fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda node: stand_ins.get(node, node)


def _identifier(name: str) -> str:
    """A weight's name as that of a node."""
    return re.sub(r"\W", "_", name)

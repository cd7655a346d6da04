"""Chunking: a stretch of the graph becomes one node that runs it chunk by chunk along one axis."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import fx

from lightcache_fx.axes import Axis
from lightcache_fx.chunked import allocated, build_region
from lightcache_fx.errors import PassError
from lightcache_fx.flops import count_flops
from lightcache_fx.graphs import calls, copy_graph, describe
from lightcache_fx.in_place import Overwrite, laid_out_alike, why_not
from lightcache_fx.passes.base import Pass, PassResult, run_passes
from lightcache_fx.passes.recompute_values import recompute_values
from lightcache_fx.passes.record_layouts import record_layouts
from lightcache_fx.passes.split_group_norm import split_group_norm
from lightcache_fx.regions import Blocked, Region, full_value, trace_region


@dataclass(frozen=True)
class PlannedRegion:
    """What the planner decided: nodes `first` to `last`, by name, in `count` chunks.

    Attributes:
        axis: how the last value that leaves them is cut.
        bodies: how each of the chunks' bodies is cut in turn; empty where it is not.
        overwrites: outputs that are written over inputs.
    """

    first: str
    last: str
    axis: Axis
    count: int
    bodies: tuple[Chunking, ...] = ()
    overwrites: tuple[Overwrite, ...] = ()


@dataclass(frozen=True)
class Chunking:
    """Everything that is done to one graph: GroupNorms to split and values to recompute, by name; then its regions."""

    split_norms: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    regions: tuple[PlannedRegion, ...] = ()

    def apply(self, graph: fx.Graph) -> None:
        """Carry it out."""
        passes: list[tuple[str, Pass]] = [
            ("split_group_norm", partial(split_group_norm, names=self.split_norms)),
            ("recompute_values", partial(recompute_values, names=self.recomputed)),
            *([("record_layouts", record_layouts)] if self.split_norms else []),
            ("chunk_regions", partial(chunk_regions, regions=self.regions)),
        ]
        run_passes(graph, passes)


def chunk_regions(graph: fx.Graph, *, regions: Sequence[PlannedRegion]) -> PassResult:
    """Replace stretches of nodes by loops over chunks (AutoChunk, Zhao et al. 2024, with halos and several axes).

        %a = aten.linear(%x, %w)                 %region_0 = region "dim 0: [64] in 4 chunks"(%x, %w, %v) {
        %b = aten.gelu(%a)                ->         %a = aten.linear(%x, %w); %b = aten.gelu(%a)
        %c = aten.linear(%b, %v)                     %c = aten.linear(%b, %v) }
                                                 %c_1 = getitem(%region_0, 0)

    Tier: float rounding (bitwise where the body only moves data or is plain arithmetic). Invariants: what a chunk needs
    whole is computed before the region; outputs keep their shapes and the order of their strides; an output is written
    over an input only where nobody reads the input afterwards.
    """
    flops_of = count_flops(graph) if regions else {}
    for number, planned in enumerate(regions):
        region = find_region(graph, planned)
        _insert(graph, region, f"region_{number}", planned, flops_of)
    return PassResult(graph, bool(regions), {"regions": len(regions)})


def find_region(graph: fx.Graph, planned: PlannedRegion) -> Region:
    """The region that a plan names, in this graph."""
    by_name = {node.name: node for node in graph.nodes}
    missing = next((name for name in (planned.first, planned.last) if name not in by_name), None)
    if missing is not None:
        raise PassError(f"chunk_regions: the graph has no node %{missing}; was the plan made for another graph?")
    try:
        stretch = stretch_between(by_name[planned.first], by_name[planned.last])
        return trace_region(stretch, planned.axis)
    except Blocked as error:
        raise PassError(
            f"chunk_regions: cannot cut %{planned.first} .. %{planned.last} along {planned.axis}: {error}"
        ) from error


def stretch_between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The calls from one node to another, both included."""
    nodes = list(calls(first.graph))
    return nodes[nodes.index(first) : nodes.index(last) + 1]


def chunked_copy(graph: fx.Graph, chunking: Chunking) -> fx.GraphModule:
    """A copy of a graph with everything carried out; what it calls by name is found in the graph's own module."""
    copied, _ = copy_graph(graph)
    chunking.apply(copied)
    modules = {
        str(node.target): node.meta["lightcache_region"]
        if "lightcache_region" in node.meta
        else operator.attrgetter(str(node.target))(graph.owning_module)
        for node in copied.nodes
        if node.op in ("call_module", "get_attr")
    }
    return fx.GraphModule(modules, copied, class_name="Chunked")


def _check_overwrites(graph: fx.Graph, region: Region, planned: PlannedRegion, found: tuple[Overwrite, ...]) -> None:
    """Refuse to write over what is read later, returned, not the program's own, or shared by inputs."""
    where = f"chunk_regions: %{planned.first} .. %{planned.last}"
    if found != planned.overwrites:
        raise PassError(f"{where}: the plan writes {planned.overwrites} over inputs, here only {found} can be")
    place = {node: index for index, node in enumerate(graph.nodes)}
    last = next(place[node] for node in graph.nodes if node.name == planned.last)
    for source in (region.inputs[overwrite.input] for overwrite in found):
        reason = why_not(source, region, place, last)
        if reason:
            raise PassError(f"{where}: cannot write over {describe(source)}: {reason}")
    for overwrite in found:
        source, output = region.inputs[overwrite.input], region.outputs[overwrite.output]
        if not laid_out_alike(full_value(source), allocated(output)):
            raise PassError(f"{where}: cannot write %{output.name} over {describe(source)}: their layouts differ")


def _insert(graph: fx.Graph, region: Region, name: str, planned: PlannedRegion, flops_of: dict[fx.Node, int]) -> None:
    pairs = [(over.output, over.input) for over in planned.overwrites if over.input < len(region.inputs)]
    module = build_region(region, planned.count, flops_of, candidates=pairs)
    module.name = name
    _check_overwrites(graph, region, planned, module.overwrites)
    for index, chunking in enumerate(planned.bodies):
        module.replace_body(index, chunked_copy(module.body(index).graph, chunking))
    if graph.owning_module is not None:
        graph.owning_module.add_submodule(name, module)
    last = next(node for node in graph.nodes if node.name == planned.last)
    with graph.inserting_after(last):
        call = graph.create_node("call_module", name, tuple(region.inputs), name=name)
    call.meta = {
        "val": tuple(map(allocated, region.outputs)),
        "nn_module_stack": region.outputs[-1].meta.get("nn_module_stack", {}),
        "lightcache_region": module,
        "lightcache_flops": module.flops,
    }
    after = call
    for index, node in enumerate(region.outputs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, index))
        after.meta = {"val": call.meta["val"][index], "nn_module_stack": node.meta.get("nn_module_stack", {})}
        if "lightcache_slot" in node.meta:
            after.meta["lightcache_slot"] = node.meta["lightcache_slot"]
        node.replace_all_uses_with(after, delete_user_cb=lambda user: user not in region.axes)
    for node in reversed(region.body):
        graph.erase_node(node)

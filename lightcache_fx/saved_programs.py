"""Programs as records and archives, and back: graphs, the regions in them, and the bodies of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx, nn

from lightcache_fx.archives import REGION, read_archive, write_archive
from lightcache_fx.chunked import ChunkedRegion
from lightcache_fx.direct_writes import marked_as_written, written_by
from lightcache_fx.errors import LoadError
from lightcache_fx.graphs import GraphInput, placeholders
from lightcache_fx.manifest import (
    AllocationRecord,
    BodyRecord,
    ProgramRecord,
    RegionRecord,
    state_of,
)
from lightcache_fx.program import Program
from lightcache_fx.saved_checks import check_region

Files = dict[str, bytes]


def record_program(program: Program, number: int, files: Files) -> ProgramRecord:
    """A program of signature `number` as a record; its archives are added to `files`.

    Raises:
        SaveError: its graph cannot be written.
    """
    stem = f"signature_{number}.{program.name}"
    graph = program.graph_module.graph
    files[f"{stem}.pt2"] = write_archive(graph, _identity(stem))
    return ProgramRecord(
        file=f"{stem}.pt2",
        inputs=program.inputs,
        num_outputs=program.num_outputs,
        state=state_of(program),
        regions=_record_regions(graph, stem, files),
    )


def _record_regions(graph: fx.Graph, stem: str, files: Files) -> dict[str, RegionRecord]:
    return {
        str(node.target): _record_region(node.meta["lightcache_region"], f"{stem}.{node.target}", files)
        for node in graph.nodes
        if "lightcache_region" in node.meta
    }


def _record_region(region: ChunkedRegion, stem: str, files: Files) -> RegionRecord:
    bodies = []
    for index in range(len(region.bodies)):
        graph, name = region.body(index).graph, f"{stem}.body_{index}"
        files[f"{name}.pt2"] = write_archive(graph, _identity(name))
        bodies.append(
            BodyRecord(
                file=f"{name}.pt2",
                regions=_record_regions(graph, name, files),
                writes=written_by(graph),
                copied=tuple(bool(node.meta["lightcache_copied"]) for node in placeholders(graph)),
            )
        )
    return RegionRecord(
        bodies=tuple(bodies),
        chunks=region.chunks,
        outputs=tuple(map(AllocationRecord.of, region.outputs)),
        overwrites=region.overwrites,
        label=region.label,
        flops=region.flops,
    )


def _identity(stem: str) -> dict[str, object]:
    return {"program": stem}


Read = Callable[[str], bytes]
"""The content of a file of the folder, by name."""


def rebuild_program(name: str, record: ProgramRecord, read: Read) -> Program:
    """A program from its record.

    Raises:
        LoadError: the record and the archives do not fit each other.
    """
    graph = _read_graph(record.file, read)
    nodes = placeholders(graph)
    if len(nodes) != len(record.inputs):
        raise LoadError(
            f"{record.file}: the graph has {len(nodes)} inputs, expected {len(record.inputs)} by its record"
        )
    for node, given in zip(nodes, record.inputs, strict=True):
        node.meta["lightcache_input"] = given
    modules = _insert_regions(graph, record.regions, record.file, read)
    graph_module = fx.GraphModule(modules, graph, class_name=name.capitalize())
    return Program(name, graph_module, record.inputs, record.num_outputs, record.state)


def _read_graph(file: str, read: Read) -> fx.Graph:
    return read_archive(read(file), file, _identity(file.removesuffix(".pt2")))


def _insert_regions(
    graph: fx.Graph, records: Mapping[str, RegionRecord], file: str, read: Read
) -> dict[str, ChunkedRegion]:
    """Put the recorded regions in the places of the calls that name them."""
    modules: dict[str, ChunkedRegion] = {}
    for node in [node for node in graph.nodes if node.target is REGION]:
        inputs, name = node.args
        if name not in records or name in modules:
            raise LoadError(
                f"{file}: the graph has a region {name!r}, but its record has {', '.join(records) or 'none'}"
            )
        modules[name] = region = _rebuild_region(records[name], read)
        region.name = str(name)
        with graph.inserting_before(node):
            call = graph.create_node("call_module", name, tuple(inputs), name=node.name)
        call.meta = {
            **node.meta,
            "val": tuple(node.meta["val"]),
            "lightcache_region": region,
            "lightcache_flops": region.flops,
        }
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        call.name = name
        check_region(call, region, file)
    unused = next((name for name in records if name not in modules), None)
    if unused is not None:
        raise LoadError(f"{file}: its record has a region {unused!r}, but the graph has none of that name")
    return modules


def _rebuild_region(record: RegionRecord, read: Read) -> ChunkedRegion:
    bodies = []
    for body in record.bodies:
        graph = _read_graph(body.file, read)
        nodes = placeholders(graph)
        if len(nodes) != len(body.copied):
            raise LoadError(
                f"{body.file}: the graph has {len(nodes)} inputs, expected {len(body.copied)} by its record"
            )
        for node, is_copied in zip(nodes, body.copied, strict=True):
            node.meta["lightcache_input"] = GraphInput("user", str(node.target), "latent")
            node.meta["lightcache_copied"] = is_copied
        if body.writes is not None:
            marked_as_written(graph, body.writes)
        modules = _insert_regions(graph, body.regions, body.file, read)
        root: nn.Module | dict[str, ChunkedRegion] = modules or nn.Module()
        bodies.append(fx.GraphModule(root, graph, class_name="Body"))
    allocations = tuple(made.allocation() for made in record.outputs)
    return ChunkedRegion(
        bodies, record.chunks, allocations, label=record.label, flops=record.flops, overwrites=record.overwrites
    )

"""Whether the parts of a saved module fit each other: plan and programs, programs and weights, regions and bodies.

Hashes tell a damaged file. These checks tell files that are whole and do not belong together, or have been edited, so
that a wrong result, a write outside of a tensor or to a weight cannot come of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from lightcache_fx.axes import Axis
from lightcache_fx.calls import CallLayout, InputLeaf
from lightcache_fx.chunked import Chunk, ChunkedRegion, Slice
from lightcache_fx.errors import LoadError
from lightcache_fx.extrapolation import coefficients_name, num_coefficients, older_name
from lightcache_fx.graphs import calls, input_of, outputs, placeholders, schema_of
from lightcache_fx.in_place import Overwrite, allocated_by
from lightcache_fx.passes.split_probe import INDICATOR
from lightcache_fx.plan import Plan
from lightcache_fx.program import Program

Type = tuple[tuple[int, ...], torch.dtype, torch.device]
"""Shape, dtype and device."""


def type_of(tensor: torch.Tensor) -> Type:
    """Shape, dtype and device."""
    return tuple(tensor.shape), tensor.dtype, tensor.device


def check_programs(
    file: str,
    programs: Mapping[str, Program],
    plan: Plan,
    layout: CallLayout,
    num_tensors: int,
    tensors: Mapping[tuple[str, str], Type],
    rate_of: Callable[[InputLeaf], str],
) -> None:
    """Raise a `LoadError` where a signature's programs do not fit its plan, its call, its output or the weights.

    Args:
        file: of the signature, for messages.
        programs: by name.
        plan: the decisions.
        layout: the call.
        num_tensors: how many tensors the output has.
        tensors: the types of weights and constants, by kind and name.
        rate_of: the rate that the policy gives an argument.
    """
    hoisted = [value.node for value in plan.hoist.values]
    probe = plan.probe
    least = (plan.policy.calls_per_step or 1) if layout.is_repeated else 1
    learns = layout.is_repeated and plan.policy.memory_budget is not None
    if plan.branches < least or (plan.branches > least and not learns):
        raise LoadError(f"{file}: its plan is for {plan.branches} calls a step, unlike the policy's {least}")
    if plan.cut is not None and plan.policy.cache is None:
        raise LoadError(f"{file}: its plan has a cut, unlike the policy")
    if plan.cut is not None and {slot.cache for slot in plan.slots} != set(range(len(plan.policy.caches))):
        raise LoadError(f"{file}: its plan keeps things for other caches than the policy has")
    if (probe is None) != (plan.policy.adaptive is None or plan.cut is None):
        raise LoadError(f"{file}: its plan has {'no' if probe is None else 'a'} probe, unlike the policy")
    expected = {*plan.programs, *(["prologue"] if hoisted else []), *(["probe"] if probe is not None else [])}
    if set(programs) != expected:
        raise LoadError(f"{file}: its plan is of programs {sorted(expected)}, but it has {sorted(programs)}")
    for leaf in layout.leaves:
        if rate_of(leaf) != leaf.rate:
            raise LoadError(f"{file}: {leaf.name} has rate {leaf.rate} there, but {rate_of(leaf)} by the policy")
    states = {name: [("slot", slot.name) for slot in plan.made_by(name)] for name in plan.programs}
    states["prologue"] = [("hoisted", name) for name in hoisted]
    if probe is not None:
        handed = [("handed", value.node) for value in probe.handed]
        states["probe"] = [("change", INDICATOR), ("indicator", INDICATOR), *handed]
    known = dict(tensors)
    for leaf, type_ in zip(layout.leaves, layout.tensor_types, strict=True):
        known["user", leaf.name] = type_.shape, type_.dtype, type_.device
    for name in ("prologue", "probe", *plan.programs):
        if name in programs:
            program = programs[name]
            state, num_outputs = states.get(name, []), 0 if name in ("prologue", "probe") else num_tensors
            if name == "probe" and len(returned := _returned(program)) > 1:
                known["indicator", INDICATOR] = type_of(returned[1].meta["val"])
            if name != "full" and name in plan.programs:
                known |= _known_of_history(plan, known)
            if list(program.state) != state or program.num_outputs != num_outputs:
                raise LoadError(
                    f"{file}: its plan's {name} program returns {num_outputs} tensors and {state}, but the program"
                    f" {program.num_outputs} and {list(program.state)}"
                )
            known |= _check_program(file, program, known)
    models = [[type_of(v.meta["val"]) for v in _returned(programs[name])[:num_tensors]] for name in plan.programs]
    if any(model != models[0] for model in models):
        raise LoadError(f"{file}: its full and reuse programs return tensors of different types")


def _known_of_history(plan: Plan, known: Mapping[tuple[str, str], Type]) -> dict[tuple[str, str], Type]:
    """What a reuse step reads beside the slots, where it extrapolates them."""
    found: dict[tuple[str, str], Type] = {}
    for slot in plan.slots:
        if order := plan.order_of(slot.cache):
            type_ = known["slot", slot.name]
            found |= {("history", older_name(slot.name, age)): type_ for age in range(1, order + 1)}
            numbers = (num_coefficients(order),), torch.float32, type_[2]
            found["coefficients", coefficients_name(slot.cache)] = numbers
    return found


def without_memory(plan: Plan) -> Plan:
    """What of a plan is the same for every number of guidance branches."""
    return replace(plan, chunks={}, notes=(), branches=1)


def check_same(
    file: str, same_call: bool, same_plan: bool, known: Mapping[str, Program], programs: Mapping[str, Program]
) -> None:
    """Raise a `LoadError` where a signature differs from itself with another number of guidance branches.

    A run may pass from the one's programs to the other's, so these return the same.

    Args:
        file: of the signature, for messages.
        same_call: whether the call and its output are the same.
        same_plan: whether the plan is, but for memory.
        known: the programs with another number.
        programs: by name.
    """
    types = [
        {name: [type_of(node.meta["val"]) for node in _returned(program)] for name, program in of_one.items()}
        for of_one in (known, programs)
    ]
    for what, same in (("output", same_call), ("plan", same_plan), ("state", types[0] == types[1])):
        if not same:
            raise LoadError(f"{file}: this signature has another {what} where a step has other calls")


def _returned(program: Program) -> tuple[fx.Node, ...]:
    return outputs(program.graph_module.graph)


def _check_program(file: str, program: Program, known: Mapping[tuple[str, str], Type]) -> dict[tuple[str, str], Type]:
    """Check the inputs of a program by what is known of them; returns what is known of its state."""
    for node in placeholders(program.graph_module.graph):
        given = input_of(node)
        if (given.kind, given.name) not in known:
            raise LoadError(
                f"{file}: its {program.name} program reads the {given.kind} {given.name!r}, which is not saved"
            )
        if type_of(node.meta["val"]) != known[given.kind, given.name]:
            raise LoadError(
                f"{file}: its {program.name} program reads the {given.kind} {given.name!r} as"
                f" {_words(type_of(node.meta['val']))}, but it is {_words(known[given.kind, given.name])}"
            )
    returned = _returned(program)
    if len(returned) != program.num_outputs + len(program.state):
        raise LoadError(
            f"{file}: its {program.name} program returns {len(returned)} tensors, expected {program.num_outputs} and"
            f" {len(program.state)} of state"
        )
    _check_writes(program.graph_module.graph, f"{file}: its {program.name} program")
    state = zip(program.state, returned[program.num_outputs :], strict=True)
    return {(kind, name): type_of(node.meta["val"]) for (kind, name), node in state}


def _check_writes(graph: fx.Graph, where: str) -> None:
    """Programs are pure: what their operators write to is their own."""
    for node in calls(graph):
        if any(allocated_by(target).op == "placeholder" for target in _written(node)):
            raise LoadError(f"{where} writes to an argument, by {node.target}")


def _written(node: fx.Node) -> list[fx.Node]:
    """The values that a call writes to."""
    schema = schema_of(node)
    if schema is None or not schema.is_mutable:
        return []
    places = [index for index, arg in enumerate(schema.arguments) if arg.is_write]
    given = [node.args[i] if i < len(node.args) else node.kwargs.get(schema.arguments[i].name) for i in places]
    return [value for value in given if isinstance(value, fx.Node)]


def check_region(call: fx.Node, region: ChunkedRegion, file: str) -> None:
    """Raise a `LoadError` where a region's loop does not fit its inputs, its outputs or its bodies.

    Args:
        call: of the region, its bodies' own regions checked.
        region: what is called.
        file: for messages.
    """
    where = f"{file}: region {call.target}"
    inputs = [node.meta["val"] if isinstance(node, fx.Node) else None for node in call.args]
    if not all(isinstance(value, torch.Tensor) for value in inputs):
        raise LoadError(f"{where} has an input that is no tensor")
    allocated = [(made.shape, made.dtype, made.device) for made in region.outputs]
    if [type_of(value) for value in call.meta["val"]] != allocated:
        raise LoadError(f"{where} allocates other outputs than the graph has")
    if any(len(made.strides) != len(made.shape) for made in region.outputs):
        raise LoadError(f"{where} allocates an output with other strides than sizes")
    for chunk in region.chunks:
        _check_chunk(where, region, chunk, [value for value in inputs if value is not None])
    for index, made in enumerate(region.outputs):
        parts = [(w.start, w.stop) for chunk in region.chunks for w in chunk.writes if w.index == index]
        axes = {w.axis for chunk in region.chunks for w in chunk.writes if w.index == index}
        ends = [0, *itertools.chain.from_iterable(parts)]
        axis = next(iter(axes), None)
        joined = all(ends[i] == ends[i + 1] for i in range(0, len(ends) - 1, 2))
        if len(axes) != 1 or axis is None or not joined or ends[-1] != axis.size or axis.extent != made.shape[axis.dim]:
            raise LoadError(f"{where} does not write all of output {index} once and in order")
    _check_overwrites(where, call, region)


def _check_chunk(where: str, region: ChunkedRegion, chunk: Chunk, inputs: Sequence[torch.Tensor]) -> None:
    if not 0 <= chunk.body < len(region.bodies):
        raise LoadError(f"{where} has a chunk of body {chunk.body}, but {len(region.bodies)} bodies")
    graph = region.body(chunk.body).graph
    given, returned = placeholders(graph), outputs(graph)
    direct = region.direct(chunk.body)
    if [write.index for write in chunk.writes] != list(range(len(region.outputs))) or len(returned) != len(
        region.outputs
    ):
        raise LoadError(f"{where} has a chunk that does not write each output")
    if direct is not None and not 0 <= direct < len(region.outputs):
        raise LoadError(f"{where} has a body that writes output {direct}, of {len(region.outputs)}")
    wholes = [(made.shape, made.dtype, made.device) for made in region.outputs]
    reads = [_slice_type(where, read, [type_of(value) for value in inputs]) for read in chunk.reads]
    writes = [_slice_type(where, write, wholes) for write in chunk.writes]
    if direct is not None:
        reads.append(writes[direct])
    if [type_of(node.meta["val"]) for node in given] != reads:
        raise LoadError(f"{where} gives body {chunk.body} slices of other types than it takes")
    if [type_of(node.meta["val"]) for node in returned] != writes:
        raise LoadError(f"{where} puts what body {chunk.body} returns into places of other types")
    into = given[-1] if direct is not None else None
    for node in calls(graph):
        if any(target is not into and allocated_by(target).op == "placeholder" for target in _written(node)):
            raise LoadError(f"{where} has a body that writes to an argument, by {node.target}")
    if into is not None and (len(into.users) != 1 or returned[direct or 0] not in into.users):
        raise LoadError(f"{where} has a body that does not write output {direct} as its record says")


def _slice_type(where: str, part: Slice, wholes: Sequence[Type]) -> Type:
    """The type of a slice."""
    if not 0 <= part.index < len(wholes):
        raise LoadError(f"{where} has a slice of number {part.index}, of {len(wholes)}")
    shape, dtype, device = wholes[part.index]
    axis = part.axis
    if axis is None:
        return shape, dtype, device
    if not (_is_axis_of(axis, shape) and 0 <= part.start < part.stop <= axis.size):
        raise LoadError(f"{where} has a slice from {part.start} to {part.stop} of {axis}, of sizes {list(shape)}")
    return (*shape[: axis.dim], axis.local_extent(part.stop - part.start), *shape[axis.dim + 1 :]), dtype, device


def _is_axis_of(axis: Axis, shape: Sequence[int]) -> bool:
    return 0 <= axis.dim < len(shape) and min(axis.outer, axis.inner) >= 1 and axis.extent == shape[axis.dim]


def _check_overwrites(where: str, call: fx.Node, region: ChunkedRegion) -> None:
    """What is written over must be the program's own, laid out alike, and read by nobody afterwards."""
    place = {node: index for index, node in enumerate(call.graph.nodes)}
    for over in region.overwrites:
        if not (0 <= over.input < len(call.args) and 0 <= over.output < len(region.outputs) and over.delay in (0, 1)):
            raise LoadError(f"{where} writes output {over.output} over input {over.input}, which it does not have")
        source, made = call.args[over.input], region.outputs[over.output]
        assert isinstance(source, fx.Node)
        value: torch.Tensor = source.meta["val"]
        if (type_of(value), value.stride()) != ((made.shape, made.dtype, made.device), made.strides):
            raise LoadError(f"{where} writes output {over.output} over an input that is laid out otherwise")
        root = allocated_by(source)
        sharing = [root]
        for node in sharing:  # grows as it goes
            sharing += [user for user in node.users if allocated_by(user) is root and user not in sharing]
        later = [u for node in sharing for u in node.users if place[u] > place[call] and u not in sharing]
        others = [arg for index, arg in enumerate(call.args) if index != over.input]
        if root.op not in ("call_function", "call_module"):
            raise LoadError(f"{where} writes over %{source.name}, which is not the program's own")
        if later or any(node in others for node in sharing) or not _read_before(region, over):
            raise LoadError(f"{where} writes over %{source.name}, which is read later")
    if len({over.input for over in region.overwrites}) < len(region.overwrites):
        raise LoadError(f"{where} writes two outputs over one input")


def _read_before(region: ChunkedRegion, over: Overwrite) -> bool:
    """Whether each chunk reads of an overwritten input only what no chunk before it has written."""
    for index, chunk in enumerate(region.chunks):
        write = chunk.writes[over.output]
        before = region.chunks[max(index - over.delay, 0)].writes[over.output].start
        if any(read.axis != write.axis or read.start < before for read in chunk.reads if read.index == over.input):
            return False
    return True


def _words(type_: Type) -> str:
    shape, dtype, device = type_
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"

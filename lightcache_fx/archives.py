"""A program's graph as a plain `torch.export` archive (`.pt2`), written and read without pickle.

A region that runs chunk by chunk stands in the archive as one operator, `lightcache.region`, that names it; the bodies
of its chunks are archives of their own.

`torch.export.load` unpickles what an archive tells it to, evaluates its symbolic expressions and imports the modules
that its trees name. So nothing of a file gets there but the JSON of its graph, and that only once it has been seen to
hold nothing else than calls of ATen operators on tensors of fixed sizes: it is put into a new archive beside records
that are written here.
"""

from __future__ import annotations

import io
import json
import operator
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._export.verifier import TrainingIRVerifier
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from lightcache_fx import norm_stats  # noqa: F401 registers operators that programs call
from lightcache_fx.errors import LoadError, SaveError
from lightcache_fx.graphs import (
    copy_graph,
    describe,
    eliminate_dead_code,
    outputs,
    placeholders,
    tensors_of,
)

_IDENTITY = "lightcache_fx.json"
_GRAPH = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_RECORDS = {
    "data/weights/model_weights_config.json": b'{"config": {}}',
    "data/constants/model_constants_config.json": b'{"config": {}}',
    _SAMPLES: b"",
    "archive_format": b"pt2",
    "archive_version": b"0",
    ".data/version": b"6",
    "byteorder": b"little",
}
_UNREAD = {".data/serialization_id", f"extra/{_IDENTITY}"}
_OWN = {"lightcache.region.default", "lightcache.row_moments.default", "lightcache.join_moments.default"}
_TARGET = re.compile(r"torch\.ops\.(\w+\.\w+\.\w+)")
_REFUSED_ATEN = re.compile(r"aten\.(from_file|_?save|_?load|_print|warn)\b")
_ARGUMENTS = frozenset(
    f"as_{kind}"
    for kind in (
        "none", "tensor", "tensors", "int", "ints", "float", "floats", "string", "strings", "scalar_type",
        "memory_format", "layout", "device", "bool", "bools", "optional_tensor", "optional_tensors", "complex",
        "int_lists", "float_lists",
    )
)  # fmt: skip
_METADATA = {"nn_module_stack"}
_MAX_BYTES = 2**28


@torch.library.custom_op("lightcache::region", mutates_args=())
def region(tensors: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:  # noqa: ARG001 - a schema only
    """Stands in an archive for a region that runs chunk by chunk; `lightcache_fx.load` puts the region in its place."""
    raise LoadError(f"{name} runs only in a module that lightcache_fx.load made")


REGION = torch.ops.lightcache.region.default


def write_archive(graph: fx.Graph, identity: Mapping[str, object]) -> bytes:
    """A graph as the content of a `.pt2` file.

    Args:
        graph: of a program or of a body; regions are named after their nodes.
        identity: what the archive is, kept beside the graph.

    Raises:
        SaveError: the graph calls something that a process without the model does not have, or has sizes that depend
            on data.
    """
    copied = _with_named_regions(graph)
    for node in copied.nodes:
        _check_savable(node)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _exported(copied)
            buffer = io.BytesIO()
            torch.export.save(program, buffer, extra_files={_IDENTITY: json.dumps(identity)})
    except Exception as error:
        raise SaveError(f"torch.export cannot write the graph of {dict(identity)}: {error}") from error
    content = buffer.getvalue()
    read_graph_json(content, str(dict(identity)), identity)  # what cannot be read again must not be written
    return content


def read_archive(content: bytes, file: str, identity: Mapping[str, object]) -> fx.Graph:
    """The graph in a `.pt2` file; regions are still calls of `REGION`.

    Args:
        content: of the file.
        file: its name, for messages.
        identity: what it must be.

    Returns:
        a graph whose nodes have fake tensors as their `val`.

    Raises:
        LoadError: it is no such archive, another program's, or holds something else than calls of operators.
    """
    model = read_graph_json(content, file, identity)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, record in {_GRAPH: json.dumps(model).encode(), **_RECORDS}.items():
            archive.writestr(f"archive/{name}", record)
    buffer.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.export.load(buffer)
    except Exception as error:
        first = str(error).partition("\n")[0][:300]
        raise LoadError(f"{file}: torch.export cannot read its graph: {type(error).__name__}: {first}") from error
    graph, _ = copy_graph(loaded.graph_module.graph)
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise LoadError(f"{file}: it has a node of kind {node.op}, {node.name}")
        if node.op == "call_function" and not _is_known_call(node):
            raise LoadError(f"{file}: it calls {node.target}, which programs do not")
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
            raise LoadError(f"{file}: its input {node.name} is no tensor")
    if not all(isinstance(value, fx.Node) for value in outputs(graph)):
        raise LoadError(f"{file}: it returns something else than tensors")
    eliminate_dead_code(graph)  # results of operators that have several, which export names though nobody reads them
    return graph


def read_graph_json(content: bytes, file: str, identity: Mapping[str, object]) -> Any:
    """The JSON of the graph in a `.pt2` file, checked.

    Raises:
        LoadError: as `read_archive`.
    """
    records = _records(content, file)
    try:
        found = json.loads(records[f"extra/{_IDENTITY}"])
        model = json.loads(records[_GRAPH])
    except (KeyError, ValueError, RecursionError) as error:
        raise LoadError(f"{file} is no program that lightcache_fx.save wrote: {error!r}") from None
    if found != dict(identity):
        raise LoadError(f"{file} holds {found}, expected {dict(identity)}: files have been swapped")
    try:
        _check_model(model)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as error:
        raise LoadError(f"{file} holds no graph of a program: {error}") from None
    return model


def _records(content: bytes, file: str) -> dict[str, bytes]:
    """What an archive holds, by name, without the name of its folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            _check_names(infos, file)
            found = {_name_of(info): archive.read(info) for info in infos}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{file} is no archive of torch.export, or is cut short: {error}") from None
    if found["archive_format"] != b"pt2":
        raise LoadError(f"{file} is a zip file, but no archive of torch.export")
    if found.get(_SAMPLES):
        raise LoadError(f"{file} holds pickled example inputs; they are not read, and no saved program has any")
    return found


def _check_names(infos: Sequence[zipfile.ZipInfo], file: str) -> None:
    """Raise a `LoadError` where there are other records than `torch.export.save` makes of a graph."""
    if sum(info.file_size for info in infos) > _MAX_BYTES:
        raise LoadError(f"{file} holds more than a program can, in {len(infos)} records")
    names = [_name_of(info) for info in infos]
    if "archive_format" not in names or _GRAPH not in names:
        raise LoadError(f"{file} is a zip file, but no archive of torch.export")
    unknown = next((name for name in names if name not in {_GRAPH, *_RECORDS, *_UNREAD}), None)
    if unknown is not None or len(set(names)) < len(names):
        raise LoadError(f"{file} holds {unknown or 'a record twice'}, which no saved program does")


def _name_of(info: zipfile.ZipInfo) -> str:
    return info.filename.partition("/")[2]


def _check_model(model: Any) -> None:
    """Raise a ValueError where a graph holds anything that is not a call of an operator on tensors of fixed sizes."""
    inner = model["graph_module"]
    graph = inner["graph"]
    inputs, returned = ([value["as_tensor"]["name"] for value in graph[side]] for side in ("inputs", "outputs"))
    signature = inner["signature"]
    if [spec["user_input"]["arg"]["as_tensor"]["name"] for spec in signature["input_specs"]] != inputs:
        raise ValueError("its signature is of other inputs")
    if [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]] != returned:
        raise ValueError("its signature is of other outputs")
    (entry,) = inner["module_call_graph"]
    specs = tuple(entry["signature"][name] for name in ("in_spec", "out_spec"))
    if entry["fqn"] != "" or specs != tuple(map(pytree.treespec_dumps, _specs(len(inputs), len(returned)))):
        raise ValueError("its inputs or outputs are not a plain list of tensors")
    unwanted = [model.get("range_constraints"), model.get("guards_code"), inner.get("treespec_namedtuple_fields")]
    unwanted += [graph.get(key) for key in ("sym_int_values", "sym_bool_values", "sym_float_values")]
    unwanted += [graph.get("custom_obj_values"), inner.get("metadata")]
    if any(unwanted):
        raise ValueError("it has symbolic sizes, guards or objects")
    for node in graph["nodes"]:
        target = _TARGET.fullmatch(node["target"])
        if target is None or not _is_known(target[1]):
            raise ValueError(f"it calls {node['target']}, which programs do not")
        if not set(node["metadata"]) <= _METADATA:
            raise ValueError(f"%{node.get('name')} has metadata {sorted(set(node['metadata']) - _METADATA)}")
    strange = next((key for key in _keys(graph) if key.startswith("as_") and key not in _ARGUMENTS), None)
    if strange is not None:
        raise ValueError(f"it has a value of kind {strange}, which programs do not")


def _keys(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from _keys(value)
    elif isinstance(data, list):
        for value in data:
            yield from _keys(value)


def _is_known(operator_name: str) -> bool:
    """Whether a program may call an operator: those of ATen that only compute, and this package's own."""
    if operator_name in _OWN:
        return True
    return operator_name.startswith("aten.") and not _REFUSED_ATEN.match(operator_name)


def _is_known_call(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and _is_known(str(node.target))


def _check_savable(node: fx.Node) -> None:
    for tensor in tensors_of(node):
        if not all(isinstance(size, int) for size in (*tensor.shape, *tensor.stride())):
            raise SaveError(f"{describe(node)} has a size that depends on data, which is not saved")
    match node.op:
        case "call_module":
            raise SaveError(
                f"{describe(node)} calls a submodule of the model's own class, which could not be captured; it would"
                f" not be there without the model"
            )
        case "get_attr":
            raise SaveError(f"{describe(node)} is a part that runs under autocast, which is not saved; load the model"
                            f" in one precision")  # fmt: skip
        case "call_function" if not _is_known_call(node):
            raise SaveError(
                f"{describe(node)} calls {node.target}, which is no operator of torch's own; it would not be there"
                f" without the library that has it"
            )


def _with_named_regions(graph: fx.Graph) -> fx.Graph:
    """A copy in which regions are calls of `REGION`, and only what the archive keeps stands in the metadata."""
    copied, _ = copy_graph(graph)
    for node in list(copied.nodes):
        node.meta = {key: node.meta[key] for key in ("val", "nn_module_stack", "lightcache_region") if key in node.meta}
        if node.meta.pop("lightcache_region", None) is None:
            continue
        with copied.inserting_before(node):
            named = copied.create_node("call_function", REGION, (list(node.args), str(node.target)), name=node.name)
        named.meta = {**node.meta, "val": list(node.meta["val"])}
        node.replace_all_uses_with(named)
        copied.erase_node(node)
        named.name = node.name
    return copied


def _exported(graph: fx.Graph) -> ExportedProgram:
    """A graph whose inputs, weights among them, are all the user's."""
    ins, outs = ([TensorArgument(node.name) for node in nodes] for nodes in (placeholders(graph), outputs(graph)))
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, arg, None) for arg in ins],
        [OutputSpec(OutputKind.USER_OUTPUT, arg, None) for arg in outs],
    )
    call = ModuleCallSignature([*ins], [*outs], *_specs(len(ins), len(outs)))
    return ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=signature,
        state_dict={},
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", call)],
        verifiers=[TrainingIRVerifier],
    )


def _specs(num_inputs: int, num_outputs: int) -> tuple[pytree.TreeSpec, pytree.TreeSpec]:
    return pytree.tree_structure(((0,) * num_inputs, {})), pytree.tree_structure((0,) * num_outputs)

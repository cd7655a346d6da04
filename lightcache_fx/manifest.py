"""What stands in the JSON files of a saved module: typed records that refuse unknown keys and wrong types.

    manifest.json       versions, files with their hashes, weights with theirs, methods
    signature_<n>.json  one signature: how it is called, what it returns, its plan and its programs

Nothing in them names a class or a function, and every file name is of the folder itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import torch

from lightcache_fx.calls import CallLayout, InputLeaf, TensorType
from lightcache_fx.chunk_planner import ChunkPlan
from lightcache_fx.chunked import Allocation, Chunk
from lightcache_fx.cuts import CutChoice
from lightcache_fx.encoding import Tree, decode, dtype_named, encode, encode_tree
from lightcache_fx.errors import LoadError
from lightcache_fx.graphs import GraphInput
from lightcache_fx.hoisting import HoistPlan
from lightcache_fx.in_place import Overwrite
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Policy
from lightcache_fx.probing import ProbePlan
from lightcache_fx.program import Program
from lightcache_fx.runs import MAX_BRANCHES
from lightcache_fx.schedule import Schedules

FORMAT = 1
"""Of the folder; raised whenever what is in it changes its meaning."""
KIND: Literal["lightcache_fx saved module"] = "lightcache_fx saved module"
MANIFEST = "manifest.json"
POLICY = "policy.yaml"
WEIGHTS = "weights.safetensors"
CONSTANTS = "constants.safetensors"
_MAX_JSON = 2**28

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def _plain_name(name: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(f"a file of the folder itself, got {name!r}")
    return name


def _decodable(data: Any) -> Any:
    decode(data)
    return data


def _tree(data: Any) -> Any:
    Tree(data)
    return data


def _device(name: str) -> str:
    try:
        torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"no device {name!r}") from error
    return name


def _dtype(name: str) -> str:
    dtype_named(name)
    return name


FileName = Annotated[str, pydantic.AfterValidator(_plain_name)]
DtypeName = Annotated[str, pydantic.AfterValidator(_dtype)]
DeviceName = Annotated[str, pydantic.AfterValidator(_device)]
Encoded = Annotated[Any, pydantic.AfterValidator(_decodable)]
TreeData = Annotated[Any, pydantic.AfterValidator(_tree)]
Digest = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, pydantic.Field(ge=0)]
Place = Annotated[int, pydantic.Field(ge=0)]


class Record(pydantic.BaseModel):
    """Part of a file."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(Record):
    """A file of the folder: its size in bytes and its SHA-256."""

    num_bytes: Size
    sha256: Digest


class TensorRecord(Record):
    """A weight, or a tensor constant.

    Attributes:
        shape: its sizes.
        strides: in elements; None where it is contiguous.
        dtype: as torch names it.
        device: where the programs read it.
        sha256: of its elements in order, little-endian.
    """

    shape: tuple[Size, ...]
    strides: tuple[Size, ...] | None
    dtype: DtypeName
    device: DeviceName
    sha256: Digest


class WeightRecord(Record):
    """A parameter or buffer of the module.

    Attributes:
        tensor: what it holds; None where it is tied.
        tied_to: the name of the weight that it is.
        is_parameter: or a buffer.
        is_persistent: whether it is part of the state dict.
    """

    tensor: TensorRecord | None
    tied_to: str | None
    is_parameter: bool
    is_persistent: bool

    @pydantic.model_validator(mode="after")
    def _either(self) -> WeightRecord:
        if (self.tensor is None) == (self.tied_to is None):
            raise ValueError("a weight has a tensor or is tied to another, and not both")
        return self


class ParameterRecord(Record):
    """A parameter of a method; `default` is a list of one value, or empty where there is none."""

    name: str
    kind: Literal["POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD"]
    default: tuple[Encoded, ...] = pydantic.Field(max_length=1)


class HardwareRecord(Record):
    """What compiled code runs on.

    Attributes:
        type: as torch names it: `cpu`, `cuda`.
        name: of the machine's architecture, or of the accelerator.
        capability: the widest vectors that torch uses, or the accelerator's compute capability.
        features: of a processor: the instruction sets that it has.
    """

    type: Annotated[str, pydantic.Field(pattern="^[a-z]+$")]
    name: str
    capability: str
    features: tuple[str, ...]


class PackageRecord(Record):
    """A part of a program, compiled for arguments in one layout.

    Attributes:
        file: in the folder of packages for this type of device.
        content: its size and hash.
        part: digest of what it computes, and by what settings it was compiled.
        strides: of its arguments.
        program: that it was met in first, for messages.
        settings: of the compiler, as JSON.
        torch: the exact version that made it.
        hardware: that it was made on and for.
    """

    file: FileName
    content: FileRecord
    part: Digest
    strides: tuple[tuple[Size, ...], ...]
    program: str
    settings: str
    torch: str
    hardware: HardwareRecord


class Manifest(Record):
    """The folder's contents.

    Attributes:
        kind: tells it from others' JSON.
        format: `FORMAT` of the package that wrote it.
        lightcache_fx: that package's version.
        torch: the version of torch that made the programs.
        model: class name of the model.
        files: by name, but for this file and those of tensors.
        weights: by their full name in the model, in its order.
        weight_files: names of the user's files that hold the weights; empty where they are in the folder.
        constants: tensors that the captures made, by the signature's number and the constant's name.
        methods: the parameters of each method, by name.
        num_signatures: how many files of signatures there are.
        packages: compiled parts of programs.
    """

    kind: Literal["lightcache_fx saved module"]
    format: int
    lightcache_fx: str
    torch: str
    model: str
    files: dict[FileName, FileRecord]
    weights: dict[str, WeightRecord]
    weight_files: tuple[str, ...]
    constants: dict[str, TensorRecord]
    methods: dict[str, tuple[ParameterRecord, ...]]
    num_signatures: Annotated[int, pydantic.Field(ge=1)]
    packages: tuple[PackageRecord, ...] = ()


class TypeRecord(Record):
    """The type of a tensor argument, as `TensorType` has it."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...] | None
    dtype: DtypeName
    device: DeviceName


class CallRecord(Record):
    """How a signature is called, as `CallLayout` has it."""

    method: str
    tree: TreeData
    constants: tuple[tuple[Place, Encoded], ...]
    leaves: tuple[InputLeaf, ...]
    positions: tuple[Place, ...]
    types: tuple[TypeRecord, ...]
    numbers: tuple[tuple[Place, Literal["int", "float"]], ...]
    has_generator: bool

    @pydantic.model_validator(mode="after")
    def _whole(self) -> CallRecord:
        places = sorted([*self.positions, *(place for place, _ in self.constants)])
        if places != list(range(Tree(self.tree).num_leaves)) or not (
            len(self.leaves) == len(self.positions) == len(self.types)
        ):
            raise ValueError("its tensors and constants are not the leaves of its tree")
        if any(place >= len(self.leaves) for place, _ in self.numbers):
            raise ValueError("it has a number where there is no tensor")
        return self

    @classmethod
    def of(cls, layout: CallLayout) -> CallRecord:
        """Of a call.

        Raises:
            ValueError: it has an argument of a class of the model's own.
        """
        tree = encode_tree(layout.spec)
        if Tree(tree).spec() != layout.spec:
            raise ValueError("a tree that cannot be made again")
        return cls(
            method=layout.method,
            tree=tree,
            constants=tuple((place, encode(value)) for place, value in layout.constants),
            leaves=layout.leaves,
            positions=layout.positions,
            types=tuple(
                TypeRecord(shape=t.shape, strides=t.strides, dtype=_short(t.dtype), device=str(t.device))
                for t in layout.tensor_types
            ),
            numbers=tuple((place, "int" if kind is int else "float") for place, kind in layout.numbers),
            has_generator=layout.has_generator,
        )

    def layout(self) -> CallLayout:
        """The call."""
        constants = tuple((place, decode(data)) for place, data in self.constants)
        return CallLayout(
            spec=Tree(self.tree).spec(),
            constants=constants,
            constant_keys=tuple(
                (place, type(value), repr(value) if isinstance(value, slice) else value) for place, value in constants
            ),
            leaves=self.leaves,
            positions=self.positions,
            tensor_types=tuple(
                TensorType(t.shape, t.strides, dtype_named(t.dtype), torch.device(t.device)) for t in self.types
            ),
            numbers=tuple((place, int if kind == "int" else float) for place, kind in self.numbers),
            method=self.method,
            has_generator=self.has_generator,
        )


class OutputRecord(Record):
    """How the returned tensors and constants make up the output."""

    tree: TreeData
    constants: tuple[tuple[Place, Encoded], ...]


class AllocationRecord(Record):
    """How a region's output is allocated."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    dtype: DtypeName
    device: DeviceName

    @classmethod
    def of(cls, made: Allocation) -> AllocationRecord:
        """Of an allocation."""
        return cls(shape=made.shape, strides=made.strides, dtype=_short(made.dtype), device=str(made.device))

    def allocation(self) -> Allocation:
        """The allocation."""
        return Allocation(self.shape, self.strides, dtype_named(self.dtype), torch.device(self.device))


class RegionRecord(Record):
    """A region that runs chunk by chunk, as `ChunkedRegion` has it; its bodies are programs of their own."""

    bodies: tuple[BodyRecord, ...]
    chunks: tuple[Chunk, ...]
    outputs: tuple[AllocationRecord, ...]
    overwrites: tuple[Overwrite, ...]
    label: str
    flops: Size


class BodyRecord(Record):
    """What computes a chunk.

    Attributes:
        file: its graph.
        regions: those inside it, by the name of their node.
        writes: the output that it writes itself, into its last input.
        copied: which of its inputs are copies of slices.
    """

    file: FileName
    regions: dict[str, RegionRecord]
    writes: Place | None
    copied: tuple[bool, ...]


ProgramName = Annotated[str, pydantic.Field(pattern=r"^(prologue|probe|full|reuse|fresh\d+(and\d+)*)$", max_length=200)]
SavedState = Literal["slot", "hoisted", "change", "indicator", "handed"]


class ProgramRecord(Record):
    """A program, as `Program` has it."""

    file: FileName
    inputs: tuple[GraphInput, ...]
    num_outputs: Size
    state: tuple[tuple[SavedState, str], ...]
    regions: dict[str, RegionRecord]


class PlanRecord(Record):
    """The decisions, as `Plan` has them; its policy is a file of its own."""

    hoist: HoistPlan
    cut: CutChoice | None
    candidates: tuple[CutChoice, ...]
    full_flops: Size
    weight_bytes: Size
    notes: tuple[str, ...]
    chunks: dict[str, ChunkPlan]
    branches: Annotated[int, pydantic.Field(ge=1, le=MAX_BRANCHES)]
    probe: ProbePlan | None = None
    combined_flops: dict[ProgramName, Size] = pydantic.Field(default_factory=dict)
    output_bytes: Size = 0

    @classmethod
    def of(cls, plan: Plan) -> PlanRecord:
        """Of a plan."""
        return cls(
            hoist=plan.hoist,
            cut=plan.cut,
            candidates=plan.candidates,
            full_flops=plan.full_flops,
            weight_bytes=plan.weight_bytes,
            notes=plan.notes,
            chunks=dict(plan.chunks),
            branches=plan.branches,
            probe=plan.probe,
            combined_flops=dict(plan.combined_flops),
            output_bytes=plan.output_bytes,
        )

    def plan(self, model: str, policy: Policy) -> Plan:
        """The plan."""
        return Plan(
            model=model,
            policy=policy,
            schedule=Schedules.of(policy.caches),
            hoist=self.hoist,
            cut=self.cut,
            candidates=self.candidates,
            full_flops=self.full_flops,
            weight_bytes=self.weight_bytes,
            notes=self.notes,
            chunks=self.chunks,
            branches=self.branches,
            probe=self.probe,
            combined_flops=self.combined_flops,
            output_bytes=self.output_bytes,
        )


class SignatureRecord(Record):
    """One signature and what was made for it, for a number of guidance branches.

    Attributes:
        number: of the signature, from 0; that of the file's name.
        call: how it is called.
        output: what it returns.
        route: how the model was captured.
        plan: the decisions.
        programs: by name.
    """

    number: Place
    call: CallRecord
    output: OutputRecord
    route: str
    plan: PlanRecord
    programs: dict[ProgramName, ProgramRecord]


def state_of(program: Program) -> tuple[tuple[SavedState, str], ...]:
    """What a program that swaps nothing returns beside its outputs."""
    return tuple((kind, name) for kind, name in program.state if kind != "copy" and kind != "next")


def signature_file(number: int) -> str:
    """The file of a signature."""
    return f"signature_{number}.json"


def to_json(record: Record) -> bytes:
    """A record as a file."""
    return (json.dumps(record.model_dump(mode="json"), indent=1) + "\n").encode()


R = TypeVar("R", bound=Record)


def from_json(kind: type[R], content: bytes, file: str) -> R:
    """A record from a file's content.

    Raises:
        LoadError: it is no such record; the message has the file and the key.
    """
    try:
        return kind.model_validate_json(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'it'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)[:3]
        )
        raise LoadError(f"{file} is not as lightcache_fx writes it: {problems}") from None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, its kind and format checked first, so that another format is called so.

    Raises:
        LoadError: there is none, or it is damaged, of another kind, or of another format.
    """
    content = read_file(folder, MANIFEST)
    try:
        data = json.loads(content)
    except ValueError as error:
        raise LoadError(f"{MANIFEST} of {folder} is damaged: {error}") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise LoadError(f"{folder} holds no module that lightcache_fx.save wrote: its {MANIFEST} is of another kind")
    if data.get("format") != FORMAT:
        raise LoadError(
            f"{folder} is of format {data.get('format')!r}, written by lightcache_fx {data.get('lightcache_fx')}; this"
            f" one reads format {FORMAT}: save the module again, or install that version"
        )
    return from_json(Manifest, content, MANIFEST)


def read_file(folder: Path, name: str, expected: FileRecord | None = None) -> bytes:
    """The content of a file of the folder.

    Args:
        folder: the saved module's.
        name: a plain name.
        expected: its size and hash, where known.

    Raises:
        LoadError: it is missing, no ordinary file (a link, say), or not the one that was written.
    """
    path = folder / name
    if path.is_symlink():
        raise LoadError(f"{name} of {folder} is a symbolic link; saved modules hold ordinary files only")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:3]) if folder.is_dir() else ""
        raise LoadError(f"{folder} has no {name} ({'it holds ' + there if there else 'it holds nothing'})")
    size = path.stat().st_size
    if expected is not None and size != expected.num_bytes:
        raise LoadError(f"{name} of {folder} has {size} B, expected {expected.num_bytes} B: it is damaged or another's")
    if size > _MAX_JSON:
        raise LoadError(f"{name} of {folder} has {size} B, more than a saved module's can have")
    content = path.read_bytes()
    if expected is not None and hashlib.sha256(content).hexdigest() != expected.sha256:
        raise LoadError(f"{name} of {folder} is not the file that was saved: its SHA-256 differs")
    return content


def file_record(content: bytes) -> FileRecord:
    """Size and hash of a file's content."""
    return FileRecord(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def constant_key(number: int, name: str) -> str:
    """What a constant of signature `number` is called among all constants."""
    return f"{number}:{name}"


def buffer_key(name: str) -> str:
    """What a buffer that is not part of the state dict is called among all constants."""
    return f"buffer:{name}"


def names_of(specs: Sequence[GraphInput], kind: str) -> list[str]:
    """The names of a program's inputs of one kind."""
    return [spec.name for spec in specs if spec.kind == kind]


RegionRecord.model_rebuild()
BodyRecord.model_rebuild()
ProgramRecord.model_rebuild()
SignatureRecord.model_rebuild()

"""Packages of AOTInductor in a saved module: parts of programs compiled for one device and one release of torch.

A package is a zip file with a shared library in it, which is code: it is loaded only where the user asks for it, only
when it is the file that was saved, and only by the torch and on the hardware that it was made for.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import platform
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from lightcache_fx.capture_lock import CAPTURE_LOCK
from lightcache_fx.errors import LoadError, SaveError
from lightcache_fx.graphs import copy_graph, outputs, placeholders
from lightcache_fx.lowering import WITH_CUDA_GRAPHS, CompileState
from lightcache_fx.manifest import HardwareRecord, Manifest, PackageRecord, file_record, read_file
from lightcache_fx.packages import Package, Packages, Strides, settings_text
from lightcache_fx.policy import Compile

log = logging.getLogger(__name__)

FOLDER = "compiled"
_IDENTITY = "lightcache_fx"
_ENTRY = re.compile(
    r"part(_\d+)?/(data/aotinductor/model/[A-Za-z0-9_][A-Za-z0-9_.-]*"
    r"|archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id)"
)
_MAX_BYTES = 2**28


# Saving --------------------------------------------------------------------------------------------------------------


def check_can_be_packaged(settings: Compile | None) -> Compile:
    """The settings, where AOTInductor makes the same of a part.

    Raises:
        SaveError: it does not.
    """
    why = ""
    if settings is None:
        why = "the module is not compiled: its policy needs compile=Compile()"
    elif settings.backend != "inductor":
        why = f"packages are Inductor's, and the policy compiles by backend {settings.backend!r}"
    elif settings.mode in WITH_CUDA_GRAPHS or settings.options.get("triton.cudagraphs"):
        why = f"packages hold no CUDA graphs, which mode {settings.mode!r} with options {settings.options} asks for"
    elif settings.mode != "default":
        why = f"packages are made in Inductor's default mode, and the policy asks for {settings.mode!r}"
    if why or settings is None:
        raise SaveError(f"save: compiled=True: {why}; change Policy(compile=...), or save without compiled=True")
    return settings


@dataclass
class PackageFiles:
    """The packages to be written.

    Attributes:
        records: for the manifest.
        contents: by path in the saved module's folder.
    """

    records: list[PackageRecord] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)

    def add(self, states: Iterable[CompileState], settings: Compile) -> None:
        """Compile each part of some programs for each layout that it was called with; its graph's, if for none.

        Raises:
            SaveError: a part cannot be compiled ahead of time.
        """
        parts = {part for state in states for part in state.parts}
        known = {record.part for record in self.records}
        for part in sorted(parts, key=lambda part: (part.name, part.digest)):
            if part.digest not in known:
                known.add(part.digest)
                for strides in part.layouts() or [_strides(part.graph_module.graph)]:
                    self._add(part.graph_module, part.name, part.digest, strides, settings)

    def _add(self, gm: fx.GraphModule, program: str, digest: str, strides: Strides, settings: Compile) -> None:
        where = f"save: compiled=True: program {program}"
        if not digest:
            raise SaveError(f"{where} has a part that is more than calls of operators; save without compiled=True")
        values = [node.meta["val"] for node in (*placeholders(gm.graph), *outputs(gm.graph))]
        if not all(isinstance(value, torch.Tensor) for value in values):
            raise SaveError(f"{where} has a part that passes on something else than tensors, which packages do not"
                            f" take; save without compiled=True, or use Compile(blocks=False)")  # fmt: skip
        devices = {value.device for value in values}
        device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
        hardware = hardware_of(device)
        identity = _identity(digest, strides)
        name = f"part_{len(self.records)}"
        content = _compiled(gm, strides, settings, name, identity, where)
        check_content(content, f"{name}.pt2", identity)  # what cannot be read again must not be written
        record = PackageRecord(
            file=f"{name}.pt2",
            content=file_record(content),
            part=digest,
            strides=strides,
            program=program,
            settings=settings_text(settings),
            torch=str(torch.__version__),
            hardware=hardware,
        )
        self.records.append(record)
        self.contents[f"{FOLDER}/{device.type}/{record.file}"] = content


def _strides(graph: fx.Graph) -> Strides:
    return tuple(node.meta["val"].stride() for node in placeholders(graph))


def _identity(part: str, strides: Strides) -> str:
    """What a package carries inside, so that it is not taken for another one."""
    return hashlib.sha256(f"{part} {strides}".encode()).hexdigest()


def _compiled(
    gm: fx.GraphModule, strides: Strides, settings: Compile, name: str, identity: str, where: str
) -> bytes:  # fmt: skip
    from torch._inductor import aoti_compile_and_package  # a second to import

    graph, _ = copy_graph(gm.graph)
    likes = [node.meta["val"] for node in placeholders(graph)]
    args = tuple(_zeros(like, stride) for like, stride in zip(likes, strides, strict=True))
    configs = {**settings.options, "aot_inductor.metadata": {_IDENTITY: identity}}
    with tempfile.TemporaryDirectory() as folder, CAPTURE_LOCK.capturing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / f"{name}.pt2"
        try:
            exported = torch.export.export(fx.GraphModule(gm, graph), args, strict=False)
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
            return path.read_bytes()
        except Exception as error:
            raise SaveError(
                f"{where} cannot be compiled ahead of time: {type(error).__name__}: {str(error)[:300]}; save without"
                f" compiled=True"
            ) from error


def _zeros(like: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """A tensor of a shape and device, laid out as told."""
    last = sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    flat = torch.zeros(last + 1 if like.numel() else 0, dtype=like.dtype, device=like.device)
    return flat.as_strided(like.shape, strides)


def hardware_of(device: torch.device) -> HardwareRecord:
    """What code for a device runs on.

    Raises:
        SaveError: it is neither the CPU nor CUDA.
    """
    if device.type == "cpu":
        # Inductor compiles for all that the processor has, which is more than the widest vectors say. Older releases of
        # torch do not tell; then nothing is recorded and nothing refused.
        found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return HardwareRecord(
            type="cpu",
            name=platform.machine(),
            capability=torch.backends.cpu.get_cpu_capability(),
            features=tuple(sorted(name for name, there in found.items() if there is True)),
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return HardwareRecord(type="cuda", name=name, capability=f"{major}.{minor}", features=())
    raise SaveError(f"save: compiled=True: packages are made for cpu and cuda, and this module runs on {device.type}")


# Loading -------------------------------------------------------------------------------------------------------------


def read_packages(
    folder: Path, manifest: Manifest, settings: Compile | None, devices: Iterable[torch.device], any_torch: bool
) -> Packages | None:
    """The packages of a folder, all of them checked and none of them loaded; None where torch is another.

    Args:
        folder: of the saved module.
        manifest: its.
        settings: of the compiler, from its policy.
        devices: that its weights are on.
        any_torch: whether another torch compiles anew, instead of an error.

    Raises:
        LoadError: there are none, they are damaged or another's, or made for another torch or other hardware.
    """
    if not manifest.packages or settings is None:
        raise LoadError(
            f"load: compiled=True: {folder} has no compiled packages; save the module with compiled=True, or load it"
            f" without"
        )
    here = str(torch.__version__)
    other = next((record.torch for record in manifest.packages if record.torch != here), None)
    if other is not None and any_torch:
        log.info("packages made by torch %s are left out, and programs compiled anew by torch %s", other, here)
        return None
    if other is not None:
        raise LoadError(
            f"load: compiled=True: packages made by torch {other} run by that release alone, and this is {here}; save"
            f" the module again, load it without compiled=True, or pass any_torch=True to compile it anew"
        )
    known = {device.type: device for device in devices}
    return Packages([_read(folder, record, settings, known) for record in manifest.packages])


def _read(folder: Path, record: PackageRecord, settings: Compile, devices: Mapping[str, torch.device]) -> Package:
    kind = record.hardware.type
    name = f"{FOLDER}/{kind}/{record.file}"
    _check_hardware(name, record.hardware, devices)
    if record.settings != settings_text(settings):
        raise LoadError(
            f"{name} was compiled with {record.settings}, but the policy has {settings_text(settings)}: files of two"
            f" saved modules are mixed"
        )
    place = folder / FOLDER / kind
    for part in (place.parent, place):
        if part.is_symlink():
            raise LoadError(f"{part.name} of {part.parent} is a symbolic link; saved modules hold ordinary files only")
    content = read_file(place, record.file, record.content)
    check_content(content, name, _identity(record.part, record.strides))
    return Package(record.part, record.strides, devices.get(kind, torch.device(kind, 0)), name, content)


def _check_hardware(name: str, made_for: HardwareRecord, devices: Mapping[str, torch.device]) -> None:
    kind = made_for.type
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise LoadError(f"load: compiled=True: {name} was made for {kind}, which is not there; {_WITHOUT}")
    here = hardware_of(devices.get(kind, torch.device(kind, 0)))
    lacking = sorted(set(made_for.features) - set(here.features))
    names = (made_for.name, here.name) if kind == "cpu" else ("", "")  # another card of the same capability will do
    if names[0] != names[1] or made_for.capability != here.capability or lacking:
        raise LoadError(
            f"load: compiled=True: {name} was made for {kind} {made_for.name} with {made_for.capability}, and this is"
            f" {here.name} with {here.capability}{' without ' + ', '.join(lacking[:4]) if lacking else ''}; {_WITHOUT}"
        )


_WITHOUT = "load it without compiled=True to compile it here, or save it here"


def check_content(content: bytes, file: str, identity: str) -> None:
    """Raise a `LoadError` where a package is not what AOTInductor makes of a part, or is another part's."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [info.filename for info in archive.infolist()]
            _check_entries(archive.infolist(), file)
            found = [json.loads(archive.read(name)) for name in names if name.endswith("_metadata.json")]
            kind = [archive.read(name) for name in names if name.endswith("/archive_format")]
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{file} is no package of AOTInductor, or is cut short: {error}") from None
    if kind != [b"pt2"] or not found:
        raise LoadError(f"{file} is a zip file, but no package of AOTInductor")
    if any(not isinstance(data, dict) or data.get(_IDENTITY) != identity for data in found):
        raise LoadError(f"{file} is the package of another part or another layout: files have been swapped")


def _check_entries(infos: Sequence[zipfile.ZipInfo], file: str) -> None:
    if sum(info.file_size for info in infos) > _MAX_BYTES:
        raise LoadError(f"{file} holds more than a package can, in {len(infos)} entries")
    strange = next((info.filename for info in infos if not _ENTRY.fullmatch(info.filename)), None)
    if strange is not None:
        raise LoadError(f"{file} has an entry {strange!r}, which no package of a part has")
    names = [info.filename for info in infos]
    if len(set(names)) < len(names) or len(set(_folders(names))) > 1:
        raise LoadError(f"{file} has an entry twice, or entries of two packages")
    libraries = sum(name.endswith((".so", ".dylib", ".dll", ".pyd")) for name in names)
    if libraries != 1:
        raise LoadError(f"{file} has {libraries} shared libraries, expected one")


def _folders(names: Iterable[str]) -> Iterator[str]:
    return (name.partition("/")[0] for name in names)

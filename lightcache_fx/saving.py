"""`save`: what `transform` made of a module, as a folder that another process loads without the module's class."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lightcache_fx.capture import Capture
from lightcache_fx.capture_lock import CAPTURE_LOCK
from lightcache_fx.compiled import Compiled
from lightcache_fx.dynamic import at_its_size
from lightcache_fx.encoding import encode, encode_tree
from lightcache_fx.errors import ArgumentError, LoadError, SaveError
from lightcache_fx.manifest import (
    CONSTANTS,
    FORMAT,
    KIND,
    MANIFEST,
    POLICY,
    WEIGHTS,
    CallRecord,
    Manifest,
    OutputRecord,
    ParameterRecord,
    PlanRecord,
    SignatureRecord,
    TensorRecord,
    WeightRecord,
    buffer_key,
    constant_key,
    file_record,
    names_of,
    read_manifest,
    signature_file,
    to_json,
)
from lightcache_fx.module import TransformedModule
from lightcache_fx.module_state import weight_slots
from lightcache_fx.policy import Compile
from lightcache_fx.runtime import Runtime
from lightcache_fx.saved_packages import PackageFiles, check_can_be_packaged
from lightcache_fx.saved_programs import Files, record_program
from lightcache_fx.saved_weights import SavedWeights
from lightcache_fx.tensor_files import TensorSource, record_of, write_tensors
from lightcache_fx.version import __version__

log = logging.getLogger(__name__)

Paths = str | Path | Iterable[str | Path]


def save(
    module: nn.Module,
    folder: str | Path,
    *,
    weights: Paths | None = None,
    overwrite: bool = False,
    compiled: bool = False,
) -> None:
    """Write a transformed module's programs, plans, policy and weights into a folder for `load`.

        unet = lightcache_fx.transform(unet, Policy.deepcache(3, 0))
        unet(latent, timestep, prompt, return_dict=False)  # programs are made by calling
        lightcache_fx.save(unet, "unet.lightcache")

    Every signature is saved that the module has programs for in its present state, as planned for each number of
    guidance branches that a step has had; a loaded module takes these calls and no others. Of sizes that vary
    (`Policy.dynamic`) each that has been called is saved by itself; with `compiled` they are left out, with a warning
    that names them. The folder is made in one step: it is there as a whole, or not at all.

    Args:
        module: that `transform` returned, called at least once.
        folder: to be made.
        weights: safetensors files that hold the module's weights as they are now (a file, an index, a folder, or
            several); they are not copied, and `load` must be given them again. None puts the weights in the folder.
        overwrite: whether a saved module that is there already is replaced.
        compiled: whether to compile the parts of programs by AOTInductor and put them in, for `load(compiled=True)` on
            the same hardware by the same torch; for a policy with `compile` by Inductor in its default mode.

    Raises:
        ArgumentError: `module` is not transformed.
        SaveError: it has no programs, they cannot run without the model's class or are swapped, `weights` are others,
            they cannot be compiled ahead of time, or the folder exists. Nothing was written.
    """
    if not isinstance(module, TransformedModule):
        raise ArgumentError(
            f"save: expected a module that lightcache_fx.transform returned, got {type(module).__name__}; a component"
            f" of a pipeline is saved by itself, as pipe.unet"
        )
    added = module._lightcache
    if isinstance(added.original, SavedWeights):
        raise SaveError(f"save: this {type(module).__name__} was loaded from a folder; copy the folder")
    target = Path(os.path.abspath(folder))  # noqa: PTH100 - links in it stay what they are
    settings = check_can_be_packaged(added.policy.compile) if compiled else None
    _check_target(target, overwrite)
    with CAPTURE_LOCK.running(), torch.no_grad():
        present = [made for runtime in added.runtimes.values() for made in runtime.repertoire.current()]
        found = list(_savable(present, added.original, compiled=compiled))
        if not found:
            raise SaveError(
                f"save: {type(module).__name__} has no programs"
                + (
                    " but such as cannot be saved as asked, as warnings say; where these are of sizes that vary,"
                    " transform it with Policy(dynamic=False), and call it once for each size"
                    if present
                    else " in the state that it is in; call it once, as it will be called"
                )
            )
        writer = _Writer(added.original, settings)
        for every in found:
            *others, last = (made for made in every if not made.plan.beside)
            for made in others:
                if made.plan.swap is None:
                    writer.add(made)
                else:
                    log.info("what is swapped for %d calls a step is not saved", made.plan.branches)
            writer.add(last)
        writer.files[POLICY] = added.policy.to_yaml().encode()
        with _made_in_one_step(target) as partial:
            writer.write(partial, weights, added.runtimes)


def _savable(present: Iterable[list[Compiled]], module: nn.Module, *, compiled: bool) -> Iterator[list[Compiled]]:
    """What can be saved, a size of those that vary as it is at that size; what is left out is named in a warning."""
    for every in present:
        if every[-1].capture.readings is not None:
            log.warning(
                "save: left out %s: it holds for some values of its tensors alone, and others could not be captured",
                every[-1].capture.layout.shapes(),
            )
            continue
        if every[-1].signature.dynamic is None:
            yield every
            continue
        fixed = None if compiled else at_its_size(every[-1], module)
        if fixed is not None:
            yield [fixed]
            continue
        why = (
            "nothing is compiled for that size alone" if compiled else "a plan for that size would keep something else"
        )
        log.warning(
            "save: left out %s, of sizes that vary: %s; to save it transform the module with Policy(dynamic=False)",
            every[-1].capture.layout.shapes(),
            why,
        )


class _Writer:
    """Collects what is to be written, so that all refusals come before the first byte.

    Args:
        original: the user's module.
        settings: by which parts of programs are compiled; None leaves packages out.
    """

    def __init__(self, original: nn.Module, settings: Compile | None = None) -> None:
        self.model = type(original).__name__
        self.files: Files = {}
        self._settings = settings
        self._packages = PackageFiles()
        tables = weight_slots(original)
        self._weights: dict[str, torch.Tensor] = {
            name: table[key] for name, (table, key) in tables.items() if table.get(key) is not None
        }
        self._persistent = set(original.state_dict(keep_vars=True)) & set(self._weights)
        self._read: set[str] = set()
        self._constants: dict[str, torch.Tensor] = {}
        self._count = 0

    def add(self, made: Compiled) -> None:
        """One signature, as planned for a number of guidance branches.

        Raises:
            SaveError: it cannot be loaded without the model.
        """
        captured = made.capture
        assert isinstance(captured, Capture)
        where = f"save: {self.model}.{captured.layout.method}"
        if made.plan.swap is not None:
            raise SaveError(
                f"{where} swaps weights or features (swap, or a memory_budget that needs it), which is not saved; use"
                f" chunk=Chunk(budget=...) alone, or transform in the process that runs it"
            )
        number, self._count = self._count, self._count + 1
        try:
            call = CallRecord.of(captured.layout)
        except ValueError as error:
            raise SaveError(f"{where} has an argument that cannot be saved: {error}") from None
        try:
            output = OutputRecord(
                tree=encode_tree(captured.output_spec, records=True),
                constants=tuple((place, encode(value)) for place, value in captured.output_constants),
            )
        except ValueError as error:
            raise SaveError(f"{where} returns {error}; call it with return_dict=False before it is saved") from None
        programs = {name: record_program(program, number, self.files) for name, program in made.programs.items()}
        for program in programs.values():
            self._read.update(names_of(program.inputs, "weight"))
            for name in names_of(program.inputs, "constant"):
                self._constants[constant_key(number, name)] = captured.constants[name]
        record = SignatureRecord.model_validate(
            {
                "number": number,
                "call": call,
                "output": output,
                "route": captured.route,
                "plan": PlanRecord.of(made.plan),
                "programs": programs,
            }
        )
        self.files[signature_file(number)] = to_json(record)
        if self._settings is not None:
            states = [made.bound[name].compile_state for name in programs]
            self._packages.add([state for state in states if state is not None], self._settings)

    def write(self, folder: Path, paths: Paths | None, runtimes: Mapping[str, Runtime]) -> None:
        """Write everything, the manifest last.

        Raises:
            SaveError: the user's files hold other weights, or safetensors cannot hold one.
        """
        records = self._weight_records()
        own = {name: self._weights[name] for name, record in records.items() if record.tensor is not None}
        for name in [name for name, record in records.items() if record.tensor is not None]:
            if not records[name].is_persistent:
                self._constants[buffer_key(name)] = own.pop(name)
        sources: tuple[str, ...] = ()
        if paths is None:
            write_tensors(folder / WEIGHTS, own)
        else:
            sources = _names_of_files(paths, records, own)
        constants = {name: record_of(name, tensor) for name, tensor in self._constants.items()}
        if constants:
            write_tensors(folder / CONSTANTS, self._constants)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        for name, content in self._packages.contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        manifest = Manifest(
            kind=KIND,
            format=FORMAT,
            lightcache_fx=__version__,
            torch=str(torch.__version__),
            model=self.model,
            files={name: file_record(content) for name, content in self.files.items()},
            weights=records,
            weight_files=sources,
            constants=constants,
            methods={name: _parameters(self.model, runtime) for name, runtime in runtimes.items()},
            num_signatures=self._count,
            packages=tuple(self._packages.records),
        )
        for path in folder.rglob("*"):
            _sync(path)
        (folder / MANIFEST).write_bytes(to_json(manifest))
        _sync(folder / MANIFEST)

    def _weight_records(self) -> dict[str, WeightRecord]:
        """The state dict's weights, and other buffers that a program reads."""
        first: dict[int, str] = {}
        records: dict[str, WeightRecord] = {}
        for name, weight in self._weights.items():
            if name not in self._persistent and name not in self._read:
                continue
            owner = first.setdefault(id(weight), name)
            records[name] = WeightRecord(
                tensor=record_of(name, weight) if owner == name else None,
                tied_to=owner if owner != name else None,
                is_parameter=isinstance(weight, nn.Parameter),
                is_persistent=name in self._persistent,
            )
        return records


def _names_of_files(
    paths: Paths, records: Mapping[str, WeightRecord], own: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    """The names of the user's files, once they have been seen to hold the weights."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    tensors: dict[str, TensorRecord] = {
        name: record.tensor for name, record in records.items() if record.tensor is not None and name in own
    }
    aliases = {name: record.tied_to for name, record in records.items() if record.tied_to is not None}
    try:
        source = TensorSource(given, "save: weights")
        for name, place in source.check(tensors, aliases=aliases).items():
            source.verify(name, place, tensors[name])
    except LoadError as error:
        raise SaveError(
            f"{error}; save without weights=... to put the weights into the folder (an adapter may be fused into them,"
            f" or they may have been cast)"
        ) from error
    return tuple(path.name for path in source.files)


def _parameters(model: str, runtime: Runtime) -> tuple[ParameterRecord, ...]:
    """The parameters of a runtime's method."""
    found = []
    for parameter in runtime.reader.parameters():
        try:
            default = () if parameter.default is inspect.Parameter.empty else (encode(parameter.default),)
        except ValueError as error:
            raise SaveError(
                f"save: the default of {parameter.name} of {model}.{runtime.reader.method} cannot be saved: {error}"
            ) from None
        kind = parameter.kind.name
        found.append(ParameterRecord.model_validate({"name": parameter.name, "kind": kind, "default": default}))
    return tuple(found)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise SaveError(f"save: {target} is no folder; name one that does not exist yet")
    if not target.parent.is_dir():
        raise SaveError(f"save: there is no folder {target.parent} to make {target.name} in")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise SaveError(f"save: {target} exists; name another folder, or pass overwrite=True")
    try:
        read_manifest(target)
    except LoadError as error:
        raise SaveError(f"save: {target} is not overwritten, since it is not a saved module: {error}") from None


@contextmanager
def _made_in_one_step(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place when all is written, and goes when something fails."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    replaced = partial / "replaced"
    try:
        made = partial / "made"
        made.mkdir()
        yield made
        _sync(made)
        if target.exists():
            target.rename(replaced)
        try:
            made.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Let a file's or folder's content reach the disk before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

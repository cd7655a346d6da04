"""`load`: a module from a folder that `save` wrote, called as its original was, by programs alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from lightcache_fx.calls import Call, CallLayout
from lightcache_fx.compiled import Compiled, Signature
from lightcache_fx.encoding import Tree, decode
from lightcache_fx.errors import BudgetError, LightcacheError, LoadError, PolicyError, SignatureError, TransformError
from lightcache_fx.graphs import input_of, num_bytes, placeholders
from lightcache_fx.ledger import Ledger
from lightcache_fx.liveness import timeline
from lightcache_fx.manifest import (
    CONSTANTS,
    POLICY,
    WEIGHTS,
    Manifest,
    OutputRecord,
    SignatureRecord,
    TensorRecord,
    buffer_key,
    constant_key,
    from_json,
    names_of,
    read_file,
    read_manifest,
    signature_file,
)
from lightcache_fx.module import Added, TransformedModule, module_mixin, policy_for
from lightcache_fx.packages import Packages
from lightcache_fx.policy import Policy
from lightcache_fx.program import BoundProgram, Program
from lightcache_fx.program_log import log_programs
from lightcache_fx.repertoire import Repertoire, homes_of
from lightcache_fx.runtime import Runtime
from lightcache_fx.saved_checks import Type, check_programs, check_same, type_of, without_memory
from lightcache_fx.saved_packages import read_packages
from lightcache_fx.saved_programs import Read, rebuild_program
from lightcache_fx.saved_weights import hang_weights, weights_class
from lightcache_fx.saving import Paths
from lightcache_fx.tensor_files import TensorSource
from lightcache_fx.units import format_bytes
from lightcache_fx.version import __version__
from lightcache_fx.views import second_view

log = logging.getLogger(__name__)


class LoadedModule(TransformedModule):
    """Mixin of every loaded module: as a transformed one, but with nothing to capture anew.

    Its weights may be read, edited and loaded (`load_state_dict`); its programs are of one dtype and device, so it
    cannot be cast or moved.
    """

    __slots__ = ()

    @property
    def device(self) -> torch.device:
        """Where its first weight is."""
        return next((w.device for w in (*self.parameters(), *self.buffers())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """That of its first floating-point weight."""
        floating = (w.dtype for w in (*self.parameters(), *self.buffers()) if w.is_floating_point())
        return next(floating, torch.get_default_dtype())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """What `to`, `half`, `cuda` and the like do; refused where it would change a dtype or device.

        Raises:
            TransformError: it would.
        """
        for dtype, device in {(w.dtype, w.device) for w in (*self.parameters(), *self.buffers())}:
            made = fn(torch.empty(0, dtype=dtype, device=device))
            if (made.dtype, made.device) != (dtype, device):
                raise TransformError(
                    f"the programs of this {type(self).__name__} were made for {_short(dtype)} on {device} and cannot"
                    f" run in {_short(made.dtype)} on {made.device}; cast or move the original, call it, and save it"
                    f" again"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TransformError(f"a loaded {type(self).__name__} cannot be copied; load it once more")


def load(
    folder: str | Path,
    *,
    weights: Paths | None = None,
    check_weights: bool = True,
    any_torch: bool = False,
    compiled: bool = False,
) -> nn.Module:
    """A module from a folder that `save` wrote; the model's class and its library need not be there.

        unet = lightcache_fx.load("unet.lightcache")
        noise = unet(latent, timestep, prompt, return_dict=False)[0]

    It takes the calls that were saved, by the same argument names, and follows the same rules about runs, steps and
    branches; `inspect`, `reset` and `marked_run` work as on a transformed module. Nothing is unpickled, and no code is
    imported or run that the folder names, unless `compiled` asks for it.

    Args:
        folder: that `save` made.
        weights: safetensors files with the weights (a file, an index, a folder, or several), for a module that was
            saved without them; other files that hold the same ones will do.
        check_weights: whether weights are hashed, which reads all of them; names, shapes and dtypes are checked anyway.
        any_torch: whether programs of another release of torch may run: results may then differ by rounding.
        compiled: take the packages that `save(compiled=True)` made instead of compiling programs here. They are machine
            code that runs with all your rights, so pass it only for a folder that you trust as you trust a library.

    Returns:
        a module in evaluation mode, its weights on the devices that they were saved from.

    Raises:
        LoadError: a file is missing, damaged or another one's, parts do not fit each other, weights are not those that
            were saved, or the folder is of another format or release of torch; with `compiled`, there are no packages,
            or they are of another torch or other hardware.
    """
    place = Path(folder)
    if not place.is_dir():
        raise LoadError(f"load: there is no folder {place}")
    manifest = read_manifest(place)
    _check_versions(manifest, any_torch)

    def read(name: str) -> bytes:
        if name not in manifest.files:
            raise LoadError(f"{name} is not listed in the manifest of {place}")
        return read_file(place, name, manifest.files[name])

    try:
        policy = Policy.from_yaml(read(POLICY).decode() + "\n")
    except (PolicyError, UnicodeDecodeError) as error:
        raise LoadError(f"{POLICY} of {place} is no policy: {error}") from None
    tensors = _Tensors(place, manifest, weights, check_weights)
    root = weights_class(manifest.model, manifest.methods)()
    hang_weights(root, manifest.weights, tensors.weights)
    root.eval()
    homes, ledger = homes_of(root, policy), Ledger()
    try:
        saved = {
            method: SavedPrograms(root, policy_for(root, policy, method), method, homes=homes, ledger=ledger)
            for method in manifest.methods
        }
    except LoadError:
        raise
    except LightcacheError as error:  # the policy is of another model
        raise LoadError(f"{POLICY} of {place} does not fit the model: {error}") from error
    devices = [weight.device for weight in (*root.parameters(), *root.buffers())]
    packages = read_packages(place, manifest, policy.compile, devices, any_torch) if compiled else None
    for number in range(manifest.num_signatures):
        file = signature_file(number)
        record = from_json(SignatureRecord, read(file), file)
        if record.number != number or record.call.method not in saved:
            raise LoadError(f"{file} is signature {record.number} of {record.call.method}: files have been swapped")
        saved[record.call.method].add(record, tensors, read, packages)
    for programs in saved.values():
        programs.check_cuts()
    if packages is not None:
        packages.open()
    runtimes = {method: Runtime(programs) for method, programs in saved.items()}
    mixin = module_mixin(type(root), list(runtimes), LoadedModule)
    return second_view(root, mixin, Added(root, policy, runtimes))


@dataclass(frozen=True)
class LoadedCall:
    """What stands in the place of a capture; as `CapturedCall`.

    Attributes:
        layout: the call.
        route: how the model was captured before it was saved.
        record: how the returned tensors and constants make up the output, as it is saved.
        output: likewise.
        output_constants: the leaves of the output that are no tensors, by position.
    """

    layout: CallLayout
    route: str
    record: OutputRecord
    output: Tree = field(compare=False)
    output_constants: tuple[tuple[int, object], ...] = field(compare=False)
    readings: None = None

    @classmethod
    def of(cls, record: SignatureRecord, file: str) -> LoadedCall:
        """Of a record.

        Raises:
            LoadError: the output's constants have no place in it.
        """
        tree, constants = Tree(record.output.tree), _constants_of(record.output)
        if len({place for place, _ in constants}) < len(constants) or any(
            place >= tree.num_leaves for place, _ in constants
        ):
            raise LoadError(f"{file}: constants of the output have no place in it")
        return cls(record.call.layout(), record.route, record.output, tree, constants)

    @property
    def num_tensors(self) -> int:
        """How many tensors the output has."""
        return self.output.num_leaves - len(self.output_constants)

    def rebuild_output(self, tensors: Sequence[object]) -> object:
        """The output around the tensors that a program returned; a dataclass comes as a named tuple."""
        flat = list(tensors)
        for position, value in self.output_constants:
            flat.insert(position, value)
        return self.output.fill(flat)


class SavedPrograms(Repertoire):
    """Programs that were saved; a call that there are none for is refused, as there is nothing to capture."""

    def add(
        self, record: SignatureRecord, tensors: _Tensors, read: Read, packages: Packages | None = None
    ) -> None:  # fmt: skip
        """One saved signature.

        Raises:
            LoadError: its parts do not fit each other.
        """
        file = signature_file(record.number)
        call = LoadedCall.of(record, file)
        plan = record.plan.plan(type(self.module).__name__, self.policy)
        programs: dict[str, Program] = {
            name: rebuild_program(name, part, read) for name, part in record.programs.items()
        }
        wanted = {name for part in programs.values() for name in names_of(part.inputs, "constant")}
        constants = {name: tensors.constants.get(constant_key(record.number, name)) for name in wanted}
        held = {name: constant for name, constant in constants.items() if constant is not None}
        types: dict[tuple[str, str], Type] = {("constant", name): type_of(value) for name, value in held.items()}
        types |= {("weight", name): type_of(weight) for name, weight in tensors.weights_by_name.items()}
        check_programs(
            file, programs, plan, call.layout, call.num_tensors, types, lambda leaf: self.reader.rate_of(leaf.parameter)
        )
        names = [leaf.name for leaf in call.layout.leaves]
        bound: dict[str, BoundProgram] = {}
        for name in (*(other for other in programs if other not in plan.programs), *plan.programs):
            bound[name] = BoundProgram(
                programs[name], self.module, held, names, settings=self.policy.compile, packages=packages,
                beside=bound.get("full"),
            )  # fmt: skip
        known = self.compiled.get((call.layout, self.state.key))
        signature = known.signature if known is not None else Signature(call, without_memory(plan), self.state)
        if known is not None:
            check_same(file, known.capture == call, signature.plan == without_memory(plan), known.programs, programs)
        if plan.branches in signature.compiled:
            raise LoadError(f"{file}: this signature is there twice, with {plan.branches} calls a step")
        log_programs(plan, programs)
        self.keep(Compiled(signature, plan, programs, bound))

    def check_cuts(self) -> None:
        """Of all signatures one at least has what the policy keeps: others may skip it.

        Raises:
            LoadError: none has.
        """
        if self.policy.cache is not None and self.compiled and all(m.plan.cut is None for m in self.compiled.values()):
            raise LoadError(f"{signature_file(0)}: its plan has no cut, unlike the policy, and no other signature has")

    def plan_anew(self, compiled: Compiled, branches: int, beside: int) -> Compiled:
        """The same programs for a step of other guidance branches: what is kept for all of them must be within budget.

        What was saved for more branches has room for fewer.

        Raises:
            BudgetError: it is not.
        """
        saved = [compiled, *compiled.signature.compiled.values()]
        budget = self.policy.memory_budget
        needed = [_bytes_needed(made, branches) + beside for made in saved]
        for made, size in zip(saved, needed, strict=True):
            if (branches <= made.plan.branches and not beside) or budget is None or size <= budget:
                return replace(made, plan=replace(made.plan, branches=branches, beside=beside))
        assert budget is not None
        raise BudgetError(
            f"memory_budget: a step of {branches} calls of {compiled.plan.model} takes {format_bytes(min(needed))} with"
            f" the programs that were saved, for {max(compiled.signature.compiled)} calls a step at most; the budget is"
            f" {format_bytes(budget)}. Call the original as many times a step, or give its policy"
            f" calls_per_step={branches}, and save that",
            min(needed),
        )

    def build(self, call: Call) -> NoReturn:
        """Say what differs from the nearest signature that was saved."""
        given, owner = self.reader.describe(call.layout), f"{self.reader.owner}.{self.reader.method}"
        saved = [self.reader.describe(layout) for layout, _ in self.compiled]
        if not saved:
            raise SignatureError(f"{owner} was not called before it was saved, so there are no programs for it")
        differences = min((_differences(given, known) for known in saved), key=len)
        if not differences:
            mode = "it is in training mode: call .eval()" if self.module.training else (
                "weights have another dtype, shape or device, or attributes were set")  # fmt: skip
            raise SignatureError(f"{owner} is not as it was loaded: {mode}")
        raise SignatureError(
            f"{owner} has no programs for this call: {'; '.join(differences[:4])}. A loaded module takes the calls that"
            f" it was saved with ({len(saved)} here); make the call on the original and save that"
        )


def _bytes_needed(made: Compiled, branches: int) -> int:
    """Bytes of all weights, of what is kept for each branch, and of the activations of the most demanding program."""
    inputs = (node for program in made.programs.values() for node in placeholders(program.graph_module.graph))
    weights = {given.name: num_bytes(node) for node in inputs if (given := input_of(node)).kind == "weight"}
    always = made.plan.history_bytes + made.plan.indicator_bytes + made.plan.output_bytes
    kept = {"slot": made.plan.slot_bytes, "hoisted": made.plan.hoist.num_bytes, "always": always}
    highest = 0
    for program in made.programs.values():
        made_here = {kind for kind, _ in program.state}
        held = sum(size * (branches - (kind in made_here)) for kind, size in kept.items())
        if "slot" in made_here:  # of several caches some stay
            held += sum(slot.num_bytes for slot in made.plan.slots if ("slot", slot.name) not in program.state)
        highest = max(highest, held + timeline(program.graph_module.graph).peak_bytes)
    return sum(weights.values()) + highest


def _differences(given: Mapping[str, str], saved: Mapping[str, str]) -> list[str]:
    return [
        f"{name} is {given.get(name, 'not given')}, saved {saved.get(name, 'without it')}"
        for name in dict.fromkeys((*given, *saved))
        if given.get(name) != saved.get(name)
    ]


class _Tensors:
    """All tensors of a saved module, read and checked.

    Attributes:
        weights: those that are not tied, by full name.
        weights_by_name: all of them.
        constants: by key.
    """

    def __init__(self, folder: Path, manifest: Manifest, paths: Paths | None, check_hash: bool) -> None:
        records = {name: record.tensor for name, record in manifest.weights.items() if record.tensor is not None}
        kept = {name: record for name, record in records.items() if manifest.weights[name].is_persistent}
        aliases = {name: w.tied_to for name, w in manifest.weights.items() if w.tied_to is not None}
        constants = dict(manifest.constants)
        missing = [name for name in records if name not in kept and buffer_key(name) not in constants]
        if missing:
            raise LoadError(f"the manifest of {folder} has no content for the buffer {missing[0]!r}")
        self.constants = (
            _read_all(_own_file(folder, CONSTANTS), f"{CONSTANTS} of {folder}", constants, {}, check_hash=True)
            if constants
            else {}
        )
        source, what = _weights_of(folder, manifest, paths)
        self.weights = _read_all(source, what, kept, aliases, check_hash=check_hash)
        self.weights |= {name: self.constants[buffer_key(name)] for name in records if name not in kept}
        self.weights_by_name = {
            name: self.weights[owner] for name, record in manifest.weights.items() if (owner := record.tied_to or name)
            in self.weights
        }  # fmt: skip


def _weights_of(folder: Path, manifest: Manifest, paths: Paths | None) -> tuple[list[str | Path], str]:
    """Where the weights are, and what messages call that."""
    if paths is not None:
        return ([paths] if isinstance(paths, str | Path) else list(paths)), "load: weights"
    if manifest.weight_files:
        raise LoadError(
            f"the weights of {manifest.model} are not in {folder}: pass weights=..., the path of what was saved as"
            f" {', '.join(manifest.weight_files[:3])}"
        )
    return _own_file(folder, WEIGHTS), f"{WEIGHTS} of {folder}"


def _own_file(folder: Path, name: str) -> list[str | Path]:
    path = folder / name
    if path.is_symlink():
        raise LoadError(f"{name} of {folder} is a symbolic link; saved modules hold ordinary files only")
    if not path.is_file():
        raise LoadError(f"{folder} has no {name}")
    return [path]


def _read_all(
    paths: Sequence[str | Path],
    what: str,
    records: Mapping[str, TensorRecord],
    aliases: Mapping[str, str],
    *,
    check_hash: bool,
) -> dict[str, torch.Tensor]:
    source = TensorSource(paths, what)
    places = source.check(records, aliases=aliases)
    return {name: source.read(name, places[name], record, check_hash=check_hash) for name, record in records.items()}


def _check_versions(manifest: Manifest, any_torch: bool) -> None:
    if manifest.lightcache_fx != __version__:
        log.info("saved by lightcache_fx %s, loaded by %s", manifest.lightcache_fx, __version__)
    here, there = str(torch.__version__), manifest.torch
    if here.split(".")[:2] != there.split(".")[:2] and not any_torch:
        raise LoadError(
            f"saved by torch {there}, this is {here}: kernels of another release may round otherwise, and its archives"
            f" may be read otherwise; install that release, save again, or pass any_torch=True"
        )


def _constants_of(output: OutputRecord) -> tuple[tuple[int, object], ...]:
    return tuple((place, decode(data)) for place, data in output.constants)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""`inspect`: what a transformed module or pipeline is made of and has done. Printable."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

from rich.console import Console
from rich.table import Table
from torch import nn

from lightcache_fx.compiled import Compiled
from lightcache_fx.errors import ArgumentError
from lightcache_fx.module import TransformedModule, runtime_of
from lightcache_fx.observed import ProgramRun
from lightcache_fx.pipeline import TransformedPipeline
from lightcache_fx.plan import Plan
from lightcache_fx.program import BoundProgram, Program
from lightcache_fx.runtime import Runtime
from lightcache_fx.units import format_bytes

_ROWS = 50
"""Of a timeline, when it is printed."""


@dataclass(frozen=True)
class ProgramReport:
    """One program.

    Attributes:
        name: `prologue`, `full` or `reuse`; `reuse_2` and so on where such steps copy at other moments.
        compiled: what runs it; `eager` is one operator after the other.
        runs: how often it has run to its end, in all threads.
        late_copies: how many copies of weights and slots had not been begun before the call that needed them began.
        program: the program itself.
    """

    name: str
    compiled: str
    runs: int
    late_copies: int
    program: Program

    @property
    def num_nodes(self) -> int:
        """How many operators it calls; a region that runs in chunks counts as one."""
        return self.program.num_calls

    @property
    def flops(self) -> int:
        """FLOPs of one run, all chunks of regions included; a multiply-add counts as two."""
        return self.program.flops

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that one run reads."""
        return self.program.weight_bytes

    @property
    def num_regions(self) -> int:
        """How many regions run chunk by chunk."""
        return self.program.num_regions

    @property
    def num_transfers(self) -> int:
        """How many copies to the device and from it one run begins."""
        return self.program.num_transfers

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        names = ("name", "compiled", "num_nodes", "flops", "weight_bytes", "num_regions", "num_transfers", "runs")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SignatureReport:
    """What was made for one kind of call.

    Attributes:
        arguments: each argument by name, in words: `float32[2, 4] on cpu`, or the value of one that is no tensor.
        branches: how many calls a denoising step has, by the plan.
        route: how the model was captured.
        plan: the decisions.
        programs: by name.
    """

    arguments: Mapping[str, str]
    branches: int
    route: str
    plan: Plan
    programs: Mapping[str, ProgramReport]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "arguments": dict(self.arguments),
            "branches": self.branches,
            "route": self.route,
            "programs": [program.as_dict() for program in self.programs.values()],
        }

    def table(self, owner: str) -> Table:
        """One row a program."""
        calls = "" if self.branches == 1 else f", {self.branches} calls a step"
        given = ", ".join(f"{name}: {words}" for name, words in self.arguments.items())
        table = Table(title=f"{owner}({given}){calls}, captured by {self.route}", title_justify="left")
        for column in ("program", "runs by", "nodes", "GFLOP", "weights read", "regions", "transfers", "runs"):
            table.add_column(column, justify="left" if column in ("program", "runs by") else "right")
        for one in self.programs.values():
            flops, weights = f"{one.flops / 1e9:.3f}", format_bytes(one.weight_bytes)
            counts = (one.num_regions, one.num_transfers, one.runs)
            table.add_row(one.name, one.compiled, str(one.num_nodes), flops, weights, *map(str, counts))
        return table


@dataclass(frozen=True)
class Report:
    """What a transformed module is made of and has done.

    Attributes:
        owner: class name of the model, and its method where that is not forward.
        plan: the decisions for the signature that was used last.
        programs: its programs by name: `full`, and `reuse` and `prologue` where there are such.
        counts: how often each kind of program has run, over all signatures and threads.
        kept_bytes: bytes of the slots held now by this thread's run.
        hoisted_bytes: bytes of the hoisted values held now by this thread's run.
        route: how the model was captured.
        late_copies: as in `ProgramReport`, of all programs of the signature that was used last.
        signatures: all that there are programs for, the one that was used last at the end.
        guard: what the policy's guard has seen, where it has one.
        timeline: this thread's last run, one entry for each program that ran, in order; at most the last 4,096.
    """

    owner: str
    plan: Plan
    programs: Mapping[str, Program]
    counts: Mapping[str, int]
    kept_bytes: int
    hoisted_bytes: int
    route: str
    late_copies: int
    signatures: tuple[SignatureReport, ...]
    timeline: tuple[ProgramRun, ...]
    guard: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON and YAML; times in seconds from the begin of the timeline."""
        start = self.timeline[0].begin if self.timeline else 0.0
        return {
            "owner": self.owner,
            "counts": dict(self.counts),
            "kept_bytes": self.kept_bytes,
            "hoisted_bytes": self.hoisted_bytes,
            "late_copies": self.late_copies,
            "guard": self.guard,
            "signatures": [signature.as_dict() for signature in self.signatures],
            "timeline": [run._replace(begin=run.begin - start)._asdict() for run in self.timeline],
        }

    def tables(self) -> list[Table]:
        """Rich tables: the programs of each signature, and the last run's timeline."""
        found = [signature.table(self.owner) for signature in self.signatures]
        return [*found, _timeline_table(self.timeline)] if self.timeline else found

    def __str__(self) -> str:
        return _printed(self)

    def lines(self) -> list[str]:
        """What stands below the tables."""
        held = f"{format_bytes(self.kept_bytes)} in slots and {format_bytes(self.hoisted_bytes)} in hoisted values"
        late = f"; {self.late_copies} copies were late" if self.late_copies else ""
        shown = len(self.timeline)
        more = [f"the timeline has {shown - _ROWS} more entries"] if shown > _ROWS else []
        guard = [self.guard] if self.guard is not None else []
        return [*more, f"held now: {held}{late}", *guard]


@dataclass(frozen=True)
class PipelineReport:
    """The reports of a transformed pipeline's components.

    Attributes:
        model: class name of the pipeline.
        components: by name; of an autoencoder the methods that were called, as `vae.decode`.
        uncalled: names of those that have not been called, so that there are no programs.
        uncaptured: names of those that run as they are, and why they cannot be captured.
    """

    model: str
    components: Mapping[str, Report]
    uncalled: tuple[str, ...]
    uncaptured: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON and YAML."""
        return {
            "model": self.model,
            "components": {name: report.as_dict() for name, report in self.components.items()},
            "uncalled": list(self.uncalled),
            "uncaptured": dict(self.uncaptured),
        }

    def __str__(self) -> str:
        parts = [f"{name}\n{report}" for name, report in self.components.items()]
        if self.uncalled:
            parts.append(f"not called yet: {', '.join(self.uncalled)}")
        parts += [f"{name} runs as it is: {reason}" for name, reason in self.uncaptured.items()]
        return "\n\n".join([self.model, *parts])


@overload
def inspect(transformed: nn.Module, method: str | None = None) -> Report: ...
@overload
def inspect(transformed: Any, method: str | None = None) -> Any: ...
def inspect(transformed: Any, method: str | None = None) -> Report | PipelineReport:
    """Programs, plans, counters and the last run's timeline of a transformed module or pipeline; `print` it.

        print(lightcache_fx.inspect(pipe))
        lightcache_fx.inspect(unet).timeline[0].seconds

    Nothing is run and nothing waits for a device. FLOPs are counted when they are asked for or printed, the first time
    in about a second for the largest models.

    Args:
        transformed: a module that `transform` or `load` returned, or `torch.compile` with this package's backend: its
            latest graph; or a pipeline that `transform_pipeline` returned.
        method: of a module: `forward`, or `decode` or `encode` of an autoencoder; by default forward or decode.

    Returns:
        a `Report` of a module; a `PipelineReport` of a pipeline, whose components may not have been called yet.

    Raises:
        ArgumentError: it is neither, or has no such method.
        TransformError: a module that is not transformed, or that has not been called yet.
    """
    if isinstance(transformed, TransformedPipeline):
        if method is not None:
            raise ArgumentError(
                f"inspect: method={method!r} is of a module; for a component of this {type(transformed).__name__} pass"
                f" that, as in inspect(pipe.vae, {method!r})"
            )
        return _report_of_pipeline(transformed)
    if not isinstance(transformed, nn.Module):
        raise ArgumentError(
            f"inspect: expected a module that lightcache_fx.transform or load returned, or a pipeline that"
            f" transform_pipeline returned, got {type(transformed).__name__}"
        )
    return _report(runtime_of(transformed, method))


def _report(runtime: Runtime) -> Report:
    latest = runtime.repertoire.latest()
    name, method = runtime.reader.owner, runtime.reader.method
    return Report(
        owner=name if method == "forward" else f"{name}.{method}",
        plan=latest.plan,
        programs=dict(latest.programs),
        counts=dict(runtime.counts),
        kept_bytes=runtime.kept_bytes(),
        hoisted_bytes=runtime.hoisted_bytes(),
        route=latest.capture.route,
        late_copies=sum(bound.late_copies for bound in latest.bound.values()),
        signatures=tuple(_signature(runtime, made) for of_one in runtime.repertoire.everything() for made in of_one),
        timeline=runtime.timeline(),
        guard=str(runtime.watch) if runtime.watch is not None else None,
    )


def _signature(runtime: Runtime, made: Compiled) -> SignatureReport:
    return SignatureReport(
        arguments=runtime.reader.describe(made.capture.layout),
        branches=made.plan.branches,
        route=made.capture.route,
        plan=made.plan,
        programs={name: _program(bound) for name, bound in made.bound.items()},
    )


def _program(bound: BoundProgram) -> ProgramReport:
    return ProgramReport(bound.program.name, bound.compiled, bound.runs, bound.late_copies, bound.program)


def _report_of_pipeline(pipe: TransformedPipeline) -> PipelineReport:
    reports: dict[str, Report] = {}
    uncalled: list[str] = []
    uncaptured: dict[str, str] = {}
    for name in pipe._lightcache.components:
        module = getattr(pipe, name)
        if not isinstance(module, TransformedModule):
            continue  # the user has put another there
        called = False
        for method, runtime in module._lightcache.runtimes.items():
            key = name if len(module._lightcache.runtimes) == 1 else f"{name}.{method}"
            if (reason := runtime.uncaptured()) is not None:
                uncaptured[key] = reason
            elif runtime.repertoire.compiled:
                reports[key] = _report(runtime)
            else:
                continue
            called = True
        if not called:
            uncalled.append(name)
    return PipelineReport(type(pipe).__name__, reports, tuple(uncalled), uncaptured)


def _timeline_table(timeline: tuple[ProgramRun, ...]) -> Table:
    table = Table(title="the last run", title_justify="left")
    for column in ("step", "branch", "program", "begun after", "host took", "kept behind it"):
        table.add_column(column, justify="left" if column == "program" else "right")
    start = timeline[0].begin
    for run in timeline[:_ROWS]:
        times = f"{run.begin - start:.4f} s", f"{1e3 * run.seconds:.2f} ms"
        table.add_row(str(run.step), str(run.branch), run.program, *times, format_bytes(run.kept_bytes))
    return table


def _printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=False, highlight=False)
    for table in report.tables():
        console.print(table)
    for line in report.lines():
        console.print(line)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text).rstrip()

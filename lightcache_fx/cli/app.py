"""The commands, such as `plan` and `report`. Results go to standard output, all else to standard error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from lightcache_fx.cli import measuring, planning
from lightcache_fx.cli.measuring import FAILED
from lightcache_fx.cli.output import busy, console, print_json, say, show
from lightcache_fx.cli.planning import Dtype, Kind, Planned, Wish
from lightcache_fx.cli.presets import PRESETS
from lightcache_fx.cli.programs import PrintedPrograms, saved_programs
from lightcache_fx.cli.systems import read_system
from lightcache_fx.errors import ArgumentError, BudgetError, LightcacheError, MissingExtraError
from lightcache_fx.loading import load
from lightcache_fx.pipeline_plan import PipelinePlan
from lightcache_fx.reports import inspect as inspect_module
from lightcache_fx.units import format_bytes
from lightcache_fx.version import __version__

MISTAKE = 2
"""Exit code: what was asked for cannot be done."""


class Commands(TyperGroup):
    """The group of commands, which tells mistakes in one line."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except LightcacheError as error:
            if ctx.params.get("debug"):
                raise
            say(str(error))
            raise typer.Exit(MISTAKE) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"lightcache-fx {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Plans for cheaper image and video diffusion, and what acceleration does to the pictures.

    Exit codes: 0 done, 1 a comparison failed, 2 a mistake, told in one line.
    """


@app.command(epilog="Example: lightcache-fx plan svd-xt --interval 4 --memory-budget 6GiB")
def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A pipeline's or model's folder as diffusers writes it (weights are not read), a model's config.json,"
            f" or one of {', '.join(PRESETS)}.",
        ),
    ],
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of the video.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos at once.")] = 1,
    guidance: Annotated[
        bool | None, typer.Option("--guidance/--no-guidance", help="Whether a step also predicts without the prompt.")
    ] = None,
    decode_frames: Annotated[int | None, typer.Option(min=1, help="Frames decoded at a time.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and latents.")] = "float16",
    component: Annotated[str | None, typer.Option(help="Plan this model of a pipeline alone, the vae say.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=SHAPE", help="An argument of the model, such as timestep=2:int64."),
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML file with the policy.")] = None,
    interval: Annotated[int | None, typer.Option(help="DeepCache: one step in so many is full.")] = None,
    branch: Annotated[int | None, typer.Option(help="DeepCache: the skip connection to cut at.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Leave out a preset's caching.")] = False,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="For all that is on the device: 6GiB; plans the whole pipeline.")
    ] = None,
    device: Annotated[Kind, typer.Option(help="What memory is predicted for.")] = "cuda",
    tflops: Annotated[float | None, typer.Option(min=1e-6, help="Of the device, 10¹² a second.")] = None,
    memory_bandwidth: Annotated[float | None, typer.Option(min=1e-6, help="Of its memory, GB/s.")] = None,
    link: Annotated[float | None, typer.Option(min=1e-6, help="To and from host memory, GB/s each way.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Plan caching and memory for a model or pipeline, from its configuration alone: no weights, no GPU.

    Sizes, steps and caching that are not given are a preset's published ones, or those of the model's configuration.
    """
    system = read_system(source, PRESETS)
    made = planning.make_policy(
        system, file=policy, interval=interval, branch=branch, cache=not no_cache, memory_budget=memory_budget
    )
    sizes: dict[str, int | bool | None] = {
        "height": height,
        "width": width,
        "frames": frames,
        "steps": steps,
        "guidance": guidance,
        "decode_frames": decode_frames,
    }
    wish = Wish(component, batch, dtype, sizes, inputs or ())
    hardware = planning.describe_hardware(device, dtype, tflops, memory_bandwidth, link)
    if hardware is not None and not (made.is_about_memory() or made.chunk is not None or made.decode is not None):
        raise ArgumentError("--tflops, --memory-bandwidth and --link are for plans within a --memory-budget")
    try:
        with busy(f"planning {system.title}"):
            planned = planning.plan_system(system, wish, made, device, hardware)
    except BudgetError as error:
        if as_json:
            facts = {"system": system.title, "fits": False, "reached_bytes": error.reached, "refusal": str(error)}
            print_json(facts)
        raise
    if as_json:
        print_json(planned.as_dict())
    else:
        _print_plan(planned)
    if isinstance(planned.plan, PipelinePlan) and not planned.plan.fits:
        raise BudgetError(_refusal(planned.plan, memory_budget))


def _refusal(found: PipelinePlan, budget: str | None) -> str:
    refused = [stage for stage in found.stages if stage.refusal is not None]
    names = ", ".join(stage.stage.name for stage in refused)
    most = max(refused, key=lambda stage: stage.peak_bytes)
    do, within = "does" if len(refused) == 1 else "do", f" {budget}" if budget else ""
    return f"{names} {do} not fit{within}: the least is {format_bytes(most.peak_bytes)}, for {most.stage.name}"


def _print_plan(planned: Planned) -> None:
    found, request = planned.plan, planned.made.request
    size = f"{request.frames} frames of {request.width} x {request.height}"
    guided = "guidance" if request.guidance else "no guidance"
    show(f"{planned.made.system.title}: {size}, {request.steps} steps, {guided}")
    if isinstance(found, PipelinePlan):
        show(found.table(), *found.lines())
        for name, reason in planned.made.left_out.items():
            show(f"not planned: {name}, {reason}")
    else:
        show(*found.tables(), *(f"note: {note}" for note in found.notes))
        if found.cut is not None:
            gain = f"{found.flop_bound_speedup(request.steps):.2f}x"
            show(f"by FLOPs alone, {request.steps} steps are at most {gain} as fast as without caching")
    say(f"planned in {planned.seconds:.1f} s")


app.command(epilog="Example: lightcache-fx demo --model my/pipeline --prompt 'a red box' --interval 4")(measuring.demo)
app.command(epilog="Example: lightcache-fx bench my/pipeline --prompt 'a red box' --interval 4 --out bench.json")(
    measuring.bench
)


@app.command(epilog="Example: lightcache-fx compare plain.mp4 accelerated.mp4 --fail-below psnr=30")
def compare(
    plain: Annotated[str, typer.Argument(metavar="PLAIN", help="The video as it is without acceleration.")],
    accelerated: Annotated[str, typer.Argument(metavar="ACCELERATED", help="The other, of the same size.")],
    measures: Annotated[
        list[str] | None,
        typer.Option("--measure", metavar="NAME", help="psnr, ssim, flip, lpips, temporal or warping; all by default."),
    ] = None,
    fail_below: Annotated[
        list[str] | None, typer.Option(metavar="NAME=LEAST", help="Exit with 1 below this: psnr=30, ssim.worst=0.9.")
    ] = None,
    fail_above: Annotated[
        list[str] | None, typer.Option(metavar="NAME=MOST", help="Exit with 1 above this: flip=0.05.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with figures for every frame.")] = False,
) -> None:
    """Compare two videos: how far is the accelerated one from the plain one?

    Videos are GIF or MP4 files, folders of pictures, NPY, or NPZ (frames.npz:plain names one of several arrays). What
    cannot be measured is said, with the reason; nothing is downloaded.
    """
    from lightcache_fx.cli.comparing import failures, quality_table, read_limits
    from lightcache_fx.quality import MEASURES, compare_videos

    limits = read_limits(fail_below or (), fail_above or (), measures)
    with busy("reading") as tell:
        quality = compare_videos(plain, accelerated, measures=measures or tuple(MEASURES), progress=tell)
    failed = failures(quality, limits)
    if as_json:
        print_json({"plain": plain, "accelerated": accelerated, "quality": quality.as_dict(), "failures": failed})
    else:
        show(*quality_table(quality))
    for line in failed:
        say(line)
    if failed:
        raise typer.Exit(FAILED)


@app.command(epilog="Example: lightcache-fx diff animatediff --from model --to reuse > reuse.diff")
def diff(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A folder that `save` wrote, or as for `plan`.")],
    before: Annotated[
        str | None, typer.Option("--from", metavar="PROGRAM", help="`model` (as captured), `full`, `reuse`, ...")
    ] = None,
    after: Annotated[str | None, typer.Option("--to", metavar="PROGRAM", help="By default `reuse`, or `full`.")] = None,
    policy: Annotated[Path | None, typer.Option(help="YAML file with the policy, of a model.")] = None,
    interval: Annotated[int | None, typer.Option(help="DeepCache: one step in so many is full.")] = None,
    branch: Annotated[int | None, typer.Option(help="DeepCache: the skip connection to cut at.")] = None,
    component: Annotated[str | None, typer.Option(help="A model of a pipeline; by default the denoiser.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of the video.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and latents.")] = "float16",
    inputs: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=SHAPE", help="An argument of the model.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Of a saved module that was saved without its weights.")] = None,
    context: Annotated[int, typer.Option(min=0, help="Unchanged lines around a change.")] = 3,
) -> None:
    """Print what a pass of denoising leaves out: the difference between two programs of a module."""
    own = {"policy": policy, "interval": interval, "branch": branch, "component": component, "height": height,
           "width": width, "frames": frames, "input": inputs}  # fmt: skip
    if _is_saved(source):
        if given := [f"--{name}" for name, value in own.items() if value not in (None, [])]:
            raise ArgumentError(f"{source} is a saved module, planned already: leave out {', '.join(given)}")
        with busy(f"loading {source}"):
            programs = saved_programs(Path(source), weights)
    else:
        system = read_system(source, PRESETS)
        asked = planning.make_policy(system, file=policy, interval=interval, branch=branch)
        sizes: dict[str, int | bool | None] = {"height": height, "width": width, "frames": frames}
        with busy(f"planning {system.title}"):
            found = planning.programs_of(system, Wish(component, 1, dtype, sizes, inputs or ()), asked, "cuda")
        programs = PrintedPrograms(found)
    for line in programs.diff(before, after, context):
        console().print(Text(line, style=_STYLES.get(line[:1], "")), soft_wrap=True)


_STYLES = {"-": "red", "+": "green", "@": "cyan"}


@app.command(epilog="Example: lightcache-fx inspect unet.lightcache")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="That `lightcache_fx.save` wrote.")],
    weights: Annotated[Path | None, typer.Option(help="Of a module that was saved without its weights.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a saved module is made of: its signatures, its programs and its policy."""
    with busy(f"loading {folder}"):
        module = load(folder, weights=weights, check_weights=False, any_torch=True)
        report = inspect_module(module)
        tables = report.tables()
    policy = report.plan.policy.to_yaml()
    if as_json:
        print_json({**report.as_dict(), "policy": policy})
        return
    show(*tables, f"policy: {policy.strip()}")


@app.command(epilog="Example: lightcache-fx report report.html --run out/demo")
def report(
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="The page to write.")],
    run: Annotated[Path, typer.Option(help="Folder that a run of the demo left.")] = Path("out/demo"),
) -> None:
    """Write one page that works offline: videos, stages, memory, plan, programs and quality of a run."""
    try:
        from lightcache_fx.cli.report_page import page
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "numpy", "PIL"):
            raise
        raise MissingExtraError(f"report needs {error.name}", "cli") from None
    with busy(f"reading {run}"):
        text = page(run)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot write {out}: {error.strerror}") from None
    say(f"wrote {out}, {format_bytes(len(text.encode()))}")


def _is_saved(source: str) -> bool:
    return source not in PRESETS and (Path(source) / "manifest.json").is_file()

"""The commands that run a pipeline: `demo` and `bench`. What they import is imported as they begin."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lightcache_fx.cli.output import console, print_json, say, show
from lightcache_fx.cli.planning import Dtype
from lightcache_fx.errors import ArgumentError, MissingExtraError
from lightcache_fx.published import PUBLISHED

FAILED = 1
"""Exit code: what was asked for does not hold."""
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="What to show, of a pipeline that takes words.")]
Negative = Annotated[str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What not to show.")]
Picture = Annotated[str | None, typer.Option("--image", metavar="FILE", help="Picture to begin with; file or URL.")]
Height = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
NumFrames = Annotated[int | None, typer.Option(min=1, help="Of the video.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option("--argument", metavar="NAME=VALUE", help="Of the pipeline's call, such as guidance_scale=6."),
]
Seed = Annotated[int, typer.Option(help="Decides all noise.")]


def demo(
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A pipeline's; by default the shipped model of a checkout.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/demo"),
    policy: Annotated[Path | None, typer.Option(help="YAML policy, instead of interval, branch and budget.")] = None,
    interval: Annotated[int, typer.Option(help="One step in so many is full.")] = 3,
    branch: Annotated[int, typer.Option(help="DeepCache's branch: the skip connection to cut at.")] = 0,
    decode_budget: Annotated[
        str, typer.Option(help="Memory for decoding: bytes, or a share of what it takes as it is.")
    ] = "60%",
    prompt: Prompt = None,
    negative: Negative = None,
    image: Picture = None,
    height: Height = None,
    width: Width = None,
    frames: NumFrames = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; 25 where nothing says.")] = None,
    fps: Annotated[int | None, typer.Option(min=1, help="Frames a second of the files; 8 where nothing says.")] = None,
    arguments: Arguments = None,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of each pipeline; medians are shown.")] = 3,
) -> None:
    """Make one video, plain and accelerated, side by side, with time, memory and quality; on the CPU.

    FOLDER is any pipeline of diffusers that makes videos or pictures. What it is asked for is in its example.yaml, if
    it has one; options come before that.
    """
    with _extra("demo", "demo"):
        from lightcache_fx.cli import demo as demos
        from lightcache_fx.cli.demo_report import grids
    from lightcache_fx.cli.benching import check_positive
    from lightcache_fx.cli.generating import Asked, example_of, read_arguments

    check_positive(repeats=repeats, **({} if steps is None else {"steps": steps}))
    read = demos.read_policy(policy, interval, branch, decode_budget)
    folder = str(demos.shipped_model()) if model is None else model
    asked = Asked(
        prompt=prompt,
        negative_prompt=negative,
        image=image,
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        fps=fps,
        arguments=read_arguments(arguments),
    )
    asked = asked.over(example_of(folder)).over(Asked(steps=25, fps=demos.FPS))
    try:
        found = demos.run(folder, asked, read, out=out, seed=seed, repeats=repeats, console=Console(stderr=True))
    except OSError as error:
        raise ArgumentError(f"cannot write to {out}: {error.strerror or error}") from error
    here = console()
    for grid in grids(found):
        here.print(grid.to_rich())
    for note in found.notes():
        here.print(f"[bold]note:[/bold] {note}")
    here.print(f"Results are in {out}; begin with {out / 'side_by_side.gif'}.", soft_wrap=True)
    here.print(f"One page of it all: lightcache-fx report report.html --run {out}", soft_wrap=True)


def bench(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A pipeline's folder as diffusers writes it, or a model id.")
    ],
    policies: Annotated[
        list[Path] | None, typer.Option("--policy", metavar="FILE", help="YAML policy; several are measured together.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Policy.lightcache: one of {', '.join(PUBLISHED)}, or generic."),
    ] = None,
    interval: Annotated[int | None, typer.Option(help="DeepCache: one step in so many is full; by default 3.")] = None,
    branch: Annotated[int | None, typer.Option(help="DeepCache: the skip connection to cut at; by default 0.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="For all that is on the device, such as 6GiB.")
    ] = None,
    prompt: Prompt = None,
    negative: Negative = None,
    image: Picture = None,
    height: Height = None,
    width: Width = None,
    frames: NumFrames = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default the pipeline's.")] = None,
    arguments: Arguments = None,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option(help="Timed generations of each way, taken in turns.")] = 3,
    warm_ups: Annotated[int, typer.Option(help="Generations of each way before that.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU if there is one.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights; by default float32 on a CPU, else float16.")] = None,
    fail_below: Annotated[
        list[str] | None, typer.Option(metavar="NAME=LEAST", help="Exit with 1 below this: psnr=30, ssim.worst=0.9.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write all figures there too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a pipeline plain and accelerated, in one run: seconds and peak of each stage, and quality.

    Ways warm up, take turns, and are compared by medians. Without a policy it is DeepCache's: interval 3, branch 0.
    What is asked for is in the folder's example.yaml, if it has one; options come before that.
    """
    with _extra("bench", "cli"):
        from lightcache_fx.cli import benching
        from lightcache_fx.cli.comparing import failures, read_limits
    import torch

    from lightcache_fx.cli.generating import Asked, check_source, example_of, read_arguments
    from lightcache_fx.cli.timing import device_named

    benching.check_positive(rounds=rounds, warm_ups=warm_ups, **({} if steps is None else {"steps": steps}))
    limits = read_limits(fail_below or (), (), ("psnr", "ssim"))
    chosen = benching.read_policies(policies or (), preset, interval, branch, memory_budget)
    check_source(source)
    where = device_named(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = dtype or ("float32" if where.type == "cpu" else "float16")
    asked = Asked(
        prompt=prompt,
        negative_prompt=negative,
        image=image,
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        arguments=read_arguments(arguments),
    ).over(example_of(source))
    if out is not None:
        _check_writable(out)
    found = benching.Bench(
        source, asked, chosen, device=where, dtype=getattr(torch, kind), seed=seed, rounds=rounds, warm_ups=warm_ups
    ).measure(Console(stderr=True))
    failed = [f"{name}: {line}" for name, quality in found.quality.items() for line in failures(quality, limits)]
    facts = {**found.as_dict(), "failures": failed}
    if out is not None:
        print_json(facts, out)
        say(f"wrote {out}")
    if as_json:
        print_json(facts)
    else:
        show(found.table(), *found.lines())
    for line in failed:
        say(line)
    if failed:
        raise typer.Exit(FAILED)


def _check_writable(path: Path) -> None:
    """Before anything is measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ArgumentError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def _extra(command: str, extra: str) -> Iterator[None]:
    """Says which extra a library that is missing comes with."""
    try:
        yield
    except MissingExtraError as error:
        raise MissingExtraError(f"{command}: {str(error).partition(', which')[0]}", extra) from error
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lightcache_fx"):
            raise
        raise MissingExtraError(f"{command} needs {error.name}", extra) from error

"""How many graphs `torch.compile` makes of a model with a cache on: ours, and those of others, in one run.

    python -m benchmarks.graphs                  # some minutes on two cores

Each model (small ones of the published architectures) runs `STEPS` steps under `torch.compile` with the cache of each
row switched on through its public interface. Counted are the frames that Dynamo compiled, the breaks in them, and how
often something was compiled anew. A cache that does not support a model has a dash and the reason below. cache-dit is
counted where it is installed (`pip install cache-dit`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import lightcache_fx as lc
from benchmarks.common import RESULTS, environment, markdown_table, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the models of the tests' zoo

from zoo import ZOO, run_inputs

STEPS = 25
UNETS = ("sd", "svd", "modelscope", "animatediff")
DITS = ("flux", "wan", "cogvideox", "hunyuanvideo", "pixart")


@contextmanager
def ours(model: nn.Module) -> Iterator[nn.Module]:
    """This package's backend, with a cache; the compiler behind it is none, since graphs are what counts."""
    policy = lc.Policy(cache=lc.Cache(cut="auto", interval=3), compile="eager")  # type: ignore[arg-type]
    yield torch.compile(model, backend=lc.backend(policy))


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """No cache."""
    yield torch.compile(model, backend="eager")


def first_block_config() -> Any:
    """The setting of diffusers' FirstBlockCache."""
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=0.2)


def taylor_seer_config() -> Any:
    """That of its TaylorSeer."""
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, max_order=1, cache_identifiers=[r".*\.attn1?$"]
    )


def cache_dit_config() -> Any:
    """That of cache-dit's DBCache."""
    import cache_dit as peer

    return peer.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2)


@contextmanager
def first_block_cache(model: nn.Module) -> Iterator[nn.Module]:
    """Diffusers' FirstBlockCache."""
    with _enabled(model, first_block_config()) as enabled:
        yield enabled


@contextmanager
def taylor_seer(model: nn.Module) -> Iterator[nn.Module]:
    """Diffusers' TaylorSeer."""
    with _enabled(model, taylor_seer_config()) as enabled:
        yield enabled


@contextmanager
def _enabled(model: Any, config: object) -> Iterator[nn.Module]:
    model.enable_cache(config)
    try:
        registries = [
            vars(module)["_diffusers_hook"] for module in model.modules() if "_diffusers_hook" in vars(module)
        ]
        if not any(registry.hooks for registry in registries):
            raise RuntimeError("it finds nothing in this model to cache")
        with model.cache_context("cond"):
            yield torch.compile(model, backend="eager")
    finally:
        model.disable_cache()


@contextmanager
def cache_dit(model: nn.Module) -> Iterator[nn.Module]:
    """cache-dit's DBCache."""
    if importlib.util.find_spec("cache_dit") is None:
        raise RuntimeError("cache-dit is not installed")
    import cache_dit as peer

    peer.enable_cache(model, cache_config=cache_dit_config())
    try:
        yield torch.compile(model, backend="eager")
    finally:
        peer.disable_cache(model)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "no cache": plain,
    "ours": ours,
    "FirstBlockCache (diffusers)": first_block_cache,
    "TaylorSeer (diffusers)": taylor_seer,
    "cache-dit": cache_dit,
}


def count(name: str, way: Callable[[nn.Module], Any], steps: int) -> dict[str, Any]:
    """Graphs, breaks and recompilations of one model in one run."""
    from torch._dynamo import callback, reset
    from torch._dynamo.utils import counters

    model, make_inputs = ZOO[name].build()
    reset()
    counters.clear()
    anew: list[object] = []
    handler = callback.on_compile_end(lambda event: (anew.append(event), event)[1])
    try:
        with way(model) as compiled, torch.no_grad():
            for inputs in run_inputs(make_inputs, 0, steps):
                compiled(**inputs)
    except Exception as error:  # noqa: BLE001 - what a peer does not support is reported
        return {"reason": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"}
    finally:
        callback.callback_handler.remove_end_callback(handler)
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "compilations": len(anew),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(ZOO), default=(*UNETS, *DITS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS / "graphs.json")
    given = parser.parse_args(arguments)
    console = Console()
    found: dict[str, dict[str, Any]] = {}
    for name in given.models:
        found[name] = {title: count(name, way, given.steps) for title, way in WAYS.items()}
        console.log(f"{name}: {found[name]}")
    rows = [(name, *(_cell(of[title]) for title in WAYS)) for name, of in found.items()]
    lines = [f"# Graphs, breaks in them, and compilations, of {given.steps} steps under torch.compile", ""]
    lines += markdown_table(("model", *WAYS), rows)
    lines += ["", "graphs / breaks / compilations; a dash: it does not run, because", ""]
    lines += [
        f"* {name}, {title}: {facts['reason']}"
        for name, of in found.items()
        for title, facts in of.items()
        if "reason" in facts
    ]
    console.print("\n".join(lines), markup=False)
    write_json(given.out, {"environment": environment(), "steps": given.steps, "models": found})
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(facts: dict[str, Any]) -> str:
    return "–" if "reason" in facts else f"{facts['graphs']} / {facts['breaks']} / {facts['compilations']}"


if __name__ == "__main__":
    main()

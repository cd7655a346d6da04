"""TORCH_LOGS in another process: passes and programs, each alone or with everything else."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import lightcache_fx as lc
from lightcache_fx import Cache, Policy
from toys import Denoiser, latent, prompt

SCRIPT = """
import torch
import lightcache_fx as lc
from lightcache_fx import Cache, Policy
from toys import Denoiser, latent, prompt

fast = lc.transform(Denoiser(), Policy(cache=Cache(cut=0, interval=2)))
fast(latent(0), torch.tensor(9.0), prompt(0))
"""
PASS = re.compile(r"pass (\w+): (\d+) -> (\d+) nodes in \d+\.\d\d ms")
SIZE = re.compile(r"Denoiser\.(\w+): (\d+) nodes, \d+\.\d+ GFLOP, 0 chunked regions, 0 transfers")


def logged(setting: str | None, script: str = SCRIPT) -> str:
    """What a process prints to stderr that has `TORCH_LOGS` set so, when it imports torch."""
    environment = {key: value for key, value in os.environ.items() if key != "TORCH_LOGS"}
    environment |= {} if setting is None else {"TORCH_LOGS": setting}
    environment["PYTHONPATH"] = os.path.dirname(__file__)  # noqa: PTH120
    made = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert made.returncode == 0, made.stderr
    return made.stderr


@pytest.mark.parametrize(
    ("setting", "passes", "sizes", "printed"),
    [
        (None, False, False, False),
        ("lightcache_fx", False, True, False),
        ("+lightcache_fx", True, True, True),
        ("+lightcache_fx.passes", True, False, False),
        ("lightcache_fx.program_log", False, True, False),
        ("+lightcache_fx.program_log", False, True, True),
        ("+lightcache_fx.passes,lightcache_fx.program_log", True, True, False),
    ],
)
def test_settings(setting: str | None, passes: bool, sizes: bool, printed: bool) -> None:
    text = logged(setting)
    assert bool(PASS.search(text)) == passes
    assert bool(SIZE.search(text)) == sizes
    assert ('= weight "inner.weight"' in text) == printed


def test_what_is_logged() -> None:
    text = logged("+lightcache_fx.passes,+lightcache_fx.program_log")
    fast = lc.transform(Denoiser(), Policy(cache=Cache(cut=0, interval=2)))
    fast(latent(0), torch.tensor(9.0), prompt(0))
    report = lc.inspect(fast)
    found = [(name, int(before), int(after)) for name, before, after in PASS.findall(text)]
    names = [name for name, _, _ in found]
    assert {"split_run_invariants", "write_cache", "read_cache", "remove_marks", "remove_dead_code"} <= set(names)
    assert names.count("write_cache") == names.count("read_cache")  # planning makes the graphs as well
    last = [after for name, _, after in found if name == "remove_dead_code"]
    assert len(report.programs["reuse"].graph_module.graph.nodes) in last
    assert len(report.programs["full"].graph_module.graph.nodes) in last
    assert {name: int(nodes) for name, nodes in SIZE.findall(text)} == {
        name: program.num_calls for name, program in report.programs.items()
    }
    plain = "\n".join(line.partition("] ")[2] if line.startswith(("V", "I")) else line for line in text.splitlines())
    for program in report.programs.values():
        for line in lc.format_graph(program, modules=True).splitlines():
            assert line in plain


def test_in_a_running_process() -> None:
    """As torch's own logs are switched on from code."""
    switch = "import logging\nimport torch._logging\ntorch._logging.set_logs(modules={%r: logging.DEBUG})\n"
    for module, passes in (("lightcache_fx.passes.base", True), ("lightcache_fx.program_log", False)):
        text = logged(None, switch % module + SCRIPT)
        assert bool(PASS.search(text)) == passes
        assert ('= weight "inner.weight"' in text) != passes

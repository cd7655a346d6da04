"""A training loop that stops and resumes without a trace.

Every random draw of step `s` comes from a generator seeded with (seed, s), so a run that was cut and resumed computes
the same numbers as one that was not, on the same machine with the same number of threads. The learning rate warms up,
stays, and falls linearly to zero over the last `decay_steps`, so that the end can be chosen while the run is under way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LossFunction = Callable[[torch.nn.Module, torch.Generator], torch.Tensor]
Evaluation = Callable[[torch.nn.Module], dict[str, float]]


@dataclass(frozen=True)
class FitOptions:
    """Settings of one run; `minutes` stops it early (and leaves a checkpoint) if it is not done by then."""

    folder: Path
    seed: int
    steps: int
    learning_rate: float
    warmup_steps: int = 100
    decay_steps: int = 500
    ema_decay: float = 0.998
    evaluate_every: int = 100
    minutes: float | None = None

    @property
    def checkpoint(self) -> Path:
        """Where model, average, optimizer and step are kept."""
        return self.folder / "checkpoint.pt"

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of `step`."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (self.steps - step) / self.decay_steps)
        return self.learning_rate * warmup * decay


class Averaged:
    """An exponential moving average of a module's parameters, swapped in by `with`."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = list(module.parameters())
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    def update(self, step: int) -> None:
        """Move the average towards the parameters; early steps weigh more."""
        decay = min(self.decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def apply(self) -> None:
        """Give the module the averaged weights."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data.copy_(value)

    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data, value.data = value.data, parameter.data

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._swap()


class Run:
    """A module being trained, with everything that a checkpoint must hold."""

    def __init__(self, module: torch.nn.Module, options: FitOptions) -> None:
        self.module = module
        self.options = options
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self.average = Averaged(module, options.ema_decay)
        self.step = 0

    def save(self) -> None:
        """Write the checkpoint; a cut while writing leaves the previous one."""
        partial = self.options.checkpoint.with_suffix(".partial")
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.values,
            "step": self.step,
        }
        torch.save(state, partial)
        partial.replace(self.options.checkpoint)

    def restore(self) -> None:
        """Read the checkpoint if there is one."""
        if not self.options.checkpoint.exists():
            return
        state = torch.load(self.options.checkpoint, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        for value, saved in zip(self.average.values, state["average"], strict=True):
            value.copy_(saved)
        self.step = state["step"]

    def advance(self, loss_function: LossFunction) -> float:
        """Take one step and return its loss."""
        generator = torch.Generator().manual_seed(self.options.seed * 10_000_019 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate_at(self.step)
        loss = loss_function(self.module, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.step)
        self.step += 1
        return float(loss.detach())

    def log(self, losses: list[float], evaluation: dict[str, float], seconds: float) -> None:
        """Append one JSON line: mean training loss since the last line, held-out figures of the average."""
        mean_loss = sum(losses) / len(losses)
        record = {"step": self.step, "train_loss": mean_loss, **evaluation, "seconds": round(seconds, 1)}
        with (self.options.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        refresh_per_second=1,
    )


def fit(run: Run, loss_function: LossFunction, evaluate: Evaluation) -> bool:
    """Train from the checkpoint on; return whether all steps are done. An interrupt leaves the last checkpoint."""
    run.restore()
    options = run.options
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    losses: list[float] = []
    with _progress() as progress:
        task = progress.add_task(options.folder.name, total=options.steps, completed=run.step)
        while run.step < options.steps:
            losses.append(run.advance(loss_function))
            done = run.step == options.steps
            elapsed = time.monotonic() - started
            late = options.minutes is not None and elapsed > 60 * options.minutes
            if done or late or run.step % options.evaluate_every == 0:
                with torch.no_grad(), run.average:
                    evaluation = evaluate(run.module)
                run.log(losses, evaluation, elapsed)
                run.save()
                figures = " ".join(f"{name} {value:.4f}" for name, value in evaluation.items())
                progress.console.print(f"step {run.step}: train {sum(losses) / len(losses):.4f} {figures}")
                losses.clear()
            progress.update(task, completed=run.step)
            if late:
                break
    return run.step == options.steps

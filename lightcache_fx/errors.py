"""Every error that lightcache_fx raises on purpose.

A message names the argument, node or module it is about, what was expected, what came and what to try. State is left as
it was: an error raised while capturing or planning leaves the user's module and every earlier program usable.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LightcacheError(Exception):
    """Base of all errors of this package."""


class ArgumentError(LightcacheError, TypeError):
    """An argument of a public function, or of a model call, has the wrong type or cannot be understood."""


class PolicyError(LightcacheError, ValueError):
    """A policy has an unknown key or an impossible value."""


class CaptureError(LightcacheError, RuntimeError):
    """A model cannot be captured as one static graph."""


class CaptureMismatchError(CaptureError):
    """A captured graph does not compute what the eager model computes, so it is refused."""


class CutError(LightcacheError, ValueError):
    """A cut names something that the captured graph does not have, or that cannot be kept from step to step."""


class NotCalledError(CutError):
    """A cut names a module that this forward does not call; one with other arguments may."""


class BudgetError(LightcacheError, ValueError):
    """A memory budget is below what chunking, or swapping, can reach.

    Attributes:
        reached: the least bytes that were reached, of activations or, where something swaps, of everything on the
            device; None where the budget leaves none for activations.
    """

    def __init__(self, message: str, reached: int | None = None) -> None:
        super().__init__(message)
        self.reached = reached


class RegionError(LightcacheError, ValueError):
    """A region names something that the captured graph does not have, or an axis that cannot be cut."""


class SwapError(LightcacheError, RuntimeError):
    """A copy between the device and where weights and features are kept could not be made; no weight is lost."""


class WeightFileError(LightcacheError, ValueError):
    """Files do not hold the weights of a module, or cannot be mapped."""


class SaveError(LightcacheError, ValueError):
    """A transformed module cannot be written so that another process could load it; nothing was written."""


class LoadError(LightcacheError, ValueError):
    """A folder does not hold a saved module that can be loaded here: damaged, foreign, or made by other versions."""


class SignatureError(ArgumentError):
    """A loaded module was called in a way that it has no programs for."""


class ConfigError(LightcacheError, ValueError):
    """A model cannot be made, or called, as a configuration and the command line say."""


class QualityError(LightcacheError, ValueError):
    """A video cannot be read, or two videos cannot be compared."""


class MissingExtraError(LightcacheError, ImportError):
    """A library that an extra of this package brings is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what}, which is not installed: pip install 'lightcache-fx[{extra}]'")


class ScheduleError(LightcacheError, ValueError):
    """A schedule does not fit the run it is used in."""


class CalibrationError(LightcacheError, ValueError):
    """A calibration cannot be made, read, or used for what it is asked for."""


class TransformError(LightcacheError, ValueError):
    """A module cannot be transformed or restored in the state it is in."""


class PassError(LightcacheError, RuntimeError):
    """A graph pass broke its contract: a fault of this package, not of the caller."""


class SwapPlanError(LightcacheError, RuntimeError):
    """A swap plan would read what is not on the device, or copy it needlessly: a fault of this package."""


class AxisRuleError(LightcacheError, RuntimeError):
    """A rule of `axis_rules` built a chunk of the wrong shape: a fault of this package, not of the caller."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """`; did you mean 'a', 'b'?` for a misspelt `name`, or an empty string when nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


class LoweringError(LightcacheError, RuntimeError):
    """A compiler failed on a program, or made something else of it."""

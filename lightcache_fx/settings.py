"""What all settings share: they are frozen, refuse unknown keys, read bytes, and say in one line what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import pydantic

from lightcache_fx.errors import CalibrationError, PolicyError, nearest

CUTS = "expected a depth (0, 1, 2, ...), a module path or a list of them, Residual(first=..., last=...) or 'auto'"
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(value: object) -> object:
    """`"64MiB"`, `"1.5 GB"` or a whole number -> bytes; anything else comes back as it is, for pydantic to refuse."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"expected a number of bytes such as 1048576, '64MiB' or '1.5GB', got {value!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Bytes = Annotated[int, pydantic.BeforeValidator(parse_bytes), pydantic.Field(gt=0)]


def _read_budget(value: object) -> object:
    """Bytes, or `"60%"` as it stands."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*%\s*", value) if isinstance(value, str) else None
    if match is None:
        value = parse_bytes(value)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"expected bytes such as '1.5GiB', or a share of the peak such as '60%', got {value!r}")
        return value
    if not 0 < float(match[1]) <= 100:
        raise ValueError(f"expected a share of the peak above 0% and up to 100%, got {value!r}")
    return f"{match[1]}%"


Budget = Annotated[int | str, pydantic.BeforeValidator(_read_budget)]
"""Bytes, or a share of what is taken where nothing is cut."""


class Settings(pydantic.BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except pydantic.ValidationError as error:
            raise PolicyError(explain(type(self), error, data)) from None


S = TypeVar("S", bound=Settings)


def read_as(kind: type[S], value: object) -> object:
    """A mapping as settings of its kind; anything else comes back as it is, for pydantic to judge."""
    return kind(**{str(key): item for key, item in value.items()}) if isinstance(value, Mapping) else value


def settings_or_none(kind: type[S], value: object) -> object:
    """As `read_as`, of what may be left out; anything but settings and mappings is refused.

    Raises:
        ValueError: says which keys a mapping would have.
    """
    if value is not None and not isinstance(value, kind | Mapping):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        keys = ", ".join(kind.model_fields)
        raise ValueError(f"expected {article} {kind.__name__}, or a mapping with the keys {keys}, got {value!r}")
    return read_as(kind, value)


def read_quality(text: str) -> tuple[str, float]:
    """`psnr>=30` -> its measure and number.

    Raises:
        CalibrationError: it is of another form.
    """
    match = re.fullmatch(r"\s*(psnr|ssim)\s*>=\s*([0-9]*\.?[0-9]+)\s*", text)
    if match is None:
        raise CalibrationError(f"quality: expected 'psnr>=30' (dB) or 'ssim>=0.95', got {text!r}")
    return match[1], float(match[2])


def explain(model: type[pydantic.BaseModel], error: pydantic.ValidationError, given: Mapping[str, object]) -> str:
    """One line: each key, what was wrong, what came, and what is allowed."""
    problems = error.errors()
    if sum(problem["loc"][:1] == ("cut",) for problem in problems) > 1:  # one for each member of the union
        lines = [f"cut: {CUTS}, got {given['cut']!r}"]
        problems = [problem for problem in problems if problem["loc"][:1] != ("cut",)]
    else:
        lines = []
    for problem in problems:
        key = ".".join(part for part in problem["loc"] if isinstance(part, str))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            allowed = list(model.model_fields)
            lines.append(f"unknown key {key!r}{nearest(key, allowed) or ';'} allowed keys: {', '.join(allowed)}")
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing")
        elif isinstance(problem.get("ctx", {}).get("error"), PolicyError):
            lines.append(f"{key}: {message}")
        elif key:
            lines.append(
                f"{key}: {message}" + ("" if problem["type"] == "value_error" else f", got {problem['input']!r}")
            )
        else:
            lines.append(message)
    return f"{model.__name__}: " + "; ".join(dict.fromkeys(lines))

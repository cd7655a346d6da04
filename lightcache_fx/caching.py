"""What is kept from step to step, and when it is computed afresh: the settings of `Policy.cache`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

import pydantic

from lightcache_fx.extrapolation import MAX_ORDER
from lightcache_fx.settings import Bytes, Settings, settings_or_none

StepIndex = Annotated[int, pydantic.Field(ge=0)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False, strict=False)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False, strict=False)]
_SCHEDULES = ("interval", "steps", "mask", "magnitude", "adaptive")


class Residual(Settings):
    """A range of blocks kept as a residual: `out - in` of the last full step is added to the new `in`.

    For transformers, where replacing a block's output by an old one would discard the current latent. `first` and
    `last` are module paths, both ends included.
    """

    first: str
    last: str


class Auto(Settings):
    """The cut with the fewest reuse FLOPs among those that keep at most `max_kept_bytes` (no limit when None)."""

    max_kept_bytes: Bytes | None = None


Cut = StepIndex | str | list[str] | Residual | Auto


class Magnitude(Settings):
    """Steps are reused while magnitudes, measured before, say that little has changed (MagCache, Ma et al. 2025).

    From one step to the next the magnitude of what is kept changes by a ratio. The ratios of the steps since the last
    full one multiply to how much it has changed since; how far these products are from 1, summed, is the error that is
    taken for accumulated. A step is full where that would exceed `threshold`, and after `max_reuse` reused ones.

    Attributes:
        ratios: one a step, the first for step 0; for another number of steps the nearest are taken.
        threshold: of the accumulated error.
        max_reuse: the most reuse steps in a row.
        retention: share of the steps, at the beginning, that are always full.
    """

    ratios: Annotated[list[Positive], pydantic.Field(min_length=1)]
    threshold: Positive = 0.06
    max_reuse: Annotated[int, pydantic.Field(ge=1)] = 3
    retention: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.2

    @pydantic.field_validator("ratios", mode="before")
    @classmethod
    def _read_ratios(cls, value: object) -> object:
        return list(value) if isinstance(value, tuple) else value


class Adaptive(Settings):
    """Steps are reused while a value that is cheap to compute has hardly changed.

    A step computes the indicator first, then the mean of its absolute change over its mean absolute value, and decides
    by that whether to go on in full. What has been computed by then is not computed again.

        Adaptive(threshold=0.1, indicator="transformer_blocks.0")                       # FirstBlockCache
        Adaptive(threshold=0.15, indicator="blocks.0.norm1", of="output", since="step") # TeaCache
        Adaptive(threshold=0.1)                                                         # any model with a cut

    Attributes:
        threshold: a step is reused where the change is at most this; where changes are summed, less than this.
        indicator: path of the module that is looked at; None for what enters the part of the model that the cut saves,
            which both kinds of steps compute anyway.
        of: `residual` is what the module adds to its input, `output` what it returns; None is `residual` where the
            module returns what has the type of what it takes.
        since: `full` compares with the last full step; `step` with the step before, and sums the changes since the last
            full one.
        polynomial: coefficients, the highest power first, of the polynomial that each change is put into before it is
            compared or summed.
        max_reuse: the most reuse steps in a row.
        ahead: decide by the change that the step before measured, so that nothing waits for a number from the device.
    """

    threshold: Positive
    indicator: str | None = None
    of: Literal["residual", "output"] | None = None
    since: Literal["full", "step"] = "full"
    polynomial: Annotated[list[Finite], pydantic.Field(min_length=1)] | None = None
    max_reuse: Annotated[int, pydantic.Field(ge=1)] | None = None
    ahead: bool = False

    @pydantic.model_validator(mode="after")
    def _about_a_module(self) -> Self:
        if self.indicator is None and self.of is not None:
            raise ValueError(f"of={self.of!r} is of a module; name that by indicator, or leave of out")
        return self


class Guard(Settings):
    """Some runs check themselves: beside each reuse step a full one runs too, and what it returns is compared.

    A guarded run takes longer than one without a cache. Where a reuse step's output is further off than `bound`, the
    full step's is returned instead, and all steps are full from then on, which is logged and told by `inspect`.

    Attributes:
        bound: of the error: the root mean square of the difference over that of the full step's output.
        every: each so many-th run is checked, the first among them; None checks the first alone.
    """

    bound: Positive
    every: Annotated[int, pydantic.Field(ge=1)] | None = None


class Guidance(Settings):
    """Of a step's guidance branches the first is computed, the others derived from it (FasterCache, Lv et al. 2024).

    For pipelines that call the denoiser once for each branch: another branch than the first returns, in a step that is
    not full, what the first returned plus what the two differed by at the last full step.

    Attributes:
        interval: every `interval`-th step computes all branches, counted from the first.
        first: so many first steps do; at least one.
        last: so many last steps do; needs the number of steps, from `num_steps` or from the pipeline.
        num_steps: the number of denoiser evaluations of a run, where no pipeline tells it.
        low: weight of the difference's low spatial frequencies, where the model returns images or videos.
        high: of its high ones.
    """

    interval: Annotated[int, pydantic.Field(ge=1)]
    first: Annotated[int, pydantic.Field(ge=1)] = 1
    last: Annotated[int, pydantic.Field(ge=0)] = 0
    num_steps: Annotated[int, pydantic.Field(ge=1)] | None = None
    low: Finite = 1.0
    high: Finite = 1.0


class Cache(Settings):
    """Which values are kept from step to step, and at which steps they are computed afresh.

    Attributes:
        cut: a depth on a U-Net's up path (DeepCache's branch id, Ma et al. 2023: 0 is the outermost skip connection), a
            module path or several, a `Residual` range, `"auto"` or `Auto(...)`. In a path `*` stands for one part of it
            and `**` for any number of them: `blocks.*.attn1`, `**.attn2`.
        interval: every `interval`-th step is full, counted from the first; 1 makes every step full.
        steps: the indices of the full steps, instead of an interval.
        mask: one boolean a step, true for full, instead of an interval; its length must be the number of steps.
        magnitude: decide by how much magnitudes change from step to step, measured before, instead of an interval.
        adaptive: decide at each step, by how much a cheap value has changed, instead of an interval.
        order: of the Taylor expansion by which a reuse step continues what the kept values did at the last full steps
            (TaylorSeer, Liu et al. 2025): 0 repeats the last value, and each order above keeps one more.
        guard: check some runs, and reuse nothing any more where that is too far off.
        first: so many first steps are always full (at least one: there is nothing to reuse before it).
        last: so many last steps are always full; needs the number of steps, from `num_steps` or from the pipeline.
        num_steps: the number of denoiser evaluations of a run, where no pipeline tells it.
    """

    cut: Annotated[Cut, pydantic.Field(union_mode="left_to_right")]
    interval: Annotated[int, pydantic.Field(ge=1)] | None = None
    steps: list[StepIndex] | None = None
    mask: list[bool] | None = None
    magnitude: Magnitude | None = None
    adaptive: Adaptive | None = None
    order: Annotated[int, pydantic.Field(ge=0, le=MAX_ORDER)] = 0
    guard: Guard | None = None
    first: Annotated[int, pydantic.Field(ge=1)] = 1
    last: Annotated[int, pydantic.Field(ge=0)] = 0
    num_steps: Annotated[int, pydantic.Field(ge=1)] | None = None

    @pydantic.field_validator("cut", mode="before")
    @classmethod
    def _read_cut(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("expected a depth, module path(s), Residual or 'auto', got a bool")
        if isinstance(value, list | tuple) and len(set(map(repr, value))) < len(value):
            twice = next(path for path in value if list(value).count(path) > 1)
            raise ValueError(f"names {twice!r} twice; name each module once")
        if value == "auto":
            return Auto()
        if isinstance(value, str) and not value:
            raise ValueError("an empty module path; to skip the whole model cut its last block instead, got ''")
        if isinstance(value, tuple):
            value = list(value)
        if isinstance(value, list) and not value:
            raise ValueError("an empty list of module paths; leave `cache` out for a lossless policy, got []")
        if isinstance(value, Mapping):
            return _cut_of_mapping(value)
        return value

    @pydantic.field_validator("magnitude", "adaptive", "guard", mode="before")
    @classmethod
    def _read_rule(cls, value: object, info: pydantic.ValidationInfo) -> object:
        kinds: dict[str | None, type[Settings]] = {"magnitude": Magnitude, "adaptive": Adaptive, "guard": Guard}
        return settings_or_none(kinds[info.field_name], value)

    @pydantic.field_validator("steps", "mask", mode="before")
    @classmethod
    def _read_sequence(cls, value: object) -> object:
        return list(value) if isinstance(value, tuple | range) else value

    @pydantic.model_validator(mode="after")
    def _one_schedule(self) -> Self:
        given = [name for name in _SCHEDULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_SCHEDULES)}; got {' and '.join(given) or 'none'}")
        if self.steps is not None and 0 not in self.steps:
            raise ValueError(f"steps must begin with step 0, which has nothing to reuse; got {self.steps}")
        if self.mask is not None and (not self.mask or not self.mask[0]):
            raise ValueError("mask must begin with True: the first step has nothing to reuse")
        if self.mask is not None and self.num_steps is not None and len(self.mask) != self.num_steps:
            raise ValueError(f"mask has {len(self.mask)} entries for num_steps={self.num_steps}; give one entry a step")
        if self.steps is not None and self.num_steps is not None and max(self.steps) >= self.num_steps:
            raise ValueError(f"steps names step {max(self.steps)}, but num_steps={self.num_steps} (counted from 0)")
        return self


def _cut_of_mapping(value: Mapping[object, object]) -> object:
    """The YAML spellings `{residual: {first, last}}` and `{auto: {max_kept_bytes}}`, beside the plain fields."""
    if set(value) == {"residual"} and isinstance(inner := value["residual"], Mapping):
        return Residual(**{str(key): item for key, item in inner.items()})
    if set(value) == {"auto"} and isinstance(inner := value["auto"] or {}, Mapping):
        return Auto(**{str(key): item for key, item in inner.items()})
    raise ValueError(f"expected {{residual: {{first, last}}}} or {{auto: {{max_kept_bytes}}}}, got keys {list(value)}")


def cut_to_plain(cut: Cut) -> object:
    """A cut as YAML has it."""
    match cut:
        case Residual():
            return {"residual": cut.model_dump()}
        case Auto(max_kept_bytes=None):
            return "auto"
        case Auto():
            return {"auto": cut.model_dump()}
        case _:
            return cut


def check_several(caches: Sequence[Cache]) -> None:
    """Raise a `ValueError` where caches cannot be used beside each other."""
    if not caches:
        raise ValueError("an empty list of caches; leave `cache` out for a lossless policy, got []")
    if len(caches) == 1:
        return
    for place, cache in enumerate(caches):
        for name in ("adaptive", "magnitude"):
            if getattr(cache, name) is not None:
                raise ValueError(
                    f"cache {place} of {len(caches)} has {name}; of several caches each has an interval, steps or a"
                    f" mask"
                )
        if isinstance(cache.cut, Auto):
            raise ValueError(f"cache {place} of {len(caches)} has cut='auto'; of several caches each names its cut")
    if sum(cache.guard is not None for cache in caches) > 1:
        raise ValueError("guard is about all caches; give it with one of them")
    totals = {cache.num_steps for cache in caches if cache.num_steps is not None}
    totals |= {len(cache.mask) for cache in caches if cache.mask is not None}
    if len(totals) > 1:
        raise ValueError(f"caches are for runs of different lengths, {sorted(totals)} steps; make them equal")

"""What the user wants: typed, validated settings with a YAML round trip.

Policy()                                             # lossless: nothing is approximated
Policy.deepcache(interval=3, branch=0)               # the published baseline
Policy.lightcache("svd-xt")                          # caching, and what takes back the memory that it costs
Policy(cache=Cache(cut="transformer_blocks.7", interval=2))
Policy(cache=Cache(cut=Residual(first="blocks.1", last="blocks.26"), steps=[0, 1, 5, 10]))
Policy(cache=Cache(cut="auto", interval=4))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import pydantic
import yaml

from lightcache_fx.errors import PolicyError, nearest
from lightcache_fx.extrapolation import MAX_ORDER

Rate = Literal["const", "run", "step", "latent"]
"""How often a value can change: never, once a generation, once a denoising step, or with the latent itself."""

_CUTS = "expected a depth (0, 1, 2, ...), a module path or a list of them, Residual(first=..., last=...) or 'auto'"
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
StepIndex = Annotated[int, pydantic.Field(ge=0)]


class _Settings(pydantic.BaseModel):
    """Frozen settings that refuse unknown keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except pydantic.ValidationError as error:
            raise PolicyError(_explain(type(self), error, data)) from None


class Residual(_Settings):
    """A range of blocks kept as a residual: `out - in` of the last full step is added to the new `in`.

    For transformers, where replacing a block's output by an old one would discard the current latent. `first` and
    `last` are module paths, both ends included.
    """

    first: str
    last: str


class Auto(_Settings):
    """The cut with the fewest reuse FLOPs among those that keep at most `max_kept_bytes` (no limit when None)."""

    max_kept_bytes: Bytes | None = None


Cut = StepIndex | str | list[str] | Residual | Auto


class Cache(_Settings):
    """Which values are kept from step to step, and at which steps they are computed afresh.

    Attributes:
        cut: a depth on a U-Net's up path (DeepCache's branch id, Ma et al. 2023: 0 is the outermost skip connection), a
            module path or several, a `Residual` range, `"auto"` or `Auto(...)`.
        interval: every `interval`-th step is full, counted from the first; 1 makes every step full.
        steps: the indices of the full steps, instead of an interval.
        mask: one boolean a step, true for full, instead of an interval; its length must be the number of steps.
        order: of the Taylor expansion by which a reuse step continues what the kept values did at the last full steps
            (TaylorSeer, Liu et al. 2025): 0 repeats the last value, and each order above keeps one more.
        first: so many first steps are always full (at least one: there is nothing to reuse before it).
        last: so many last steps are always full; needs the number of steps, from `num_steps` or from the pipeline.
        num_steps: the number of denoiser evaluations of a run, where no pipeline tells it.
    """

    cut: Annotated[Cut, pydantic.Field(union_mode="left_to_right")]
    interval: Annotated[int, pydantic.Field(ge=1)] | None = None
    steps: list[StepIndex] | None = None
    mask: list[bool] | None = None
    order: Annotated[int, pydantic.Field(ge=0, le=MAX_ORDER)] = 0
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

    @pydantic.field_validator("steps", "mask", mode="before")
    @classmethod
    def _read_sequence(cls, value: object) -> object:
        return list(value) if isinstance(value, tuple | range) else value

    @pydantic.model_validator(mode="after")
    def _one_schedule(self) -> Self:
        given = [name for name in ("interval", "steps", "mask") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of interval, steps, mask; got {' and '.join(given) or 'none'}")
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


class Region(_Settings):
    """One region that is cut as the user says: all calls of `module`, along dimension `axis` of what it returns.

    Attributes:
        module: its path, `up_blocks.3.attentions.1.transformer_blocks.0.ff` say.
        axis: dimension of its (last) result; negative ones count from the end.
        size: positions of that dimension in a chunk.
    """

    module: str
    axis: int
    size: Annotated[int, pydantic.Field(ge=1)]


class Layers(_Settings):
    """Every layer in a fixed number of chunks, whatever it takes: FME's way, with whole norms' statistics.

    A layer is the outermost module that can be cut so, or the modules inside of it where it cannot.

    Attributes:
        spatial: runs of images or frames, for layers in which these do not meet.
        temporal: strips of width, or runs of positions where they come first, for layers in which frames do.
    """

    spatial: Annotated[int, pydantic.Field(ge=1)]
    temporal: Annotated[int, pydantic.Field(ge=1)]


class Chunk(_Settings):
    """Regions that run chunk by chunk, exactly: float rounding apart, results do not change.

    Attributes:
        budget: the most bytes that the activations of one program may take: everything that a step allocates, without
            weights, the call's inputs and what is kept between steps. `"60%"` is a share of what the step that takes
            most does unchunked; what is computed once a generation is cut to it as far as can be.
        regions: explicit regions, applied before the budget is looked at.
        layers: cut every other layer into so many chunks, likewise.
    """

    budget: Budget | None = None
    regions: list[Region] = pydantic.Field(default_factory=list)
    layers: Layers | None = None

    @pydantic.field_validator("regions", mode="before")
    @classmethod
    def _read_regions(cls, value: object) -> object:
        return [_read(Region, item) for item in value] if isinstance(value, list | tuple) else value

    @pydantic.field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: object) -> object:
        return _read(Layers, value)

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if self.budget is None and not self.regions and self.layers is None:
            raise ValueError("expected a budget such as '1.5GiB' or '60%', or regions, or layers; got none of them")
        return self


class Decode(_Settings):
    """How an autoencoder decodes (and encodes): as a loop over slices, exact unless asked otherwise.

    Attributes:
        frames: so many images or frames at a time, where they do not depend on each other; the default when no budget
            is given is 1. Autoencoders whose frames do are refused; give a budget, which cuts space instead.
        budget: the most bytes that activations may take; slices are chosen, of frames or strips of space, to keep it. A
            share (`"60%"`) is one of what decoding takes unsliced, and leaves encoding, which takes less, as it is.
        approximate: decode `frames` at a time even where they depend on each other, as if each slice were a video of
            its own. Not exact: motion may flicker where slices meet. This is what the LightCache paper calls slicing.
    """

    frames: Annotated[int, pydantic.Field(ge=1)] | None = None
    budget: Budget | None = None
    approximate: bool = False

    @pydantic.model_validator(mode="after")
    def _either(self) -> Self:
        if self.approximate and self.budget is not None:
            raise ValueError("approximate=True decodes so many frames at a time; give frames, not a budget")
        return self


class Swap(_Settings):
    """Weights and cached features that are on the device only when they are needed; results do not change by a bit.

    Attributes:
        budget: the most bytes on the device for everything that a step reads, keeps and computes: weights, cached
            features, hoisted values and activations. `"40%"` is a share of what that takes with everything resident.
            None takes as little as costs no time, by prediction. A share, or None, is about what repeats, the
            denoiser; encoders and decoders take what they need, and leave the device when they are done.
        weights: whether weights leave the device.
        features: whether cached features do.
        to: where they are kept: `host` (page-locked memory; for accelerators) or `disk` (a memory-mapped file; for
            models that run on the CPU). None takes what suits the device.
        folder: where the file is made; None for the system's folder for temporary files.
        prefetch: whether copies begin ahead of time. Without, each begins when it is needed and computing waits for it,
            as simple offloading does; to compare.
        device: where a module computes whose weights are in host memory: `cuda`, `cuda:1` or `cpu`. None computes where
            the weights are or, where they are in host memory, on the accelerator that the call's tensors are on. A
            pipeline makes its own tensors: where its modules are in host memory, it must be told.
    """

    budget: Budget | None = None
    weights: bool = True
    features: bool = True
    to: Literal["host", "disk"] | None = None
    folder: str | None = None
    prefetch: bool = True
    device: str | None = None

    @pydantic.field_validator("device", mode="before")
    @classmethod
    def _read_device(cls, value: object) -> object:
        if value is not None and re.fullmatch(r"cpu|cuda(:\d+)?", str(value)) is None:
            raise ValueError(f"expected a device to swap to, 'cuda', 'cuda:1' or 'cpu', got {str(value)!r}")
        return None if value is None else str(value)  # a torch.device reads as its name

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if self.device is not None and not self.weights:
            raise ValueError("device is where weights are fetched to, and weights=False fetches none: leave one out")
        if not (self.weights or self.features):
            raise ValueError("weights=False and features=False leave nothing to swap; leave `swap` out instead")
        if self.folder is not None and self.to == "host":
            raise ValueError("folder is for files; with to='host' there are none: leave one of them out")
        return self


S = TypeVar("S", bound=_Settings)


def _read(kind: type[S], value: object) -> object:
    """A mapping as settings of its kind; anything else comes back as it is, for pydantic to judge."""
    return kind(**{str(key): item for key, item in value.items()}) if isinstance(value, Mapping) else value


class Compile(_Settings):
    """Compile the programs of steps by a backend of `torch.compile`, each once for a size, or for sizes that vary.

    The prologue runs once a generation and is not compiled.

    Attributes:
        backend: `inductor`, `eager`, `aot_eager`, or any other that is registered (`torch.compiler.list_backends()`).
        mode: of Inductor; `reduce-overhead` and `max-autotune` run each program as a CUDA graph where there is CUDA.
        options: of the backend; for Inductor those of `torch._inductor.config`.
        check: compare each compiled graph with itself uncompiled when it runs first.
        blocks: compile blocks that do the same once, which takes a fraction of the time where there are many of them:
            then it is the default (None). Otherwise each program is compiled as one graph, as CUDA graphs (`mode`)
            always are.
    """

    backend: str = "inductor"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    check: bool = True
    blocks: bool | None = None

    @pydantic.field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        import torch.compiler

        known = [name for name in torch.compiler.list_backends(exclude_tags=()) if name != "lightcache"]
        if value not in (*known, "lightcache"):
            raise ValueError(f"expected a backend of torch.compile, one of {', '.join(known)}, got {value!r}")
        if value == "lightcache":
            raise ValueError("expected the compiler behind lightcache, such as 'inductor', got 'lightcache' itself")
        return value

    @pydantic.model_validator(mode="after")
    def _modes_are_inductors(self) -> Self:
        if self.backend != "inductor" and self.mode != "default":
            raise ValueError(f"mode={self.mode!r} is one of Inductor's; backend {self.backend!r} has no modes")
        return self


class Policy(_Settings):
    """Everything the user asks of `transform`. `Policy()` is lossless: bitwise equal to the eager model.

    Attributes:
        cache: what to keep between steps, or None for no caching.
        hoist: run values that depend only on the prompt, image or size once a generation (lossless).
        max_hoisted_bytes: how many bytes hoisted values may hold; None takes 2 % of the weights, at least 16 MiB.
        rates: how often an input changes, by parameter name of the model's forward, where the default is wrong.
        chunk: cut large regions into chunks, to a budget for the activations of a step, or as told.
        decode: how autoencoders are run; None leaves them whole (or as `chunk` or `memory_budget` say).
        swap: keep weights and cached features elsewhere and fetch them just before they are needed.
        memory_budget: bytes for everything on the device: weights, kept and hoisted values, and activations. Regions
            are chunked, and weights and features swapped, as costs the least predicted time.
        calls_per_step: how many calls of the denoiser a step has, where guidance makes one for each of its branches
            instead of one for all; budgets count what each of them keeps. None learns it from the calls, and plans anew
            when it has.
        compile: compile the programs, by Inductor or another backend.
        max_signatures: how many captures (sizes, guidance layouts, adapters) are held before the oldest is dropped. One
            of sizes that vary counts once.
        dynamic: whether one capture may serve several sizes, as `torch.compile(dynamic=...)` has it. None tries when a
            call comes that differs from an earlier one in sizes alone: these become symbols where `torch.export` proves
            that the graph holds for others, and each further size is compared with the eager model when it comes first.
            True tries at the first call, with every size of the inputs. False captures each size by itself, as is done
            where symbols are not proven, and where the plan counts bytes (`chunk`, `decode`, `swap`, `memory_budget`).
    """

    cache: Cache | None = None
    hoist: bool = True
    max_hoisted_bytes: Bytes | None = None
    rates: dict[str, Rate] = pydantic.Field(default_factory=dict)
    chunk: Chunk | None = None
    decode: Decode | None = None
    swap: Swap | None = None
    memory_budget: Bytes | None = None
    calls_per_step: Annotated[int, pydantic.Field(ge=1, le=64)] | None = None
    compile: Compile | None = None
    max_signatures: Annotated[int, pydantic.Field(ge=1)] = 8
    dynamic: bool | None = None

    @pydantic.field_validator("cache", mode="before")
    @classmethod
    def _read_cache(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return Cache(**{str(key): item for key, item in value.items()})
        if value is not None and not isinstance(value, Cache):
            keys = ", ".join(Cache.model_fields)
            raise ValueError(f"expected a Cache, or a mapping with the keys {keys}, got {value!r}")
        return value

    @pydantic.field_validator("compile", mode="before")
    @classmethod
    def _read_compile(cls, value: object) -> object:
        """`True` and a backend's name stand for a `Compile` with them."""
        if value is None or isinstance(value, Compile | bool):
            return (Compile() if value else None) if isinstance(value, bool) else value
        if isinstance(value, str):
            return Compile(backend=value)
        if isinstance(value, Mapping):
            return Compile(**{str(key): item for key, item in value.items()})
        keys = ", ".join(Compile.model_fields)
        raise ValueError(
            f"expected a Compile, True, a backend's name, or a mapping with the keys {keys}, got {value!r}"
        )

    @pydantic.field_validator("chunk", "decode", "swap", mode="before")
    @classmethod
    def _read_settings(cls, value: object, info: pydantic.ValidationInfo) -> object:
        kinds: dict[str | None, type[Chunk | Decode | Swap]] = {"chunk": Chunk, "decode": Decode, "swap": Swap}
        kind = kinds[info.field_name]
        if value is not None and not isinstance(value, kind | Mapping):
            keys = ", ".join(kind.model_fields)
            raise ValueError(f"expected a {kind.__name__}, or a mapping with the keys {keys}, got {value!r}")
        return _read(kind, value)

    def runs_autoencoders(self) -> bool:
        """Whether anything is asked of the autoencoder of a pipeline."""
        return self.decode is not None or self.is_about_memory()

    def is_about_memory(self) -> bool:
        """Whether anything is asked of every module of a pipeline: where its weights are."""
        return self.swap is not None or self.memory_budget is not None

    def swaps_weights(self) -> bool:
        """Whether weights may be elsewhere than where the module computes."""
        return self.memory_budget is not None if self.swap is None else self.swap.weights

    def frames_at_a_time(self) -> int | None:
        """How many frames an autoencoder takes at a time; None where a budget, or nothing, decides."""
        if self.decode is None or self.decode.approximate:
            return None
        return 1 if self.decode.frames is None and self.decode.budget is None else self.decode.frames

    def of_encoder(self) -> Policy:
        """What of this policy applies to a module that runs once a generation: where its weights are."""
        about_steps: dict[str, Any] = {"cache": None, "hoist": False, "rates": {}, "chunk": None, "decode": None}
        about_steps["calls_per_step"] = None
        return self.model_copy(update=about_steps)

    def of_autoencoder(self, method: str) -> Policy:
        """What of this policy applies to a method of an autoencoder: nothing that is about denoising steps."""
        chunk = self.chunk
        if self.decode is not None:
            asked = self.decode.budget
            applies = isinstance(asked, int) or (isinstance(asked, str) and method == "decode")
            chunk = Chunk(budget=asked) if applies else None
        return self.model_copy(
            update={"cache": None, "hoist": False, "rates": {}, "chunk": chunk, "calls_per_step": None}
        )

    @classmethod
    def deepcache(cls, interval: int = 3, branch: int = 0) -> Policy:
        """DeepCache (Ma et al. 2023): every `interval`-th step is full, the others recompute up to skip `branch`."""
        return cls(cache=Cache(cut=branch, interval=interval))

    @classmethod
    def fme(cls, num_spatial_chunk: int = 7, num_temporal_chunk: int = 7) -> Policy:
        """FME's published settings, with right arithmetic: every layer in 7 chunks, one frame decoded at a time.

        FME takes GroupNorm's statistics chunk by chunk, which is another function; here they are those of the whole
        value. Autoencoders whose frames depend on each other are refused one frame at a time: give `decode` a budget.
        """
        return cls(chunk=Chunk(layers=Layers(spatial=num_spatial_chunk, temporal=num_temporal_chunk)), decode=Decode())

    @classmethod
    def lightcache(
        cls,
        system: str | None = None,
        *,
        interval: int | None = None,
        branch: int | None = None,
        swap: bool = True,
        chunk: bool = True,
        slice: bool = True,  # noqa: A002 - the paper's word
    ) -> Policy:
        """LightCache: caching at a system's published setting, and the three parts that take back what it costs.

            Policy.lightcache("svd-xt")
            Policy.lightcache("animatediff-lightning", interval=4, swap=False)
            Policy.lightcache()  # of any model

        Unlike the paper's, all of them are exact: what caching changes is all that changes, but for float rounding.

        Args:
            system: `svd-xt`, `animatediff-lightning`, `animatediff`, `modelscope` or `easyanimate`; None for a setting
                that suits U-Nets of any kind. Give a transformer's `cut` by `model_copy`, or name its system.
            interval: every `interval`-th step is full, instead of as published.
            branch: DeepCache's branch, a depth on a U-Net's up path, instead of the published cut.
            swap: weights and cached features are on the device only while they are needed, as far as that costs no
                time by prediction.
            chunk: a step's activations are kept to a share of what they take, by regions that run chunk by chunk.
            slice: the autoencoder decodes frame by frame where frames are independent, else within a share of what it
                takes, exactly.

        Raises:
            PolicyError: an unknown system, or an impossible interval or branch.
        """
        from lightcache_fx.published import GENERIC, PUBLISHED

        if system is not None and system not in PUBLISHED:
            known = ", ".join(PUBLISHED)
            raise PolicyError(
                f"lightcache: system: no settings of {system!r}{nearest(str(system), PUBLISHED)}; there are those of"
                f" {known}; leave it out for other models"
            )
        published = GENERIC if system is None else PUBLISHED[system]
        cut: Any = published.cache.cut if branch is None else branch
        return cls(
            cache=Cache(cut=cut, interval=published.cache.interval if interval is None else interval),
            swap=Swap() if swap else None,
            chunk=Chunk(budget=published.chunk) if chunk else None,
            decode=published.decode if slice else None,
        )

    @classmethod
    def from_yaml(cls, source: str | Path) -> Policy:
        """Read a policy from a file (a `Path`, or a string that names an existing file) or from YAML text.

        Raises:
            PolicyError: not YAML, not a mapping, an unknown key, or an impossible value.
        """
        if not isinstance(source, str | Path):
            raise PolicyError(f"from_yaml: expected a path or YAML text, got {type(source).__name__}")
        is_text = isinstance(source, str) and (not source.strip() or "\n" in source or ":" in source or "{" in source)
        where = "" if is_text else f" in {Path(source).name}"
        try:
            data = yaml.safe_load(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PolicyError(f"cannot read the policy{where}: {error}") from None
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise PolicyError(f"a policy{where} is a mapping such as 'cache: {{cut: 0, interval: 3}}', got {data!r}")
        try:
            return cls(**{str(key): value for key, value in data.items()})
        except PolicyError as error:
            raise PolicyError(f"{error}{where}") from None

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The settings that differ from their defaults, as YAML text; also written to `path` when one is given."""
        data = self.model_dump(exclude_defaults=True, mode="python")
        if self.cache is not None:
            data["cache"]["cut"] = _cut_to_plain(self.cache.cut)
        text = yaml.safe_dump(data, sort_keys=False) if data else "{}\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def _cut_to_plain(cut: Cut) -> object:
    match cut:
        case Residual():
            return {"residual": cut.model_dump()}
        case Auto(max_kept_bytes=None):
            return "auto"
        case Auto():
            return {"auto": cut.model_dump()}
        case _:
            return cut


def _explain(model: type[pydantic.BaseModel], error: pydantic.ValidationError, given: Mapping[str, object]) -> str:
    """One line: each key, what was wrong, what came, and what is allowed."""
    problems = error.errors()
    if sum(problem["loc"][:1] == ("cut",) for problem in problems) > 1:  # one for each member of the union
        lines = [f"cut: {_CUTS}, got {given['cut']!r}"]
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

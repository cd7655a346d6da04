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
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml
from torch import nn

from lightcache_fx.caching import Adaptive, Cache, Guard, Guidance, check_several, cut_to_plain
from lightcache_fx.errors import PolicyError, nearest
from lightcache_fx.settings import Budget, Bytes, Settings, read_as, read_quality, settings_or_none

Rate = Literal["const", "run", "step", "latent"]
"""How often a value can change: never, once a generation, once a denoising step, or with the latent itself."""


class Region(Settings):
    """One region that is cut as the user says: all calls of `module`, along dimension `axis` of what it returns.

    Attributes:
        module: its path, `up_blocks.3.attentions.1.transformer_blocks.0.ff` say.
        axis: dimension of its (last) result; negative ones count from the end.
        size: positions of that dimension in a chunk.
    """

    module: str
    axis: int
    size: Annotated[int, pydantic.Field(ge=1)]


class Layers(Settings):
    """Every layer in a fixed number of chunks, whatever it takes: FME's way, with whole norms' statistics.

    A layer is the outermost module that can be cut so, or the modules inside of it where it cannot.

    Attributes:
        spatial: runs of images or frames, for layers in which these do not meet.
        temporal: strips of width, or runs of positions where they come first, for layers in which frames do.
    """

    spatial: Annotated[int, pydantic.Field(ge=1)]
    temporal: Annotated[int, pydantic.Field(ge=1)]


class Chunk(Settings):
    """Regions that run chunk by chunk, exactly: float rounding apart, results do not change.

    Attributes:
        budget: the most bytes that the activations of one program may take: everything that a step allocates, without
            weights, the call's inputs and what is kept between steps. `"60%"` is a share of what the step that takes
            most does unchunked; what is computed once a generation is cut to it as far as can be.
        regions: explicit regions, applied before the budget is looked at.
        layers: cut every other layer into so many chunks, likewise.
        best_effort: a budget that cannot be kept is not refused; what is reached on the way to it is taken, and the
            plan says so. A `memory_budget` or a swap's budget is kept or refused as ever.
    """

    budget: Budget | None = None
    regions: list[Region] = pydantic.Field(default_factory=list)
    layers: Layers | None = None
    best_effort: bool = False

    @pydantic.field_validator("regions", mode="before")
    @classmethod
    def _read_regions(cls, value: object) -> object:
        return [read_as(Region, item) for item in value] if isinstance(value, list | tuple) else value

    @pydantic.field_validator("layers", mode="before")
    @classmethod
    def _read_layers(cls, value: object) -> object:
        return read_as(Layers, value)

    @pydantic.model_validator(mode="after")
    def _something(self) -> Self:
        if self.budget is None and not self.regions and self.layers is None:
            raise ValueError("expected a budget such as '1.5GiB' or '60%', or regions, or layers; got none of them")
        _check_best_effort(self.best_effort, self.budget)
        return self


class Decode(Settings):
    """How an autoencoder decodes (and encodes): as a loop over slices, exact unless asked otherwise.

    Attributes:
        frames: so many images or frames at a time, where they do not depend on each other; the default when no budget
            is given is 1. Frames in a batch that do are refused, and a video that is one value is decoded whole, which
            a note says; give a budget, which cuts space instead.
        budget: the most bytes that activations may take; slices are chosen, of frames or strips of space, to keep it. A
            share (`"60%"`) is one of what decoding takes unsliced, and leaves encoding, which takes less, as it is.
        approximate: decode `frames` at a time even where they depend on each other, as if each slice were a video of
            its own. Not exact: motion may flicker where slices meet. This is what the LightCache paper calls slicing.
        best_effort: as for `Chunk`.
    """

    frames: Annotated[int, pydantic.Field(ge=1)] | None = None
    budget: Budget | None = None
    approximate: bool = False
    best_effort: bool = False

    @pydantic.model_validator(mode="after")
    def _either(self) -> Self:
        if self.approximate and self.budget is not None:
            raise ValueError("approximate=True decodes so many frames at a time; give frames, not a budget")
        _check_best_effort(self.best_effort, self.budget)
        return self


def _check_best_effort(best_effort: bool, budget: Budget | None) -> None:
    if best_effort and budget is None:
        raise ValueError(
            "best_effort=True is about a budget, and there is none; give one such as '60%', or leave it out"
        )


class Swap(Settings):
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


class Compile(Settings):
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


_UNCALIBRATED: dict[str, Any] = {"quality": None, "speedup": None, "calibration": None}


class Policy(Settings):
    """Everything the user asks of `transform`. `Policy()` is lossless: bitwise equal to the eager model.

    Attributes:
        cache: what to keep between steps, or None for no caching. A list of several has a schedule for each of them:
            attention outputs that are broadcast over ranges of steps (PAB, Zhao et al. 2024), say.
        guidance: derive guidance branches from the first one of their step in most steps.
        quality: cache as much as a quality allows, by what a calibration has measured: `psnr>=30` (dB) or `ssim>=0.95`.
        speedup: likewise, as well as so many times fewer FLOPs allow.
        calibration: the file that `calibrate(...).save` wrote, for `quality` or `speedup`.
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

    cache: Cache | list[Cache] | None = None
    guidance: Guidance | None = None
    quality: str | None = None
    speedup: Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False, strict=False)] | None = None
    calibration: str | None = None
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
        if isinstance(value, list | tuple):
            caches = [settings_or_none(Cache, one) for one in value]
            check_several([one for one in caches if isinstance(one, Cache)])
            return caches[0] if len(caches) == 1 else caches
        return settings_or_none(Cache, value)

    @pydantic.field_validator("guidance", mode="before")
    @classmethod
    def _read_guidance(cls, value: object) -> object:
        return settings_or_none(Guidance, value)

    @pydantic.field_validator("calibration", mode="before")
    @classmethod
    def _read_path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @pydantic.model_validator(mode="after")
    def _calibrated(self) -> Self:
        asked = [name for name in ("quality", "speedup") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ValueError("quality and speedup ask for two things; give one of them")
        if asked and self.calibration is None:
            raise ValueError(
                f"{asked[0]} needs a calibration of the model: calibration='FILE', made by"
                f" lightcache_fx.calibrate(pipe, inputs).save('FILE')"
            )
        if self.calibration is not None and not asked:
            raise ValueError("calibration says what was measured; say what of it by quality='psnr>=30' or speedup=2.0")
        if asked and self.cache is not None:
            raise ValueError(f"{asked[0]} chooses what to cache; leave cache out")
        if self.quality is not None:
            read_quality(self.quality)
        return self

    @pydantic.model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.guard is not None and self.is_about_memory():
            raise ValueError(
                "guard runs full steps beside reuse steps, which takes more than a plan for swap or memory_budget"
                " knows; check without them first, or leave guard out"
            )
        return self

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
        return settings_or_none(kinds[info.field_name], value)

    def resolved(self, module: nn.Module) -> Policy:
        """With the cache that a calibration gives for what is asked.

        Raises:
            CalibrationError: it cannot be read, is of another model, or nothing in it reaches what is asked.
        """
        if self.calibration is None:
            return self
        from lightcache_fx.calibration import Calibration

        found = Calibration.load(self.calibration)
        found.check(module, f"calibration={Path(self.calibration).name!r}")
        point = found.best(quality=self.quality, speedup=self.speedup)
        return self.with_cache(point.cache(found.num_steps))

    def with_cache(self, cache: Cache | None) -> Policy:
        """The same, caching by this, if anything, and by no calibration."""
        return self.model_copy(update={**_UNCALIBRATED, "cache": cache})

    @property
    def caches(self) -> tuple[Cache, ...]:
        """All that is kept between steps, each with its schedule."""
        if self.cache is None:
            return ()
        return (self.cache,) if isinstance(self.cache, Cache) else tuple(self.cache)

    @property
    def adaptive(self) -> Adaptive | None:
        """By what steps decide for themselves, where they do."""
        return next((cache.adaptive for cache in self.caches if cache.adaptive is not None), None)

    @property
    def guard(self) -> Guard | None:
        """How runs check themselves, where they do."""
        return next((cache.guard for cache in self.caches if cache.guard is not None), None)

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
        about_steps: dict[str, Any] = {
            "cache": None,
            "guidance": None,
            "hoist": False,
            "rates": {},
            "chunk": None,
            "decode": None,
        }
        about_steps["calls_per_step"] = None
        return self.model_copy(update={**about_steps, **_UNCALIBRATED})

    def of_autoencoder(self, method: str) -> Policy:
        """What of this policy applies to a method of an autoencoder: nothing that is about denoising steps."""
        chunk = self.chunk
        if self.decode is not None:
            asked = self.decode.budget
            applies = isinstance(asked, int) or (isinstance(asked, str) and method == "decode")
            chunk = Chunk(budget=asked, best_effort=self.decode.best_effort) if applies else None
        about_steps: dict[str, Any] = {
            "cache": None,
            "guidance": None,
            "hoist": False,
            "rates": {},
            "calls_per_step": None,
        }
        return self.model_copy(update={**about_steps, **_UNCALIBRATED, "chunk": chunk})

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
            chunk: a step's activations are kept to a share of what they take, by regions that run chunk by chunk, or as
                near to it as can be.
            slice: the autoencoder decodes frame by frame where frames are independent, else within a share of what it
                takes, or as near to it as can be; exactly either way.

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
            chunk=Chunk(budget=published.chunk, best_effort=True) if chunk else None,
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
        several = data["cache"] if isinstance(self.cache, list) else [data["cache"]] if self.caches else []
        for plain, cache in zip(several, self.caches, strict=True):
            plain["cut"] = cut_to_plain(cache.cut)
        text = yaml.safe_dump(data, sort_keys=False) if data else "{}\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

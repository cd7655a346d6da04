"""A diffusion system as configurations: of a pipeline's folder, of one model, or a published one by its name.

Models are made from fake tensors, so no weight is read or allocated. Only classes of diffusers and transformers are
made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightcache_fx.caching import Cache
from lightcache_fx.errors import ConfigError, MissingExtraError, nearest

DENOISERS = ("unet", "transformer")
"""What diffusers' pipelines call them."""
_INDEX, _CONFIG = "model_index.json", "config.json"


@dataclass(frozen=True)
class Component:
    """A model's configuration.

    Attributes:
        name: in its pipeline: `unet`, `vae`.
        library: `diffusers` or `transformers`.
        cls: name of its class there.
        config: as its `config.json` has it.
    """

    name: str
    library: str
    cls: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Defaults:
    """What is generated where the user says nothing else; None where the models' configurations say it.

    Attributes:
        height, width: of the video, in pixels.
        frames: of the video.
        steps: denoising steps.
        guidance: whether each step computes a prediction without the prompt as well, in one batch.
        decode_frames: how many frames are decoded at a time; None decodes all at once.
    """

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int = 25
    guidance: bool = True
    decode_frames: int | None = None


@dataclass(frozen=True)
class System:
    """Configurations of the models of a pipeline, in the order in which these run, or of one alone.

    Attributes:
        title: for people.
        components: those that compute.
        defaults: of what is generated.
        cache: the published setting; None where there is none.
        left_out: components that there is no way to plan, by name, and why.
    """

    title: str
    components: tuple[Component, ...]
    defaults: Defaults = Defaults()
    cache: Cache | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def denoiser(self) -> Component | None:
        """What runs once a step, or what there is alone."""
        if len(self.components) == 1:
            return self.components[0]
        return next((component for component in self.components if component.name in DENOISERS), None)

    def component(self, name: str | None = None) -> Component:
        """The one of that name; by default the denoiser, or what there is alone.

        Raises:
            ConfigError: there is none.
        """
        names = [component.name for component in self.components]
        found = self.denoiser if name is None else next((c for c in self.components if c.name == name), None)
        if found is not None:
            return found
        if name is None:
            raise ConfigError(f"{self.title} has no unet and no transformer: --component is one of {', '.join(names)}")
        raise ConfigError(f"{self.title} has no component {name!r}{nearest(name, names)}; it has {', '.join(names)}")


def read_system(source: str, presets: Mapping[str, System]) -> System:
    """A system by a preset's name, or from a folder or JSON file that diffusers or transformers wrote.

    Raises:
        ConfigError: there is nothing of that name, or it is no configuration.
    """
    if source in presets:
        return presets[source]
    path = Path(source)
    if path.is_file():
        return _read_pipeline(path.parent) if path.name == _INDEX else _read_model(path)
    if (path / _INDEX).is_file():
        return _read_pipeline(path)
    if (path / _CONFIG).is_file():
        return _read_model(path / _CONFIG)
    if (path / "manifest.json").is_file():
        raise ConfigError(f"{source} is a saved module, whose plan is made; see `inspect` and `diff`")
    if path.is_dir():
        raise ConfigError(f"{source} has no {_INDEX} and no {_CONFIG}; name the folder of a pipeline or of a model")
    raise ConfigError(
        f"there is no preset, folder or file {source!r}{nearest(source, presets)}; presets: {', '.join(presets)}"
    )


def _read_pipeline(folder: Path) -> System:
    """The models of a pipeline: first those before the denoiser, in the index's order, last the autoencoder."""
    index = _read_json(folder / _INDEX)
    entries = {k: v for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and len(v) == 2 and v[0]}
    components, left_out = [], {}
    for name, (library, cls) in entries.items():
        config = folder / name / _CONFIG
        if not config.is_file():
            continue  # schedulers, tokenizers and processors have files of other names
        if library not in ("diffusers", "transformers"):
            left_out[name] = f"{cls} is of {library}, and only classes of diffusers and transformers are made"
            continue
        components.append(Component(name, library, cls, _read_json(config)))
    if not components:
        raise ConfigError(f"{folder / _INDEX} names no component that has a {_CONFIG} in its folder")
    components.sort(key=lambda c: (c.name in DENOISERS) + 2 * c.name.startswith("vae"))
    return System(str(index.get("_class_name", folder.name)), tuple(components), left_out=left_out)


def _read_model(path: Path) -> System:
    config = _read_json(path)
    name = path.parent.resolve().name if path.name == _CONFIG else path.stem
    if isinstance(cls := config.get("_class_name"), str):
        library = "diffusers"
    elif isinstance(found := config.get("architectures"), list) and found and isinstance(found[0], str):
        cls, library = found[0], "transformers"
    else:
        raise ConfigError(f"{path} names no class: expected _class_name (diffusers) or architectures (transformers)")
    if cls.endswith("Pipeline"):
        raise ConfigError(f"{path} is of a whole pipeline ({cls}), which needs its folder: name that")
    return System(cls, (Component(name, library, cls, config),))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no configuration: expected a JSON object, got {type(found).__name__}")
    return found


@contextmanager
def fake_models(dtype: torch.dtype) -> Iterator[None]:
    """Inside, modules and tensors are made without memory, modules in `dtype`: `.half()` cannot cast fake weights."""
    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def build(component: Component) -> nn.Module:
    """A component's module; call it inside `fake_models`.

    Raises:
        ConfigError: there is no such class, or it cannot be made of the configuration.
        MissingExtraError: its library is not installed.
    """
    library = _library(component.library)
    base = library.ModelMixin if component.library == "diffusers" else library.PreTrainedModel
    found = getattr(library, component.cls, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(f"{component.library} {library.__version__} has no model class {component.cls}")
    cls: Any = found
    try:
        if component.library == "diffusers":
            module = cls.from_config(dict(component.config))
        else:
            module = cls(cls.config_class(**component.config))
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"{component.name}: {component.cls} cannot be made of its configuration: {error}") from None
    built: nn.Module = module.eval().requires_grad_(False)
    return built


def _library(name: str) -> ModuleType:
    try:
        if name == "diffusers":
            import diffusers

            diffusers.utils.logging.set_verbosity_error()
            found: ModuleType = diffusers
        else:
            import transformers

            transformers.utils.logging.set_verbosity_error()
            found = transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"making a model from its configuration needs {error.name}", "diffusers") from error
    return found

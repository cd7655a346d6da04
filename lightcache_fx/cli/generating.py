"""Opening a pipeline that diffusers wrote, and calling it: what is given, checked against what the pipeline takes.

A folder may say what to ask of its model, in `example.yaml`; what a user gives comes before it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import torch
import yaml

from lightcache_fx.errors import ArgumentError, ConfigError, LightcacheError, MissingExtraError, nearest

if TYPE_CHECKING:
    from lightcache_fx.quality import Frames

EXAMPLE = "example.yaml"
_INDEX = "model_index.json"
_OURS = ("generator", "output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
"""Arguments of a pipeline that are set here."""
_OPTIONS = {"num_inference_steps": "steps", "num_frames": "frames", "video_length": "frames"}
"""Options that have another name than the argument they are."""
_OF_THE_PIPELINE = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError)
"""What a pipeline's own code raises when it is called with what it does not take."""


class Asked(pydantic.BaseModel):
    """What is asked of a pipeline; None where nothing is said, so that the pipeline's own default holds.

    Attributes:
        prompt, negative_prompt: in words, what to show and what not to.
        image: file or URL of a picture to begin with, resized to height and width where these are given.
        height, width: in pixels.
        frames: of the video.
        steps: denoising steps.
        fps: frames a second, of the files that are written.
        arguments: further ones of the pipeline's call, by name.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    prompt: str | None = None
    negative_prompt: str | None = None
    image: str | None = None
    height: pydantic.PositiveInt | None = None
    width: pydantic.PositiveInt | None = None
    frames: pydantic.PositiveInt | None = None
    steps: pydantic.PositiveInt | None = None
    fps: pydantic.PositiveInt | None = None
    arguments: dict[str, Any] = pydantic.Field(default_factory=dict)

    def over(self, other: Asked) -> Asked:
        """What is said here and, where nothing is, in the other."""
        said = {name: value for name, value in self if value is not None and name != "arguments"}
        return other.model_copy(update=said | {"arguments": {**other.arguments, **self.arguments}})


def example_of(source: str) -> Asked:
    """What a folder says to ask of its model; nothing where it says nothing.

    Raises:
        ConfigError: its file is not of that form.
    """
    path = Path(source) / EXAMPLE
    if not path.is_file():
        return Asked()
    try:
        asked = Asked.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (OSError, yaml.YAMLError, pydantic.ValidationError) as error:
        raise ConfigError(f"{path} cannot be read: {_first_problem(error)}") from None
    if asked.image is not None and not _is_url(asked.image):
        asked = asked.model_copy(update={"image": str(path.parent / asked.image)})
    return asked


def _first_problem(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())


def read_arguments(texts: list[str] | None) -> dict[str, Any]:
    """`guidance_scale=6`, `motion_bucket_id=127`: values as YAML has them.

    Raises:
        ArgumentError: it is not of that form.
    """
    found = {}
    for text in texts or ():
        match = re.fullmatch(r"(\w+)=(.*)", text, flags=re.DOTALL)
        try:
            value = yaml.safe_load(match[2]) if match is not None else None
        except yaml.YAMLError:
            match = None
        if match is None:
            raise ArgumentError(f"--argument must read NAME=VALUE, such as guidance_scale=6; got {text!r}")
        found[match[1]] = value
    return found


def check_source(source: str) -> None:
    """Refuse at once what cannot be opened.

    Raises:
        ConfigError: there is no such folder, or no pipeline in it.
    """
    folder = Path(source)
    if (folder / _INDEX).is_file():
        return
    if folder.exists():
        raise ConfigError(f"no pipeline in {source} (it has no {_INDEX}): name a folder that save_pretrained wrote")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) is None or source.startswith("."):
        raise ConfigError(f"there is no folder {source}, and it is no model id such as ali-vilab/text-to-video-ms-1.7b")


def open_pipeline(source: str, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or a model id, by diffusers' own loading code, without progress bars.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
        MissingExtraError: diffusers is not installed.
    """
    check_source(source)
    try:
        import diffusers
        import transformers
        from safetensors import SafetensorError
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"opening a pipeline needs {error.name}", "diffusers") from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except (OSError, SafetensorError, *_OF_THE_PIPELINE) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        where = "the pipeline in" if Path(source).is_dir() else "the model"
        raise ConfigError(f"cannot load {where} {source}: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(pipe: Any, asked: Asked) -> dict[str, Any]:
    """The arguments of the pipeline's call, beside those that are set here.

    Raises:
        ArgumentError: it needs something that is not given, or does not take what is.
    """
    cls = type(pipe)
    takes = {name: p for name, p in inspect.signature(cls.__call__).parameters.items() if name != "self"}
    frames = next((name for name in ("num_frames", "video_length") if name in takes), "num_frames")
    sizes = {"height": asked.height, "width": asked.width, frames: asked.frames, "num_inference_steps": asked.steps}
    words = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt}
    given = {**words, "image": asked.image, **sizes}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in takes:
            option = _OPTIONS.get(name, name.replace("_", "-"))
            other = {"prompt": "image", "image": "prompt"}.get(name)
            instead = f", and give --{other}" if other in takes else ""
            raise ArgumentError(f"{cls.__name__} takes no {option}: leave out --{option}{instead}")
    for name in asked.arguments:
        if name in _OURS:
            raise ArgumentError(f"--argument {name}: that is set here; leave it out")
        if name not in takes:
            raise ArgumentError(f"--argument {name}: {cls.__name__} takes no such argument{nearest(name, takes)}")
    call = given | asked.arguments
    if "image" in takes and takes["image"].default is inspect.Parameter.empty and "image" not in call:
        raise ArgumentError(f"{cls.__name__} begins with a picture: give --image FILE")
    if "prompt" in takes and not call.keys() & {"prompt", "prompt_embeds"}:
        raise ArgumentError(f"{cls.__name__} needs a prompt: give --prompt TEXT")
    if asked.image is not None:
        call["image"] = _read_image(asked)
    return call


def _read_image(asked: Asked) -> Any:
    from diffusers.utils import load_image
    from PIL import UnidentifiedImageError

    assert asked.image is not None
    if not _is_url(asked.image) and not Path(asked.image).is_file():
        raise ArgumentError(f"there is no picture {asked.image}")
    try:
        image = load_image(asked.image)
    except (OSError, ValueError, UnidentifiedImageError):
        raise ArgumentError(f"{asked.image} is no picture that can be read") from None
    size = (asked.width or image.width, asked.height or image.height)
    return image if image.size == size else image.resize(size)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def generator_of(pipe: Any, call: Mapping[str, Any], seed: int) -> Callable[[], Frames]:
    """What runs a pipeline once with a call and a seed: RGB in 0..1, (frames, height, width, 3); a picture is one.

    Noise is drawn on the CPU, so that a seed means the same on every device.
    """
    import numpy as np

    def generate() -> Frames:
        generator = torch.Generator().manual_seed(seed)
        output = pipe(**call, generator=generator, output_type="np")  # as a tuple it is not of one form
        made = np.asarray(next(iter(output.values())), dtype=np.float32)  # B F H W C of videos, B H W C of pictures
        return made[0] if made.ndim == 5 else made[:1]

    return generate


@contextmanager
def calls_explained(pipe: Any) -> Iterator[None]:
    """Turns what a pipeline's own code raises on a call that it does not take into one line."""
    try:
        yield
    except LightcacheError:
        raise
    except _OF_THE_PIPELINE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{type(pipe).__name__} cannot be called so: {reason}") from error


def steps_of(pipe: Any, asked: Asked) -> int | None:
    """How many steps a generation has: as asked for, or by the pipeline's default; None where neither says."""
    if asked.steps is not None:
        return asked.steps
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None

"""How the models of a system are called in one generation: shapes of arguments, for the classes that are known here.

Other classes are planned too, with `--input NAME=SHAPE` for each of their arguments. Letters in comments: B batch
(guidance included), F frames, C channels, H height, W width, L tokens; latents are smaller than the video by the
autoencoder's factor.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightcache_fx.cli.systems import Component, Defaults
from lightcache_fx.errors import ConfigError

Inputs = dict[str, Any]
FACTOR = 8
"""Pixels of a latent pixel's side, where there is no autoencoder that says."""
PICTURES = ("UNet2DConditionModel",)
"""Denoisers of pictures; others make videos."""
_TOKENS = 77
_FRAMES = 16


@dataclass(frozen=True)
class Request:
    """What is generated.

    Attributes:
        height, width: of the video, in pixels.
        frames: of the video.
        steps: denoising steps.
        batch: how many videos.
        guidance: whether each step computes a prediction without the prompt as well, in one batch.
        decode_frames: how many frames are decoded at a time.
        factor: pixels of a latent pixel's side.
    """

    height: int
    width: int
    frames: int
    steps: int
    batch: int
    guidance: bool
    decode_frames: int
    factor: int

    @property
    def branches(self) -> int:
        """Predictions a step, in one batch."""
        return self.batch * (2 if self.guidance else 1)

    def latent(self) -> tuple[int, int]:
        """Height and width of the latent.

        Raises:
            ConfigError: they are no whole numbers.
        """
        for name, size in (("height", self.height), ("width", self.width)):
            if size % self.factor:
                raise ConfigError(f"--{name} must be a multiple of {self.factor}, got {size}")
        return self.height // self.factor, self.width // self.factor


def resolve(
    defaults: Defaults, component: Component, factor: int | None, batch: int, **given: int | bool | None
) -> Request:
    """What is generated: as the user says, else as is published, else as a model's configuration says.

    Args:
        defaults: of the system.
        component: its denoiser, or what there is alone.
        factor: of its autoencoder; None where there is none.
        batch: how many videos.
        given: by the user; None where nothing is.

    Raises:
        ConfigError: nothing says the size, or a model of pictures is asked for a video.
    """
    config, factor = component.config, factor or FACTOR
    sample = config.get("sample_size") or (config.get("sample_height"), config.get("sample_width"))
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    unit = 1 if component.cls in AUTOENCODERS else factor
    own = {
        "height": height * unit if height else None,
        "width": width * unit if width else None,
        "frames": config.get("num_frames") or _FRAMES,
    }
    if component.cls in PICTURES:
        if (given.get("frames") or 1) > 1:
            raise ConfigError(f"{component.cls} makes pictures: leave out --frames; several are --batch")
        own["frames"] = 1
    chosen: dict[str, Any] = {}
    for name in ("height", "width", "frames", "steps", "guidance", "decode_frames"):
        published, user = getattr(defaults, name), given.get(name)
        chosen[name] = user if user is not None else published if published is not None else own.get(name)
    if chosen["height"] is None or chosen["width"] is None:
        if component.cls in STEPS or component.cls in AUTOENCODERS:
            raise ConfigError(f"the configuration of {component.cls} gives no size; say --height and --width")
        chosen["height"] = chosen["width"] = 0  # nothing is computed from it
    chosen["decode_frames"] = min(chosen["decode_frames"] or chosen["frames"], chosen["frames"])
    return Request(**chosen, batch=batch, factor=factor)


def factor_of(vae: Component | None) -> int | None:
    """How many pixels a side of a latent pixel has, by an autoencoder's configuration."""
    widths = vae.config.get("block_out_channels") if vae is not None else None
    return 2 ** (len(widths) - 1) if widths else None


# One denoising step ---------------------------------------------------------------------------------------------------


def _width(config: Mapping[str, Any]) -> int:
    """Features of a token of the prompt."""
    width = config["cross_attention_dim"]
    return int(width[0] if isinstance(width, list | tuple) else width)


def _image_unet(config: Mapping[str, Any], request: Request) -> Inputs:
    batch = request.branches
    inputs: Inputs = {
        "sample": torch.randn(batch, config["in_channels"], *request.latent()),  # B C H W
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(batch, _TOKENS, _width(config)),  # B L C
    }
    if config.get("addition_embed_type") == "text_time":  # SDXL
        time_ids = 6
        pooled = config["projection_class_embeddings_input_dim"] - time_ids * config["addition_time_embed_dim"]
        conditions = {"text_embeds": torch.randn(batch, pooled), "time_ids": torch.randn(batch, time_ids)}
        inputs["added_cond_kwargs"] = conditions
    return inputs


def _video_unet(config: Mapping[str, Any], request: Request) -> Inputs:
    return {
        "sample": torch.randn(request.branches, config["in_channels"], request.frames, *request.latent()),  # B C F H W
        "timestep": torch.tensor(999),
        "encoder_hidden_states": torch.randn(request.branches, _TOKENS, _width(config)),  # B L C
    }


def _motion_unet(config: Mapping[str, Any], request: Request) -> Inputs:
    frames = request.branches * request.frames
    longest = config.get("motion_max_seq_length")
    if longest is not None and request.frames > longest:
        raise ConfigError(
            f"--frames must be at most {longest}, the model's motion_max_seq_length; got {request.frames}"
        )
    context = torch.randn(frames, _TOKENS, _width(config))  # B*F L C
    return _video_unet(config, request) | {"encoder_hidden_states": context}


def _spatio_temporal_unet(config: Mapping[str, Any], request: Request) -> Inputs:
    batch = request.branches
    ids = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    return {
        "sample": torch.randn(batch, request.frames, config["in_channels"], *request.latent()),  # B F C H W
        "timestep": torch.tensor(1.0, dtype=torch.float32),
        "encoder_hidden_states": torch.randn(batch, 1, _width(config)),  # B L C
        "added_time_ids": torch.randn(batch, ids),
    }


def _easyanimate(config: Mapping[str, Any], request: Request) -> Inputs:
    frames = (request.frames - 1) // 4 + 1
    return {
        "hidden_states": torch.randn(request.branches, config["in_channels"], frames, *request.latent()),  # B C F H W
        "timestep": torch.randn(request.branches),
        "encoder_hidden_states": torch.randn(request.branches, 256, config["text_embed_dim"]),  # B L C
        "encoder_hidden_states_t5": None,
    }


STEPS: Mapping[str, Callable[[Mapping[str, Any], Request], Inputs]] = {
    "UNet2DConditionModel": _image_unet,
    "UNet3DConditionModel": _video_unet,
    "UNetMotionModel": _motion_unet,
    "UNetSpatioTemporalConditionModel": _spatio_temporal_unet,
    "EasyAnimateTransformer3DModel": _easyanimate,
}
"""By class name, the arguments of a denoiser's call."""


def step_inputs(module: nn.Module, request: Request, own: Inputs) -> Inputs:
    """Arguments of one denoising step; those that the user gives stand for, or beside, those that are known.

    Raises:
        ConfigError: the class is not known and nothing was given, or the sizes do not fit the model.
    """
    name = type(module).__name__
    if name not in STEPS and not own:
        raise ConfigError(
            f"how {name} is called is not known here: give each argument as --input NAME=SHAPE, such as"
            f" --input hidden_states=2x16x7x64x64; it takes {', '.join(_parameters(module))}"
        )
    config: Any = module.config
    known = STEPS[name](config, request) if name in STEPS else {}
    return _without_dict(module.forward, known | own)


# The stages around the denoiser --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCall:
    """How a model is called beside the denoising loop.

    Attributes:
        name: of the stage.
        kwargs: of the call.
        calls: how many there are in a generation.
        method: of the module; None for forward.
    """

    name: str
    kwargs: Inputs
    calls: int = 1
    method: str | None = None


def _frames_at_once(config: Mapping[str, Any], request: Request, frames: int) -> Inputs:
    return {"z": torch.randn(frames, config["latent_channels"], *request.latent())}  # F C H W


def _image_vae(config: Mapping[str, Any], request: Request) -> list[StageCall]:
    calls = math.ceil(request.frames * request.batch / request.decode_frames)
    return [StageCall("decode", _frames_at_once(config, request, request.decode_frames), calls)]


def _temporal_vae(config: Mapping[str, Any], request: Request) -> list[StageCall]:
    (decode,) = _image_vae(config, request)
    image = torch.randn(request.batch, config["in_channels"], request.height, request.width)  # B C H W
    return [
        StageCall("encode", {"x": image}, method="encode"),
        StageCall("decode", decode.kwargs | {"num_frames": request.decode_frames}, decode.calls),
    ]


def _video_vae(config: Mapping[str, Any], request: Request) -> list[StageCall]:
    frames = (request.frames - 1) // 4 + 1
    latent = torch.randn(request.batch, config["latent_channels"], frames, *request.latent())  # B C F H W
    return [StageCall("decode", {"z": latent})]


AUTOENCODERS: Mapping[str, Callable[[Mapping[str, Any], Request], list[StageCall]]] = {
    "AutoencoderKL": _image_vae,
    "AutoencoderKLTemporalDecoder": _temporal_vae,
    "AutoencoderKLMagvit": _video_vae,
}


def stage_calls(component: Component, module: nn.Module, request: Request) -> list[StageCall]:
    """How a model beside the denoiser is called; an empty list where that is not known.

    A text encoder is called for the prompt and, with guidance, for the empty one; an image encoder once.
    """
    config: Any = module.config
    parameters = _parameters(module)
    if component.cls in AUTOENCODERS:
        return AUTOENCODERS[component.cls](config, request)
    if component.library != "transformers":
        return []
    if "pixel_values" in parameters and "input_ids" not in parameters:
        pixels = torch.randn(request.batch, getattr(config, "num_channels", 3), config.image_size, config.image_size)
        return [StageCall(component.name, {"pixel_values": pixels})]
    if "input_ids" in parameters:
        length = min(getattr(config, "max_position_embeddings", 256), 256)
        ids = torch.zeros(request.batch, length, dtype=torch.int64)
        return [StageCall(component.name, {"input_ids": ids}, calls=2 if request.guidance else 1)]
    return []


# What the user gives --------------------------------------------------------------------------------------------------

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64,
           "int32": torch.int32, "bool": torch.bool}  # fmt: skip


def read_input(text: str) -> tuple[str, torch.Tensor]:
    """`hidden_states=2x16x7x64x64`, `timestep=scalar:int64`: a fake argument; call it inside `fake_models`.

    Raises:
        ConfigError: it is not of that form.
    """
    match = re.fullmatch(r"(\w+)=(scalar|\d+(?:x\d+)*)(?::(\w+))?", text.strip())
    if match is None or (match[3] or "float32") not in _DTYPES:
        raise ConfigError(
            f"--input must read NAME=SHAPE or NAME=SHAPE:DTYPE, such as hidden_states=2x16x7x64x64 or"
            f" timestep=scalar:int64, with one of {', '.join(_DTYPES)}; got {text!r}"
        )
    shape: Sequence[int] = () if match[2] == "scalar" else tuple(map(int, match[2].split("x")))
    dtype = _DTYPES[match[3]] if match[3] else torch.get_default_dtype()
    return match[1], torch.ones(shape, dtype=dtype)


def _parameters(module: nn.Module) -> list[str]:
    return [name for name in inspect.signature(type(module).forward).parameters if name != "self"]


def _without_dict(function: Callable[..., Any], inputs: Inputs) -> Inputs:
    takes = "return_dict" in inspect.signature(function).parameters
    return inputs | ({"return_dict": False} if takes else {})

"""Videos as arrays (frames, height, width, channels) of float32 in 0..1: from files, arrays, tensors or pictures.

Layouts: F frames, H height, W width, C channels, which are 1 (grey) or 3 (RGB).
"""

from __future__ import annotations

import gc
import importlib
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
import numpy as np
import torch
from numpy.typing import NDArray

from lightcache_fx.errors import MissingExtraError, QualityError

Frames = NDArray[np.float32]
"""(frames, height, width, channels), in 0..1."""
Layout = Literal["FHWC", "FCHW"]
Video = str | Path | NDArray[Any] | torch.Tensor | Sequence[Any]
"""A file or folder, an array, a tensor, or a list of pictures."""

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_ANIMATIONS = (".gif", ".apng")
_FILMS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
_ARRAYS = (".npy", ".npz")
_UNREADABLE = (OSError, ValueError, RuntimeError, SyntaxError, IndexError, EOFError, KeyError, zipfile.BadZipFile)
"""What imageio, Pillow, ffmpeg and NumPy raise for a file that is not what its name says."""
_SCALES = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


def read_video(source: str | Path) -> Frames:
    """Read a video: GIF, MP4 (and what else ffmpeg reads), a folder of pictures, one picture, NPY or NPZ.

    Args:
        source: pictures of a folder are taken in the order of the numbers in their names. Of an NPZ file with several
            arrays one is named behind a colon: `frames.npz:plain`.

    Raises:
        QualityError: there is no such file, it cannot be read, or it does not hold a video.
        MissingExtraError: a film, and imageio-ffmpeg is not installed.
    """
    path, key = _file_and_key(str(source))
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise QualityError(f"there is no file or folder {path}")
    suffix = path.suffix.lower()
    if suffix in _ARRAYS:
        return as_frames(_read_array(path, key), name=str(source))
    if suffix in _FILMS:
        return as_frames(_read_film(path), name=str(source))
    if suffix in (*_ANIMATIONS, *_PICTURES):
        pixels = _read_pictures(path)
        return as_frames(_stacked([pixels] if suffix in _PICTURES else pixels), name=str(source))
    known = ", ".join((*_ANIMATIONS, *_FILMS, *_ARRAYS, *_PICTURES))
    raise QualityError(f"cannot read {path}: expected a folder of pictures or a file that ends in one of {known}")


def as_frames(video: Video, *, layout: Layout | None = None, name: str = "video") -> Frames:
    """Any video as an array (frames, height, width, channels) of float32 in 0..1, its values checked.

    Args:
        video: a path as for `read_video`; an array; a torch tensor, whose `layout` must be told; or a list of pictures
            (PIL, or arrays of height, width, channels), as diffusers' pipelines return. Whole numbers are `uint8` or
            `uint16`, floats are in 0..1.
        layout: of an array or tensor; arrays are `FHWC` unless told.
        name: what messages call it.

    Raises:
        QualityError: another shape, dtype or range, NaN, or pixels that are not opaque.
    """
    if isinstance(video, str | Path):
        return read_video(video)
    if layout not in (None, "FHWC", "FCHW"):
        raise QualityError(f"{name}: layout must be 'FHWC' or 'FCHW', got {layout!r}")
    if isinstance(video, torch.Tensor):
        if layout is None:
            raise QualityError(
                f"{name}: say how a torch tensor of shape {list(video.shape)} is to be read: layout='FCHW' (channels"
                f" first, as models have it) or 'FHWC'"
            )
        video = video.detach().cpu()
        video = (video.float() if video.is_floating_point() else video).numpy()
    elif not isinstance(video, np.ndarray):
        video = _stacked(video)
    if video.ndim != 4:
        raise QualityError(
            f"{name}: expected one video of shape (frames, height, width, channels), got {list(video.shape)}"
            + ("; of a batch of videos pass one" if video.ndim == 5 else "")
        )
    frames = video.transpose(0, 2, 3, 1) if layout == "FCHW" else video
    return np.ascontiguousarray(_in_unit_range(_opaque(_checked(frames, video.shape, layout, name), name), name))


def _checked(frames: NDArray[Any], shape: Sequence[int], layout: Layout | None, name: str) -> NDArray[Any]:
    if 0 in frames.shape:
        raise QualityError(f"{name}: expected at least one frame and one pixel, got shape {list(shape)}")
    if frames.shape[-1] not in (1, 3, 4):
        channels_first = layout is None and shape[1] in (1, 3, 4)
        hint = "; for channels first pass layout='FCHW'" if channels_first else ""
        raise QualityError(
            f"{name}: expected 1 channel or 3 {'second' if layout == 'FCHW' else 'last'}, got shape {list(shape)}{hint}"
        )
    return frames


def _opaque(frames: NDArray[Any], name: str) -> NDArray[Any]:
    """Without a fourth channel, which must hide nothing."""
    if frames.shape[-1] < 4:
        return frames
    alpha = frames[..., 3]
    if not (alpha == _SCALES.get(frames.dtype, 1.0)).all():
        raise QualityError(f"{name}: some pixels are transparent; lay the video over a background first")
    return frames[..., :3]


def _in_unit_range(frames: NDArray[Any], name: str) -> Frames:
    if frames.dtype in _SCALES:
        return frames.astype(np.float32) / np.float32(_SCALES[frames.dtype])
    if not np.issubdtype(frames.dtype, np.floating):
        raise QualityError(f"{name}: expected uint8, uint16 or floats in 0..1, got {frames.dtype}")
    if not np.isfinite(frames).all():
        frame = int(np.argmin(np.isfinite(frames).all(axis=(1, 2, 3))))
        raise QualityError(f"{name}: NaN or an infinite value in frame {frame}")
    low, high = float(frames.min()), float(frames.max())
    if low < 0 or high > 1:
        hint = "; map -1..1 by (x + 1) / 2" if low >= -1 and high <= 1 else ""
        hint = "; divide by 255, or pass uint8" if low >= 0 and 2 < high <= 255 else hint
        raise QualityError(f"{name}: expected floats in 0..1, got {low:.4g} to {high:.4g}{hint}")
    return frames.astype(np.float32)


def _file_and_key(source: str) -> tuple[Path, str | None]:
    """`frames.npz:plain` taken apart."""
    match = re.fullmatch(r"(.+\.npz):([^:/\\]+)", source, flags=re.IGNORECASE)
    return (Path(match[1]), match[2]) if match else (Path(source), None)


def _read_array(path: Path, key: str | None) -> NDArray[Any]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded as arrays:
            names = list(arrays.files)
            if key is None and len(names) == 1:
                key = names[0]
            if key in names:
                found: NDArray[Any] = arrays[key]
                return found
    except _UNREADABLE as error:
        raise QualityError(f"cannot read {path}: {_first_line(error)}") from None
    asked = "name one behind a colon" if key is None else f"there is no {key!r}"
    raise QualityError(f"{path} holds {', '.join(names) or 'no array'}: {asked}, as in {path.name}:{names[0]}"
                       if names else f"{path} holds no array")  # fmt: skip


def _read_folder(folder: Path) -> Frames:
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and p.is_file()), key=_by_number)
    if not paths:
        raise QualityError(f"{folder} has no pictures ({', '.join(_PICTURES)})")
    pictures = [_read_pictures(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise QualityError(
                f"pictures of {folder} differ: {paths[0].name} is {_size(pictures[0])}, {path.name} is {_size(picture)}"
            )
    return as_frames(_stacked(pictures), name=str(folder))


def _by_number(path: Path) -> list[tuple[int, int, str]]:
    """Sorts `frame_9.png` before `frame_10.png`."""
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in parts]


def _size(picture: NDArray[Any]) -> str:
    return " x ".join(map(str, picture.shape))


def _read_pictures(path: Path) -> NDArray[Any]:
    """One picture, or all of an animation."""
    try:
        pixels: NDArray[Any] = iio.imread(path, plugin="pillow")
    except _UNREADABLE as error:
        raise QualityError(f"cannot read {path}: {_first_line(error)}") from None
    return pixels


def _read_film(path: Path) -> NDArray[Any]:
    if isinstance(missing := _ffmpeg(), ImportError):
        raise MissingExtraError(f"reading {path.suffix} files needs {missing.name}", "video")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # imageio leaves the pipes to ffmpeg to the garbage collector
        try:
            pixels: NDArray[Any] = iio.imread(path, plugin="FFMPEG")
        except _UNREADABLE as error:
            reason = _first_line(error)
        else:
            return pixels
        gc.collect()
    raise QualityError(f"cannot read {path}: {reason}")


def _ffmpeg() -> ImportError | None:
    try:
        importlib.import_module("imageio_ffmpeg")
    except ImportError as error:
        return error
    return None


def _stacked(pictures: Any) -> NDArray[Any]:
    """Pictures of one size as one array; grey ones get a channel."""
    try:
        arrays = [np.asarray(picture) for picture in pictures]
    except TypeError:
        raise QualityError(
            f"expected a path, an array, a torch tensor or a list of pictures, got {type(pictures).__name__}"
        ) from None
    arrays = [array[..., None] if array.ndim == 2 else array for array in arrays]
    sizes = {array.shape for array in arrays}
    if len(sizes) > 1:
        raise QualityError(f"pictures of one video differ: {' and '.join(map(str, map(list, sorted(sizes))))}")
    return np.stack(arrays) if arrays else np.empty((0, 0, 0, 3))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

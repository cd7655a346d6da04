"""How far an accelerated video is from the plain one: `compare_videos`. Needs the extra `quality`.

from lightcache_fx.quality import compare_videos
quality = compare_videos("plain.mp4", "accelerated.mp4")
print(quality.psnr.mean, quality.ssim, quality.to_json())
"""

from lightcache_fx.errors import MissingExtraError

try:
    from lightcache_fx.quality.compare import compare_videos
    from lightcache_fx.quality.results import MEASURES, Measure, NotAvailable, PerFrame, PerPair, Quality
    from lightcache_fx.quality.videos import Frames, Layout, Video, as_frames, read_video
except ModuleNotFoundError as error:
    if (error.name or "").startswith("lightcache_fx"):
        raise
    raise MissingExtraError(f"comparing videos needs {error.name}", "quality") from error

__all__ = [
    "MEASURES",
    "Frames",
    "Layout",
    "Measure",
    "NotAvailable",
    "PerFrame",
    "PerPair",
    "Quality",
    "Video",
    "as_frames",
    "compare_videos",
    "read_video",
]

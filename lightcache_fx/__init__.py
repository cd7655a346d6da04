"""lightcache_fx compiles a diffusion model into a few static programs, one per kind of denoising step.

model = lightcache_fx.transform(unet, Policy.deepcache(interval=3, branch=0))
pipe = lightcache_fx.transform_pipeline(pipe, policy)
"""

from lightcache_fx import errors
from lightcache_fx.backend import backend
from lightcache_fx.caching import Adaptive, Auto, Cache, Guard, Guidance, Magnitude, Residual
from lightcache_fx.calibrating import calibrate
from lightcache_fx.calibration import Calibration, Point
from lightcache_fx.loading import load
from lightcache_fx.mapped import map_weights
from lightcache_fx.module import decode_frames, plan, reset, transform
from lightcache_fx.pipeline import restore, transform_pipeline
from lightcache_fx.pipeline_plan import PipelinePlan, Stage, plan_pipeline
from lightcache_fx.plan import Plan
from lightcache_fx.policy import Chunk, Compile, Decode, Layers, Policy, Region, Swap
from lightcache_fx.printer import diff, format_graph, print_diff
from lightcache_fx.recording import Recording, block_paths, record_kept
from lightcache_fx.reports import PipelineReport, ProgramReport, Report, SignatureReport, inspect
from lightcache_fx.runs import branch_name, marked_run, step_done
from lightcache_fx.saving import save
from lightcache_fx.version import __version__ as __version__

__all__ = [
    "Adaptive",
    "Auto",
    "Cache",
    "Calibration",
    "Chunk",
    "Compile",
    "Decode",
    "Guard",
    "Guidance",
    "Layers",
    "Magnitude",
    "PipelinePlan",
    "PipelineReport",
    "Plan",
    "Point",
    "Policy",
    "ProgramReport",
    "Recording",
    "Region",
    "Report",
    "Residual",
    "SignatureReport",
    "Stage",
    "Swap",
    "backend",
    "block_paths",
    "branch_name",
    "calibrate",
    "decode_frames",
    "diff",
    "errors",
    "format_graph",
    "inspect",
    "load",
    "map_weights",
    "marked_run",
    "plan",
    "plan_pipeline",
    "print_diff",
    "record_kept",
    "reset",
    "restore",
    "save",
    "step_done",
    "transform",
    "transform_pipeline",
]

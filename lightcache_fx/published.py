"""What was published, or tuned, for diffusion systems by name: the settings of `Policy.lightcache`.

Settings only: no module, class or size of a system is known here, and nothing in the compiler reads this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightcache_fx.caching import Cache, Residual
from lightcache_fx.policy import Decode


@dataclass(frozen=True)
class Published:
    """The settings of one system.

    Attributes:
        cache: interval and cut, as in the LightCache paper's notebooks; of EasyAnimate, where these patch the pipeline,
            all blocks but the first and the last as a residual.
        chunk: share of a step's activations that chunks keep to. At the published size half of that (ModelScope: three
            quarters) is predicted to cost at most 6 %, see `benchmarks/results/memory_plans.md`; small versions of the
            system keep it as well.
        decode: one frame at a time where the system's decoder treats frames apart, else a share of what it takes whole.
            EasyAnimate's keeps the last frames of what each convolution read, for the next few: at the published size
            81 % is what can be reached, by prediction.
    """

    cache: Cache
    chunk: str
    decode: Decode


_APART = Decode(frames=1)
_TOGETHER = Decode(budget="60%", best_effort=True)

GENERIC = Published(Cache(cut=0, interval=3), "60%", _TOGETHER)
"""Where no system is named: DeepCache's own setting, and shares that models of all families keep."""

PUBLISHED: Mapping[str, Published] = {
    "svd-xt": Published(Cache(cut=0, interval=8), "60%", _TOGETHER),
    "animatediff-lightning": Published(Cache(cut=0, interval=2), "60%", _APART),
    "animatediff": Published(Cache(cut=0, interval=2), "60%", _APART),
    "modelscope": Published(Cache(cut=0, interval=2), "40%", _APART),
    "easyanimate": Published(
        Cache(cut=Residual(first="transformer_blocks.1", last="transformer_blocks.26"), interval=2), "60%", _TOGETHER
    ),
}

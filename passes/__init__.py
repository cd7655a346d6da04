"""The graph rewrites, one idea a file. Each is a function `verb_noun(graph, *, plan...) -> PassResult`."""

from lightcache_fx.passes.base import Pass, PassResult, run_passes
from lightcache_fx.passes.normalize import normalize

__all__ = ["Pass", "PassResult", "normalize", "run_passes"]

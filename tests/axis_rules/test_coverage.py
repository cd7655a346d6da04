"""Every operator that denoisers, decoders and encoders are made of has a tested rule, or a reason to have none.

The lists are what the captured models contain. The slow tests capture them all again, so that a model with a new
operator fails until it is listed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch._ops import OpOverload

from axis_rules.cases import CASES, aten
from axis_rules.vaes import VAES
from graphs import captured
from lightcache_fx.axis_rules import RULES
from lightcache_fx.graphs import calls
from zoo import ZOO

RULED = """
    __and__.Tensor _to_copy.default _unsafe_view.default _upsample_nearest_exact2d.vec
    adaptive_avg_pool2d.default add.Tensor avg_pool1d.default broadcast_to.default cat.default chunk.default
    clamp.default clamp_min.default clone.default concat.default concatenate.default contiguous.default
    conv2d.default conv3d.default copy.default cos.default div.Tensor einsum.default embedding.default
    empty_like.default exp.default expand.default expand_as.default fill.Tensor flatten.using_ints ge.Tensor
    gelu.default group_norm.default index.Tensor layer_norm.default le.Tensor linalg_vector_norm.default
    linear.default masked_fill.Scalar matmul.default mean.dim movedim.int mul.Tensor neg.default
    ones_like.default outer.default pad.default permute.default pow.Scalar pow.Tensor_Scalar reciprocal.default
    relu.default repeat.default repeat_interleave.self_int reshape.default rms_norm.default rsqrt.default
    rsub.Scalar scaled_dot_product_attention.default select.int select_scatter.default sigmoid.default
    silu.default sin.default slice.Tensor slice_scatter.default split.Tensor split_with_sizes.default
    squeeze.dim stack.default sub.Tensor sum.dim_IntList tanh.default to.dtype transpose.int unbind.int
    unflatten.int unsqueeze.default upsample_nearest2d.vec upsample_nearest3d.vec view.default
    view_as_complex.default view_as_real.default where.Scalar where.self zeros_like.default
"""
REFUSED = {
    # They make values from nothing, small ones (positions, frequencies): computed whole, before a region.
    "arange.default", "arange.start", "arange.start_step", "linspace.default", "ones.default", "zeros.default",
    "new_zeros.default",
    # Of positions; each result would be cut along another dimension.
    "meshgrid.indexing",
    # What it returns has a size that depends on data.
    "nonzero.default",
    # A number, no tensor.
    "sym_size.int",
}  # fmt: skip
# `getitem` has its rule in `needs_of`; the others compute sizes.
PYTHON = {operator.getitem, operator.add, operator.sub}


def overload(name: str) -> OpOverload:
    packet, _, kind = name.partition(".")
    found: OpOverload = getattr(getattr(aten, packet), kind)
    return found


def has_rule(target: OpOverload) -> bool:
    return target in RULES or torch.Tag.pointwise in target.tags


@pytest.mark.parametrize("name", RULED.split())
def test_operators_of_models_have_a_tested_rule(name: str) -> None:
    assert has_rule(overload(name))
    if name != "empty_like.default":  # whose values are nobody's
        assert any(case.target is overload(name) and case.dims for case in CASES)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_operators_have_no_rule(name: str) -> None:
    assert not has_rule(overload(name))


def test_rules_are_tested() -> None:
    """Every rule has a case, or shares its functions with one that has."""
    tested = {case.target for case in CASES}
    functions = {RULES[target].needs for target in tested if target in RULES}
    assert [str(target) for target, rule in RULES.items() if rule.needs not in functions] == []


def unlisted(graph: fx.Graph) -> set[str]:
    """Operators of a graph that are on no list."""
    listed = {overload(name) for name in (*RULED.split(), *REFUSED)} | PYTHON
    return {str(node.target) for node in calls(graph) if node.op == "call_function" and node.target not in listed}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_denoisers(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    assert unlisted(captured(model, **make_inputs(seed=0)).graph_module.graph) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", VAES)
def test_decoders_and_encoders(name: str) -> None:
    vae = VAES[name]
    for part, sizes in ((vae.decoder, vae.latent), (vae.encoder, vae.video)):
        module: Callable[[], nn.Module] = part
        assert unlisted(captured(module(), torch.zeros(sizes)).graph_module.graph) == set()

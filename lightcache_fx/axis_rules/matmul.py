"""Products of matrices: rows, columns and batches can be cut, not what is summed over."""

from __future__ import annotations

from lightcache_fx.axis_rules.registry import Call, Needs, aten, rule


@rule(aten.linear.default)
def _linear(call: Call) -> Needs:
    """`x @ weight.T + bias`: cut along output features, weight and bias are cut; along anything else, `x` is."""
    if call.axis.dim < len(call.shape) - 1:
        return [call.same("input")]
    return [(call.tensor("input"), None), call.same("weight", 0), *call.optional("bias", 0)]


def _product(call: Call, left: str, right: str) -> Needs:
    """Needs of `left @ right`, broadcast over batches."""
    ndim = len(call.shape)
    if min(len(call.sizes(left)), len(call.sizes(right))) < 2:
        raise call.refuse("one of the factors is a vector")
    if call.axis.dim == ndim - 2:
        return [call.same(left, len(call.sizes(left)) - 2), (call.tensor(right), None)]
    if call.axis.dim == ndim - 1:
        return [(call.tensor(left), None), call.same(right, len(call.sizes(right)) - 1)]
    return [call.broadcast(left), call.broadcast(right)]


@rule(aten.matmul.default)
def _matmul(call: Call) -> Needs:
    return _product(call, "self", "other")


@rule(aten.mm.default, aten.bmm.default)
def _mm(call: Call) -> Needs:
    return _product(call, "self", "mat2")


@rule(aten.addmm.default)
def _addmm(call: Call) -> Needs:
    return [call.broadcast("self"), *_product(call, "mat1", "mat2")]


@rule(aten.baddbmm.default)
def _baddbmm(call: Call) -> Needs:
    return [call.broadcast("self"), *_product(call, "batch1", "batch2")]


@rule(aten.outer.default)
def _outer(call: Call) -> Needs:
    cut, whole = ("self", "vec2") if call.axis.dim == 0 else ("vec2", "self")
    return [call.same(cut, 0), (call.tensor(whole), None)]


@rule(aten.einsum.default)
def _einsum(call: Call) -> Needs:
    """`nhwc,nc->nwh`: an operand that has the output's letter is cut there."""
    inputs, arrow, output = call.args["equation"].replace(" ", "").partition("->")
    operands = list(zip(inputs.split(","), call.args["tensors"], strict=True))
    if not arrow or any(len(set(letters)) < len(letters) for letters, _ in operands) or "." in inputs + output:
        raise call.refuse(f"the equation {call.args['equation']!r} repeats a letter of an operand, or is not spelt out")
    letter = output[call.axis.dim]
    return [
        call.same(node, letters.index(letter)) if letter in letters else (call.tensor(node), None)
        for letters, node in operands
    ]

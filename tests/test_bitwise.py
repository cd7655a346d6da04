"""`Policy()` is lossless: the programs return the bits of the eager model, which stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from oracle import assert_bitwise, plain_step
from zoo import ZOO

CALLS = [(0, 0), (1, 2), (2, 4)]  # (seed, step); the first one is captured
BOTH_RETURN_TYPES = [
    pytest.param("svd", marks=pytest.mark.slow),
    pytest.param("animatediff", marks=pytest.mark.slow),
    "flux",
    "cogvideox",
    "dit",
]
# In bfloat16 the quick selection takes the video models that the project is for and the named transformers.
QUICK_IN_BFLOAT16 = {
    *("sd", "svd", "animatediff"),
    *("easyanimate", "wan", "cogvideox", "flux", "sd3", "ltx", "hunyuanvideo", "mochi", "latte", "pixart"),
}


def _cases() -> list[object]:
    cases = []
    for name in ZOO:
        cases.append(pytest.param(name, torch.float32, id=f"{name}-float32"))
        marks = [] if name in QUICK_IN_BFLOAT16 else [pytest.mark.slow]
        cases.append(pytest.param(name, torch.bfloat16, id=f"{name}-bfloat16", marks=marks))
    return cases


def _copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "dtype"), _cases())
def test_lossless_programs_return_the_eager_bits(name: str, dtype: torch.dtype) -> None:
    model, make_inputs = ZOO[name].build(dtype)
    state = _copy_state(model)
    expected = [plain_step(model, **make_inputs(seed, step)) for seed, step in CALLS]

    transformed = lc.transform(model, lc.Policy())
    for (seed, step), outputs in zip(CALLS, expected, strict=True):
        assert_bitwise(plain_step(transformed, **make_inputs(seed, step)), outputs)
    for (seed, step), outputs in zip(CALLS, expected, strict=True):
        assert_bitwise(plain_step(model, **make_inputs(seed, step)), outputs)

    assert lc.restore(transformed) is model
    assert list(model.state_dict()) == list(state)
    assert_bitwise(list(model.state_dict().values()), list(state.values()))


@pytest.mark.parametrize("name", BOTH_RETURN_TYPES)
def test_return_dict_either_way(name: str) -> None:
    model, make_inputs = ZOO[name].build()
    transformed = lc.transform(model, lc.Policy())
    for return_dict in (True, False):
        inputs = {**make_inputs(0), "return_dict": return_dict}
        with torch.no_grad():
            output, expected = transformed(**inputs), model(**inputs)
        assert type(output) is type(expected)
        assert_bitwise(plain_step(transformed, **inputs), plain_step(model, **inputs))


def test_transformed_is_an_instance_of_the_models_class_and_shares_its_parameters() -> None:
    model, make_inputs = ZOO["dit"].build()
    transformed = lc.transform(model, lc.Policy())
    plain_step(transformed, **make_inputs(0))
    assert isinstance(transformed, type(model))
    assert transformed.config == model.config
    own = dict(transformed.named_parameters())
    assert all(own[name] is parameter for name, parameter in model.named_parameters())


def test_an_edit_of_a_weight_is_seen() -> None:
    model, make_inputs = ZOO["dit"].build()
    transformed = lc.transform(model, lc.Policy())
    before = plain_step(transformed, **make_inputs(0))
    with torch.no_grad():
        model.proj_out_2.weight.mul_(2)
    after = plain_step(transformed, **make_inputs(0))
    assert not torch.equal(before[0], after[0])
    assert_bitwise(after, plain_step(model, **make_inputs(0)))

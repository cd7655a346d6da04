"""Bad input: each mistake has its own message, and leaves module and transform usable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightcache_fx as lc
from lightcache_fx import errors
from lightcache_fx.module import TransformedModule
from oracle import assert_bitwise, plain_step
from toys import Denoiser, latent, prompt

INPUTS = {"sample": latent(0), "timestep": torch.tensor(900), "encoder_hidden_states": prompt(0)}


def _says(error: BaseException, *words: str) -> None:
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{missing} missing in: {error}"


def _usable(model: nn.Module) -> None:
    """The module runs as before, and transforms."""
    with torch.no_grad():
        expected = model(**INPUTS)
    transformed = lc.transform(model, lc.Policy())
    assert_bitwise(plain_step(transformed, **INPUTS), [expected])
    assert lc.restore(transformed) is model


def _called(policy: lc.Policy, model: nn.Module | None = None, *, num_calls: int = 1) -> Callable[[], object]:
    """Transforms and calls: cuts and schedules need the graph, so what is wrong with them shows at the first call."""
    transformed = lc.transform(model or Denoiser(), policy)

    def call() -> None:
        for step in range(num_calls):
            plain_step(transformed, **{**INPUTS, "timestep": torch.tensor(900 - 10 * step)})

    return call


def test_every_error_is_one_of_ours() -> None:
    own = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(cls, errors.LightcacheError) for cls in own)
    for cls, builtin in [
        (errors.ArgumentError, TypeError),
        (errors.PolicyError, ValueError),
        (errors.CutError, ValueError),
        (errors.ScheduleError, ValueError),
        (errors.CaptureError, RuntimeError),
    ]:
        assert issubclass(cls, builtin)


# 1. Wrong types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["unet", None, torch.zeros(1), Denoiser], ids=["str", "None", "Tensor", "class"])
def test_a_module_of_the_wrong_type(given: Any) -> None:
    with pytest.raises(errors.ArgumentError) as error:
        lc.transform(given)
    _says(error.value, "transform", "expected a torch.nn.Module", type(given).__name__, "transform_pipeline")
    with pytest.raises(errors.ArgumentError) as error:
        lc.plan(given)
    _says(error.value, "plan", "expected a torch.nn.Module", type(given).__name__)


@pytest.mark.parametrize("given", [{"cache": None}, "policy.yaml", None, lc.Policy])
def test_a_policy_of_the_wrong_type(given: Any) -> None:
    model = Denoiser()
    with pytest.raises(errors.ArgumentError) as error:
        lc.transform(model, given)
    _says(error.value, "policy must be a lightcache_fx.Policy", type(given).__name__, "Policy.from_yaml")
    _usable(model)


def test_an_argument_that_cannot_be_captured() -> None:
    class Strange:
        pass

    model = Denoiser()
    transformed = lc.transform(model)
    with pytest.raises(errors.ArgumentError) as error:
        transformed(INPUTS["sample"], INPUTS["timestep"], Strange())
    _says(error.value, "Denoiser", "encoder_hidden_states", "Strange", "expected tensors", "register_dataclass")
    assert_bitwise(plain_step(transformed, **INPUTS), plain_step(model, **INPUTS))


def test_an_argument_too_few_is_pythons_own_error() -> None:
    transformed = lc.transform(Denoiser())
    with pytest.raises(TypeError, match="encoder_hidden_states"):
        transformed(INPUTS["sample"], INPUTS["timestep"])


def test_a_rate_of_no_parameter() -> None:
    model = Denoiser()
    with pytest.raises(errors.ArgumentError) as error:
        lc.transform(model, lc.Policy(rates={"prompt": "run"}))
    _says(error.value, "rates", "Denoiser.forward", "'prompt'", "sample, timestep, encoder_hidden_states, scale")
    _usable(model)


@pytest.mark.parametrize("given", [Denoiser(), "pipe", None, nn.Linear(1, 1)])
def test_a_pipeline_of_the_wrong_type(given: Any) -> None:
    with pytest.raises(errors.ArgumentError) as error:
        lc.transform_pipeline(given, lc.Policy())
    _says(error.value, "transform_pipeline", "expected a diffusers pipeline", type(given).__name__, "use transform")


# 2. to 4. Cuts ----------------------------------------------------------------------------------------------------


def test_an_unknown_path() -> None:
    model = Denoiser()
    with pytest.raises(errors.CutError) as error:
        lc.transform(model, lc.Policy(cache=lc.Cache(cut="middle.layers", interval=2)))
    _says(error.value, "cut='middle.layers'", "Denoiser has no such module", "did you mean 'middle.layer'")
    with pytest.raises(errors.CutError) as error:
        lc.transform(model, lc.Policy(cache=lc.Cache(cut=lc.Residual(first="middle", last="midle"), interval=2)))
    _says(error.value, "'midle'", "did you mean 'middle'")
    _usable(model)


def test_a_branch_deeper_than_the_model() -> None:
    model = Denoiser()
    call = _called(lc.Policy.deepcache(2, branch=3), model)
    with pytest.raises(errors.CutError) as error:
        call()
    _says(error.value, "cut=3", "1 skip connection", "branch 0")
    _usable(model)


def test_a_branch_deeper_than_the_model_in_good_english() -> None:
    with pytest.raises(errors.CutError, match=r"the model has 1 skip connection, so only branch 0 exists"):
        _called(lc.Policy.deepcache(2, branch=3))()


def test_a_depth_where_there_are_no_skips() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
        ) -> torch.Tensor:
            return self.layer(sample) * timestep + encoder_hidden_states.mean()

    model = Plain().eval().requires_grad_(False)
    with pytest.raises(errors.CutError) as error:
        _called(lc.Policy.deepcache(2), model)()
    _says(error.value, "cut=0", "no skip connections", "module path", "Residual(first=..., last=...)", "'auto'")
    _usable(model)


class Odd(nn.Module):
    """A module that is never called, one whose result is dropped, one that reads the prompt alone."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.dropped = nn.Linear(4, 4)
        self.prompt = nn.Linear(3, 4)
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 8)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        self.dropped(sample)
        hidden = self.a(sample) * timestep + self.prompt(encoder_hidden_states)
        return hidden + self.b(hidden).mean()


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("dropped", ["cut='dropped'", "reaches the output", "cut at a module that does"]),
        ("unused", ["cut='unused'", "never called", "cut at its caller"]),
        ("prompt", ["cut='prompt'", "does not change within a run", "saves nothing"]),
        (["a", "dropped"], ["cut='dropped'", "reaches the output"]),
        (
            lc.Residual(first="a", last="b"),
            ["Residual(first='a', last='b')", "which input of 'a'", "expected one of its type", "first and last block"],
        ),
        (lc.Residual(first="b", last="a"), ["Residual(first='b', last='a')", "first before last"]),
        (lc.Residual(first="prompt", last="a"), ["Residual(first='prompt', last='a')", "stream"]),
        (lc.Auto(max_kept_bytes=1), ["cut='auto'", "max_kept_bytes=1", "smallest cut", "bytes"]),
    ],
)  # fmt: skip
def test_cuts_that_cannot_be_made(cut: Any, words: list[str]) -> None:
    model = Odd().eval().requires_grad_(False)
    with pytest.raises(errors.CutError) as error:
        _called(lc.Policy(cache=lc.Cache(cut=cut, interval=2)), model)()
    _says(error.value, *words)
    _usable(model)


def test_a_cut_of_what_does_not_change_within_a_run() -> None:
    model = Odd().eval().requires_grad_(False)
    with pytest.raises(errors.CutError, match="what the module returns does not change within a run"):
        _called(lc.Policy(cache=lc.Cache(cut="prompt", interval=2), hoist=False), model)()


# 5. and 6. Schedules ----------------------------------------------------------------------------------------------


def test_interval_zero() -> None:
    with pytest.raises(errors.PolicyError) as error:
        lc.Policy.deepcache(interval=0)
    _says(error.value, "interval", "greater than or equal to 1", "got 0")


def test_a_mask_shorter_than_the_run() -> None:
    model = Denoiser()
    policy = lc.Policy(cache=lc.Cache(cut=0, mask=[True, False]))
    with pytest.raises(errors.ScheduleError) as error:
        _called(policy, model, num_calls=3)()
    _says(error.value, "mask has 2 entries", "step 2", "counted from 0", "second-order schedulers")
    _usable(model)


def test_a_mask_of_another_length_than_the_marked_run() -> None:
    model = Denoiser()
    policy = lc.Policy(cache=lc.Cache(cut=0, mask=[True, False]))
    call = _called(policy, model)
    for _ in range(2):  # the same mistake again is the same error
        with pytest.raises(errors.ScheduleError) as error, lc.marked_run(5):
            call()
        _says(error.value, "mask has 2 entries", "the run has 5 steps", "one entry a step")
    with lc.marked_run(2):
        call()
    _usable(model)


def test_steps_beyond_the_run() -> None:
    with pytest.raises(errors.ScheduleError) as error, lc.marked_run(5):
        _called(lc.Policy(cache=lc.Cache(cut=0, steps=[0, 5])))()
    _says(error.value, "step 5", "5 steps", "counted from 0")


def test_num_steps_of_another_run() -> None:
    with pytest.raises(errors.ScheduleError) as error, lc.marked_run(5):
        _called(lc.Policy(cache=lc.Cache(cut=0, interval=2, num_steps=6)))()
    _says(error.value, "num_steps=6", "5 steps", "leave it out or make them equal")


def test_last_steps_of_an_unknown_number() -> None:
    with pytest.raises(errors.ScheduleError) as error:
        _called(lc.Policy(cache=lc.Cache(cut=0, interval=2, last=1)))()
    _says(error.value, "last=1", "number of steps is not known", "transform_pipeline", "num_steps")


def test_last_steps_of_an_unknown_number_are_refused_again() -> None:
    call = _called(lc.Policy(cache=lc.Cache(cut=0, interval=2, last=1)))
    for _ in range(2):
        with pytest.raises(errors.ScheduleError, match="last=1"):
            call()


# 7. Transformed already -------------------------------------------------------------------------------------------


def test_transformed_already() -> None:
    model = Denoiser()
    transformed = lc.transform(model)
    with pytest.raises(errors.TransformError) as error:
        lc.transform(transformed)
    _says(error.value, "Denoiser is transformed already", "lightcache_fx.restore(module)")
    assert lc.restore(transformed) is model
    _usable(model)


def test_not_transformed() -> None:
    model = Denoiser()
    for function, words in [(lc.restore, ["restore"]), (lc.inspect, ["inspect", "lightcache_fx.transform"])]:
        with pytest.raises(errors.TransformError) as error:
            function(model)
        _says(error.value, *words, "Denoiser", "is not transformed")
    with pytest.raises(errors.TransformError, match="restore: expected a transformed module or pipeline, got int"):
        lc.restore(3)


def test_inspected_before_the_first_call() -> None:
    with pytest.raises(errors.TransformError) as error:
        lc.inspect(lc.transform(Denoiser()))
    _says(error.value, "Denoiser", "has not been called yet", "call it once")


def test_forward_replaced_on_the_instance() -> None:
    model = Denoiser()
    model.forward = functools.partial(model.forward)  # as offload hooks do
    with pytest.raises(errors.TransformError) as error:
        lc.transform(model)
    _says(error.value, "Denoiser", "forward", "replaced on the instance", "remove these hooks first")


def test_pickling() -> None:
    import pickle

    with pytest.raises(errors.TransformError, match=r"lightcache_fx.restore\(module\), or its state_dict"):
        pickle.dumps(lc.transform(Denoiser()))


def test_a_plan_of_a_transformed_module() -> None:
    transformed = lc.transform(Denoiser())
    try:
        plan = lc.plan(transformed, (), INPUTS)
    except errors.LightcacheError as error:
        _says(error, "Denoiser is transformed already", "restore")
    else:
        assert plan == lc.plan(lc.restore(transformed), (), INPUTS)


# 8. Cannot be captured --------------------------------------------------------------------------------------------


def _model(forward: Callable[..., torch.Tensor]) -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))

        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
        ) -> torch.Tensor:
            return forward(self, sample, timestep, encoder_hidden_states)

    return Model().eval().requires_grad_(False)


def _branches_on_a_value(self: Any, sample: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    if sample.sum() > 0:
        return self.layer(sample) * timestep
    return sample


def test_a_model_that_branches_on_a_value() -> None:
    model = _model(_branches_on_a_value)
    with pytest.raises(errors.CaptureError) as error:
        _called(lc.Policy(), model)()
    _says(
        error.value, "Model cannot be captured as one static graph", "test_errors.py", "_branches_on_a_value",
        "if sample.sum() > 0", "independent of tensor values",
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(model(**INPUTS), model(**INPUTS))


def test_a_decision_taken_on_the_example_is_refused() -> None:
    """Traced, it would compute something else on other inputs: the capture is compared with eager."""

    def forward(self: Any, sample: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        scale = float(sample.detach().numpy().mean()) if type(sample) is torch.Tensor else 1.0
        return self.layer(sample) * timestep * scale

    with pytest.raises(errors.CaptureError) as error:
        _called(lc.Policy(), _model(forward))()
    _says(error.value, "Model", "export")


def test_a_model_that_writes_to_its_buffer() -> None:
    def forward(self: Any, sample: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.layer(sample) * timestep

    model = _model(forward)
    with pytest.raises(errors.CaptureError) as error:
        _called(lc.Policy(), model)()
    _says(error.value, "count", "a step must be pure")
    assert model.count == 0


def test_attributes_set_while_tracing_are_put_back() -> None:
    def forward(self: Any, sample: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        self.seen = sample
        self.num_calls = getattr(self, "num_calls", 0) + 1
        if self.num_calls < 0 or sample.sum() > 1e9:
            return sample
        return self.layer(sample) * timestep

    model = _model(forward)
    before = set(vars(model))
    with pytest.raises(errors.CaptureError):
        _called(lc.Policy(), model)()
    assert set(vars(model)) == before


def test_one_tensor_for_two_arguments() -> None:
    class Model(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return sample * timestep + mask.sin()

    model = Model().eval()
    x = latent(0)
    assert torch.equal(lc.transform(model)(x, 5, x), model(x, 5, x))


def test_a_weight_whose_name_begins_with_a_digit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval().requires_grad_(False)
    assert torch.equal(lc.transform(model)(latent(0)), model(latent(0)))


def test_a_model_whose_submodule_cannot_be_traced_runs_all_the_same() -> None:
    """Tables made from Python lists inside `forward`: that module stays one operation."""

    class Table(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + torch.tensor([float(x) for x in hidden.detach().mean(0).numpy()])

    class Model(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self.table(super().forward(*args, **kwargs))

    model = Model().eval().requires_grad_(False)
    try:
        transformed = lc.transform(model)
        assert_bitwise(plain_step(transformed, **INPUTS), plain_step(model, **INPUTS))
    except errors.CaptureError as error:
        _says(error, "Model")
    assert "forward" not in vars(model.table)


# 9. Training mode, precision --------------------------------------------------------------------------------------


def test_training_mode() -> None:
    model = Denoiser().train()
    transformed = lc.transform(model)
    with pytest.raises(errors.CaptureError) as error:
        plain_step(transformed, **INPUTS)
    _says(error.value, "Denoiser is in training mode", "call .eval() first")
    model.eval()
    assert_bitwise(plain_step(transformed, **INPUTS), plain_step(model, **INPUTS))
    transformed.train()
    with pytest.raises(errors.CaptureError, match="training mode"):
        plain_step(transformed, **INPUTS)
    transformed.eval()
    _usable(model)


def test_autocast() -> None:
    transformed = lc.transform(Denoiser())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(errors.CaptureError) as error:
        plain_step(transformed, **INPUTS)
    _says(error.value, "torch.autocast is on", "leave autocast")
    plain_step(transformed, **INPUTS)


def test_autocast_after_the_capture() -> None:
    transformed = lc.transform(Denoiser())
    plain_step(transformed, **INPUTS)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(errors.CaptureError, match="autocast"):
        plain_step(transformed, **INPUTS)


# 10. Policy files -------------------------------------------------------------------------------------------------


def test_a_policy_file_with_an_unknown_key(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("cache:\n  cut: 0\n  intervals: 3\n", encoding="utf-8")
    with pytest.raises(errors.PolicyError) as error:
        lc.Policy.from_yaml(file)
    _says(error.value, "unknown key 'intervals'", "did you mean 'interval'?", "allowed keys: cut, interval, steps")


# State after an error in the middle -------------------------------------------------------------------------------


def test_a_run_after_a_step_that_raised() -> None:
    """An error inside a program drops the run: nothing half-made is reused."""
    model = Denoiser()
    transformed = lc.transform(model, lc.Policy.deepcache(interval=10))
    for step in range(2):
        plain_step(transformed, **{**INPUTS, "timestep": torch.tensor(900 - step)})
    runtime = transformed._lightcache.runtime if isinstance(transformed, TransformedModule) else None
    assert runtime is not None
    (compiled,) = runtime.repertoire.compiled.values()
    run = compiled.bound["reuse"]._run

    def fails(*_: Any) -> Any:
        raise MemoryError

    compiled.bound["reuse"]._run = fails
    with pytest.raises(MemoryError):
        plain_step(transformed, **{**INPUTS, "timestep": torch.tensor(800)})
    compiled.bound["reuse"]._run = run
    inputs = {**INPUTS, "timestep": torch.tensor(700)}
    assert_bitwise(plain_step(transformed, **inputs), plain_step(model, **inputs))
    assert lc.inspect(transformed).counts["full"] == 2


def test_earlier_programs_survive_a_capture_that_fails() -> None:
    """Another size, at which the model itself raises."""
    model = Denoiser()
    transformed = lc.transform(model, lc.Policy.deepcache(interval=3))
    plain_step(transformed, **INPUTS)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        plain_step(transformed, **{**INPUTS, "sample": torch.zeros(2, 5)})
    assert_bitwise(plain_step(transformed, **INPUTS), plain_step(model, **INPUTS))
    assert len(transformed._lightcache.runtime.repertoire.compiled) == 1


class _Sampler(nn.Module):
    """Draws from the generator that it is given, or does not."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws = draws

    def forward(self, sample: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        return sample + torch.randn(sample.shape, generator=generator) if self.draws else sample * 2


def test_a_generator_is_passed_by_but_never_ignored() -> None:
    sample = torch.randn(2, 3)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(lc.transform(_Sampler(False).eval())(sample, generator=generator), sample * 2)
    with pytest.raises(lc.errors.CaptureError, match=r"draws random numbers from the torch.Generator"):
        lc.transform(_Sampler(True).eval())(sample, generator=generator)

"""A program fetches what it reads just before, hands on what the next one reads, and sends away what it made."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from golden import check_golden
from graphs import Captured, apply_to, captured, operators
from lightcache_fx import diff, format_graph
from lightcache_fx.boxed import BoxedCodeGen
from lightcache_fx.cuts import depth_cut, module_cut
from lightcache_fx.errors import PassError
from lightcache_fx.extrapolation import COEFFICIENTS
from lightcache_fx.graphs import alias_root, calls, input_of, output_node, outputs, placeholders
from lightcache_fx.liveness import timeline
from lightcache_fx.measure import MeasuredPeak, measure_peak
from lightcache_fx.passes.extrapolate import extrapolate
from lightcache_fx.passes.insert_transfers import LocalStay, MadeSlot, Transfers, insert_transfers
from lightcache_fx.passes.read_cache import read_cache
from lightcache_fx.passes.remove_marks import remove_marks
from lightcache_fx.passes.write_cache import write_cache
from lightcache_fx.swapping import HistoryReads
from lightcache_fx.transfers import OFFLOAD, PREFETCH, RELEASE, WAIT
from toys import Denoiser, latent, prompt

CPU = torch.device("cpu")
WIDE = 64
WEIGHT = 4 * WIDE * WIDE  # bytes of one


class Model(nn.Module):
    """Two layers, and a middle that is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDE, WIDE)
        self.block = nn.SiLU()
        self.last = nn.Linear(WIDE, WIDE)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(self.first(sample)).cos().sin())


torch.manual_seed(0)
MODEL = Model().eval().requires_grad_(False)
X = torch.randn(8, WIDE, generator=torch.Generator().manual_seed(0))


def plain() -> Captured:
    return captured(MODEL, X)


def swapped(given: Captured, transfers: Transfers, others: Mapping[tuple[str, str], torch.Tensor] | None = None):
    return given.apply(partial(insert_transfers, plan=transfers, others=others or {}), keeps_outputs=False)


def cached() -> tuple[Captured, fx.GraphModule]:
    """The capture, and its program that returns the block's result."""
    given = captured(MODEL, X, mark=["block"])
    slots = module_cut(given.facts, ["block"], MODEL).slots
    return given, given.apply(partial(write_cache, slots=slots), remove_marks, keeps_outputs=False)[0]


def stay(name: str, prefetch: str | None, *reads: str, handed_on: bool = False, kind: str = "weight") -> LocalStay:
    return LocalStay(name, kind, prefetch, reads, handed_on)  # type: ignore[arg-type]


FETCHED = Transfers((stay("first.weight", "linear", "linear"), stay("last.weight", "cos", "linear_1")))
OVER = Transfers((stay("last.weight", None, "linear_1"),))
ON = Transfers((stay("first.weight", "linear", "linear", handed_on=True),))
NEXT = Transfers(
    (stay("first.weight", "linear", "linear"), stay("first.weight", "sin", handed_on=True, kind="next"), *OVER.stays)
)
AWAY = Transfers(made=(MadeSlot("slot_0", "sin", handed_on=False),))


def run(given: Captured, graph_module: fx.GraphModule, **copies: torch.Tensor) -> tuple[torch.Tensor, ...]:
    homes = {
        input_of(node).name: torch.zeros(node.meta["val"].shape, dtype=torch.uint8)
        for node in placeholders(graph_module.graph)
        if input_of(node).kind == "home"
    }
    return given.run(graph_module, state={**homes, **{name.replace("_", "."): value for name, value in copies.items()}})


# 1. The docstring's cases -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "transfers"), [("fetched", FETCHED), ("handed_over", OVER), ("handed_on", ON)])
def test_golden(name: str, transfers: Transfers) -> None:
    given = plain()
    after, result = swapped(given, transfers)
    assert result.counts["fetched"] + result.counts["handed over"] == len(transfers.stays)
    check_golden(diff(given.graph_module, after), f"insert_transfers_{name}", __file__)


def test_golden_sent_away() -> None:
    _, before = cached()
    after = fx.GraphModule(before, before.graph)
    text = format_of(after)
    result = apply_to(after, partial(insert_transfers, plan=AWAY), keeps_outputs=False)
    assert result.counts == {"fetched": 0, "handed over": 0, "sent away": 1}
    check_golden("\n".join(changed(text, format_of(after))), "insert_transfers_sent_away", __file__)


def test_golden_for_the_next_model() -> None:
    """Its weight may be named as one of the program's own."""
    given = plain()
    others = {("next", "first.weight"): torch.empty(3, device="meta")}
    after, _ = swapped(given, NEXT, others)
    check_golden(diff(given.graph_module, after), "insert_transfers_next", __file__)
    assert NEXT.copies == ()
    assert NEXT.for_next == ("first.weight",)


class Again(Model):
    """What is cached is read once more at the end, in two ways."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.first(sample))
        return self.last(hidden.cos().sin()) * hidden[:, :1] + hidden


AGAIN = Transfers(
    (LocalStay("slot_0", "slot", "linear_1", ("mul", "add")),), (MadeSlot("slot_0", "cos", handed_on=False),)
)


def read_again() -> tuple[Captured, fx.GraphModule]:
    torch.manual_seed(0)
    model = Again().eval().requires_grad_(False)
    given = captured(model, X, mark=["block"])
    slots = module_cut(given.facts, ["block"], model).slots
    return given, given.apply(partial(write_cache, slots=slots), remove_marks, keeps_outputs=False)[0]


def test_golden_sent_away_and_read_again() -> None:
    given, before = read_again()
    after = fx.GraphModule(before, before.graph)
    text = format_of(after)
    result = apply_to(after, partial(insert_transfers, plan=AGAIN), keeps_outputs=False)
    assert result.counts == {"fetched": 1, "handed over": 0, "sent away": 1}
    check_golden("\n".join(changed(text, format_of(after))), "insert_transfers_read_again", __file__)
    result, gone = run(given, after)
    assert torch.equal(result, given.eager()[0])
    assert torch.equal(gone, F.silu(given.module.first(X)))
    release = next(node for node in calls(after.graph) if node.target is RELEASE)
    made = release.args[1]
    assert max(made.users) is release  # nothing holds it until it comes back


def test_a_slot_that_never_left_is_not_read_again() -> None:
    _, graph_module = read_again()
    with pytest.raises(PassError, match="the program has no slot 'slot_0'; was it planned for another"):
        apply_to(graph_module, partial(insert_transfers, plan=Transfers(AGAIN.stays)), keeps_outputs=False)


def test_golden_of_history() -> None:
    """Its copy is begun by the caller, waited for before the first read, and gone behind the last."""
    model, call = Denoiser(), (latent(0), torch.tensor(900), prompt(0))
    given = captured(model, *call)
    slots = depth_cut(given.facts, 0).slots
    passes = (partial(read_cache, slots=slots), partial(extrapolate, slots=slots, order=2))
    before, _ = given.apply(*passes)
    reads = HistoryReads.of(before.graph, 64)
    assert [(one.name, one.kind, one.prefetch, one.reads) for one in reads.stays] == [
        ("slot_0_before_1", "history", None, ("sub_tensor", "sub_tensor_1")),
        ("slot_0_before_2", "history", None, ("sub_tensor_1",)),
    ]
    assert reads.sizes == (64, 64)
    after, result = given.apply(*passes, partial(insert_transfers, plan=Transfers(reads.stays)))
    assert result.counts == {"fetched": 0, "handed over": 2, "sent away": 0}
    check_golden(diff(before, after), "insert_transfers_history", __file__)
    kinds = {input_of(node).kind for node in placeholders(after.graph)}
    assert "history" not in kinds
    state = {"slot_0": torch.ones(2, 8), COEFFICIENTS: torch.tensor([2.0, 3.0, 1.5, 0.5])}
    state |= {one.name: torch.full((2, 8), 2.0 + place) for place, one in enumerate(reads.stays)}
    assert torch.equal(given.run(after, state=state)[0], given.run(before, state=state)[0])


def format_of(graph_module: fx.GraphModule) -> list[str]:
    return format_graph(graph_module).splitlines()


def changed(before: list[str], after: list[str]) -> list[str]:
    return list(difflib.unified_diff(before, after, "before", "after", lineterm=""))


# 2. Numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_of_what_is_fetched() -> None:
    given = plain()
    after, _ = swapped(given, FETCHED)
    assert torch.equal(run(given, after)[0], given.eager()[0])
    kinds = {input_of(node).name: {str(user.target) for user in node.users} for node in placeholders(after.graph)}
    assert kinds["first.weight"] == kinds["last.weight"] == {"lightcache.prefetch.default"}


def test_numbers_of_what_is_handed_over_and_on() -> None:
    given = plain()
    after, _ = swapped(given, ON)
    result, copy = run(given, after)
    assert torch.equal(result, given.eager()[0])
    assert torch.equal(copy, MODEL.first.weight)
    assert copy.data_ptr() != MODEL.first.weight.data_ptr()
    after, _ = swapped(given, Transfers((stay("first.weight", None, "linear"),)))
    assert torch.equal(run(given, after, first_weight=copy)[0], given.eager()[0])
    assert all(
        input_of(node).kind != "weight" or input_of(node).name != "first.weight" for node in placeholders(after.graph)
    )


def test_numbers_of_what_is_fetched_for_the_next_model() -> None:
    """It comes last, behind what is handed on; none is fetched where none is given."""
    given, weight = plain(), torch.randn(5)
    others = {("next", "decoder.weight"): torch.empty(5)}
    transfers = Transfers((stay("decoder.weight", "sin", handed_on=True, kind="next"), *ON.stays))
    after, _ = swapped(given, transfers, others)
    for there in (weight, torch.empty(0)):
        result, own, copy = run(given, after, decoder_weight=there)
        assert torch.equal(result, given.eager()[0])
        assert torch.equal(own, MODEL.first.weight)
        assert torch.equal(WAIT(copy), there)
        assert copy is not there


def test_numbers_of_what_is_sent_away_fetched_and_handed_on() -> None:
    given, graph_module = cached()
    apply_to(graph_module, partial(insert_transfers, plan=AWAY), keeps_outputs=False)
    result, gone = run(given, graph_module)
    hidden = F.silu(MODEL.first(X))
    assert torch.equal(result, given.eager()[0])
    assert torch.equal(gone, hidden)
    assert gone.data_ptr() != hidden.data_ptr()

    given, graph_module = cached()
    kept = Transfers(made=(MadeSlot("slot_0", "silu", handed_on=True),))
    apply_to(graph_module, partial(insert_transfers, plan=kept), keeps_outputs=False)
    result, gone, here = run(given, graph_module)
    assert torch.equal(gone, hidden)
    assert torch.equal(here, hidden)
    assert here.data_ptr() != gone.data_ptr()


def test_a_slot_that_was_sent_away_comes_back() -> None:
    """The program that reads it: the buffer is an input, of the slot's own type."""
    given, graph_module = cached()
    apply_to(graph_module, partial(insert_transfers, plan=AWAY), keeps_outputs=False)
    _, gone = run(given, graph_module)
    reader = slot_reader()
    transfers = Transfers((stay("h", "sin", "cos", "mul", kind="slot"),))
    after, _ = swapped(reader, transfers)
    assert operators(after)[:3] == ["lightcache.prefetch.default", "aten.sin.default", "lightcache.wait.default"]
    assert torch.equal(reader.run(after, state={"h": gone})[0], X.sin() * gone.cos() * gone)


def slot_reader() -> Captured:
    """A program that reads a slot: made of one whose second argument becomes the slot."""
    given = captured(lambda sample, hidden: sample.sin() * hidden.cos() * hidden, X, X)
    slot = placeholders(given.graph_module.graph)[1]
    slot.meta["lightcache_input"] = type(input_of(slot))("slot", "h", "latent")
    names = {str(node.target): node for node in calls(given.graph_module.graph)}
    assert {"aten.sin.default", "aten.cos.default", "aten.mul.Tensor"} == set(names)
    for node, name in zip(list(calls(given.graph_module.graph)), ("sin", "cos", "mul_0", "mul"), strict=True):
        node.name = name
    return given


# Order --------------------------------------------------------------------------------------------------------------


def test_copies_are_begun_where_planned_and_waited_for_just_before_use() -> None:
    after, _ = swapped(plain(), FETCHED)
    assert [node.name for node in calls(after.graph)] == [
        "first_weight_arriving", "first_weight_here", "linear", "silu", "last_weight_arriving", "cos", "sin",
        "last_weight_here", "linear_1",
    ]  # fmt: skip


def test_copies_that_begin_at_one_place_begin_in_the_order_of_the_plan_and_before_any_wait() -> None:
    names = ["last.weight", "first.bias", "first.weight"]
    reads = {"last.weight": "linear_1", "first.bias": "linear", "first.weight": "linear"}
    after, _ = swapped(plain(), Transfers(tuple(stay(name, "linear", reads[name]) for name in names)))
    assert [node.name for node in calls(after.graph)][:6] == [
        "last_weight_arriving", "first_bias_arriving", "first_weight_arriving", "first_bias_here", "first_weight_here",
        "linear",
    ]  # fmt: skip


def test_a_slot_leaves_right_behind_its_maker_and_is_released_behind_its_last_use() -> None:
    _, graph_module = cached()
    apply_to(graph_module, partial(insert_transfers, plan=AWAY), keeps_outputs=False)
    assert operators(graph_module)[1:6] == [
        "aten.silu.default", "lightcache.offload.default", "aten.cos.default", "aten.sin.default",
        "lightcache.release.default",
    ]  # fmt: skip


@pytest.mark.parametrize("behind", ["topk", "getitem"])
def test_a_slot_that_is_taken_out_of_a_calls_results_is_released_behind_its_offload(behind: str) -> None:
    given = captured(lambda sample: (sample + 1, sample.topk(2)[0]), X)
    graph_module = given.copy()
    slot = outputs(graph_module.graph)[1]
    slot.meta["lightcache_slot"] = "h"
    transfers = Transfers(made=(MadeSlot("h", behind, handed_on=False),))
    apply_to(graph_module, partial(insert_transfers, plan=transfers), keeps_outputs=False)
    names = operators(graph_module)
    assert names.index("lightcache.offload.default") < names.index("lightcache.release.default")
    assert torch.equal(run(given, graph_module)[1], X.topk(2)[0])


def test_a_weight_that_is_fetched_twice() -> None:
    given = captured(Twice().eval(), X)
    assert operators(given.graph_module) == ["aten.linear.default", "aten.sin.default", "aten.linear.default"]
    transfers = Transfers((stay("layer.weight", "linear", "linear"), stay("layer.weight", "linear_1", "linear_1")))
    after, result = swapped(given, transfers)
    assert result.counts["fetched"] == 2
    names = [node.name for node in calls(after.graph)]
    assert names == [
        "layer_weight_arriving", "layer_weight_here", "linear", "sin", "layer_weight_arriving_1", "layer_weight_here_1",
        "linear_1",
    ]  # fmt: skip
    assert torch.equal(run(given, after)[0], given.eager()[0])
    once, _ = swapped(given, Transfers((stay("layer.weight", "linear", "linear", "linear_1"),)))
    assert during(once, "sin") - during(after, "sin") == WEIGHT


def during(graph_module: fx.GraphModule, name: str) -> int:
    """Bytes at the peak of one call."""
    return next(step.peak for step in timeline(graph_module.graph).steps if step.node.name == name)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDE, WIDE)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(sample).sin())


def test_a_weight_that_is_fetched_for_the_next_program() -> None:
    given = captured(nn.Sequential(MODEL.first, nn.SiLU()).eval(), X)
    other = plain()
    val = next(n.meta["val"] for n in placeholders(other.graph_module.graph) if input_of(n).name == "last.weight")
    transfers = Transfers((stay("last.weight", "silu", handed_on=True),))
    after, _ = swapped(given, transfers, {("weight", "last.weight"): val})
    node = placeholders(after.graph)[-1]
    assert (node.name, input_of(node).kind, input_of(node).name) == ("last_weight", "weight", "last.weight")
    assert operators(after) == ["aten.linear.default", "lightcache.prefetch.default", "aten.silu.default"]  # no wait
    copy = outputs(after.graph)[1]
    assert copy.target is PREFETCH
    assert copy.meta["val"].shape == (WIDE, WIDE)


def test_a_copy_that_only_passes_through() -> None:
    given = captured(nn.Sequential(MODEL.first, nn.SiLU()).eval(), X)
    val = torch.empty(WIDE, WIDE, device="meta")
    after, _ = swapped(given, Transfers((stay("last.weight", None, handed_on=True),)), {("weight", "last.weight"): val})
    assert operators(after) == ["aten.linear.default", "aten.silu.default"]
    copy = torch.randn(WIDE, WIDE)
    assert run(given, after, last_weight=copy)[1] is copy


# Views of weights ---------------------------------------------------------------------------------------------------


class Views(nn.Module):
    """One weight, read in five ways: views, a conversion that copies, a reshape that is a view and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(1)))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        first, second = self.weight.t().chunk(2, dim=1)
        flat = self.weight.reshape(-1)
        copied = self.weight.t().reshape(-1)
        double = self.weight.to(torch.float64)
        hidden = sample @ first
        hidden = hidden.sin() @ second.t()
        hidden = hidden + flat[:WIDE] + copied[:WIDE]
        return (hidden.to(torch.float64) @ double).to(torch.float32)


def readers(given: Captured) -> list[str]:
    (weight,) = (n for n in placeholders(given.graph_module.graph) if input_of(n).kind == "weight")
    return [
        node.name
        for node in calls(given.graph_module.graph)
        if alias_root(node) is not weight and any(alias_root(n) is weight for n in node.all_input_nodes)
    ]


def test_views_are_made_again_beside_each_use() -> None:
    given = captured(Views().eval().requires_grad_(False), X)
    names = readers(given)
    targets = {node.name: str(node.target) for node in calls(given.graph_module.graph)}
    assert sorted(targets[name] for name in names) == [
        "aten.add.Tensor", "aten.matmul.default", "aten.matmul.default", "aten.reshape.default", "aten.to.dtype",
    ]  # fmt: skip
    after, _ = swapped(given, Transfers(tuple(stay("weight", name, name) for name in names)))
    assert torch.equal(run(given, after)[0], given.eager()[0])
    (weight,) = (n for n in placeholders(after.graph) if input_of(n).kind == "weight")
    assert {user.target for user in weight.users} == {PREFETCH}
    assert sum(node.target is WAIT for node in calls(after.graph)) == len(names)
    predicted, real = both(given, after)
    assert predicted == real


def test_views_within_one_stay_read_one_copy() -> None:
    given = captured(Views().eval().requires_grad_(False), X)
    names = readers(given)
    after, result = swapped(given, Transfers((stay("weight", names[0], *names),)))
    assert result.counts["fetched"] == 1
    assert torch.equal(run(given, after)[0], given.eager()[0])
    assert all(node.users for node in calls(after.graph))


# Memory: what is predicted is what is measured ----------------------------------------------------------------------


def both(given: Captured, after: fx.GraphModule) -> tuple[int, int]:
    """The predicted and the measured peak of the finished program, its copies handed over as programs do."""
    after.graph.set_codegen(BoxedCodeGen())
    after.recompile()
    return timeline(after.graph).peak_bytes, measured(given, after).peak_bytes


def measured(given: Captured, after: fx.GraphModule) -> MeasuredPeak:
    weights = dict(given.module.named_parameters())

    def call() -> object:
        args: list[torch.Tensor] = []
        for node in placeholders(after.graph):
            kind, name = input_of(node).kind, input_of(node).name
            if kind == "copy":
                args.append(weights[name].detach().clone())
            else:
                args.append(others[node.name])
        with torch.no_grad():
            return after.forward(args)

    others = {
        node.name: X
        if input_of(node).kind == "user"
        else torch.zeros(node.meta["val"].shape, dtype=torch.uint8)
        if input_of(node).kind == "home"
        else weights[input_of(node).name].detach()
        for node in placeholders(after.graph)
        if input_of(node).kind != "copy"
    }
    call()
    return measure_peak(call)


@pytest.mark.parametrize(
    ("transfers", "weights"),
    [
        (FETCHED, 1),
        (Transfers((stay("first.weight", "linear", "linear"), stay("last.weight", "linear", "linear_1"))), 2),
        (OVER, 1),
        (Transfers((stay("first.weight", None, "linear"), stay("last.weight", "cos", "linear_1"))), 1),
        (ON, 1),
        (Transfers((stay("first.weight", None, "linear", handed_on=True),)), 1),
    ],
    ids=["fetched", "both at once", "handed over", "handed over, then fetched", "handed on", "over and on"],
)
def test_the_predicted_peak_is_the_measured_one(transfers: Transfers, weights: int) -> None:
    """Copies count as the program's own, from the first call to their last use."""
    given = plain()
    after, _ = swapped(given, transfers)
    predicted, real = both(given, after)
    assert predicted == real
    assert weights * WEIGHT < predicted < (weights + 0.5) * WEIGHT


def test_what_is_sent_away_is_free_behind_its_release() -> None:
    def model(sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = sample.repeat(4, 1)
        return hidden.sin().sum().exp().repeat(2 * 4 * 8 * WIDE), hidden

    given = captured(model, X)
    size = 4 * 8 * WIDE * 4
    peaks = {}
    for release in ("sin", "repeat_1"):
        graph_module = given.copy()
        outputs(graph_module.graph)[1].meta["lightcache_slot"] = "h"
        transfers = Transfers(made=(MadeSlot("h", release, handed_on=False),))
        apply_to(graph_module, partial(insert_transfers, plan=transfers), keeps_outputs=False)
        predicted, real = both(given, graph_module)
        assert predicted == real
        peaks[release] = predicted
        assert measured(given, graph_module).end_bytes == 2 * size  # the slot itself is not among them
    assert peaks["sin"] == pytest.approx(2 * size, abs=100)
    assert peaks["repeat_1"] == pytest.approx(3 * size, abs=100)


# 3. Where it must not fire ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transfers", [Transfers(), Transfers(made=(MadeSlot("slot_0", None, handed_on=False),))], ids=["none", "resident"]
)
def test_not_without_copies(transfers: Transfers) -> None:
    assert not transfers.moves
    _, graph_module = cached()
    before = format_of(graph_module)
    assert not apply_to(graph_module, partial(insert_transfers, plan=transfers)).modified
    assert format_of(graph_module) == before


def test_other_weights_are_read_as_they_were() -> None:
    given = plain()
    after, _ = swapped(given, ON)
    kept = {input_of(n).name: set(n.users) for n in placeholders(after.graph) if input_of(n).kind == "weight"}
    assert {user.name for user in kept["last.weight"]} == {"linear_1"}
    assert {user.name for user in kept["first.bias"]} == {"linear"}


def test_calls_that_write_stay_though_nobody_reads_them() -> None:
    given = captured(Counting().eval(), X)
    graph_module = given.copy()
    (count,) = (n for n in placeholders(graph_module.graph) if input_of(n).name == "count")
    with graph_module.graph.inserting_before(next(calls(graph_module.graph))):
        written = graph_module.graph.call_function(torch.ops.aten.neg_.default, (count,))
    written.meta["val"] = count.meta["val"]
    apply_to(graph_module, partial(insert_transfers, plan=Transfers((stay("weight", "mul", "mul"),))))
    assert "aten.neg_.default" in operators(graph_module)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDE))
        self.register_buffer("count", torch.ones(WIDE))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * self.weight + self.count


# 4. A second application, and plans of other graphs -----------------------------------------------------------------


@pytest.mark.parametrize(
    "transfers", [FETCHED, OVER, ON, Transfers((stay("first.weight", None, "linear", handed_on=True),))]
)
def test_a_second_application_is_refused(transfers: Transfers) -> None:
    after, _ = swapped(plain(), transfers)
    with pytest.raises(PassError, match="insert_transfers: this graph has transfers already; apply it to a copy"):
        apply_to(after, partial(insert_transfers, plan=transfers), keeps_outputs=False)


def test_a_second_application_of_an_offload_is_refused() -> None:
    _, graph_module = cached()
    apply_to(graph_module, partial(insert_transfers, plan=AWAY), keeps_outputs=False)
    with pytest.raises(PassError, match="this graph has transfers already"):
        apply_to(graph_module, partial(insert_transfers, plan=AWAY), keeps_outputs=False)


@pytest.mark.parametrize(
    ("transfers", "expected"),
    [
        (
            Transfers((stay("absent", "linear", "linear"),)),
            "the program has no weight 'absent'; was it planned for ano",
        ),
        (
            Transfers((stay("h", None, "linear", kind="slot"),)),
            "the program has no slot 'h'; was it planned for another?",
        ),
        (
            Transfers(made=(MadeSlot("h", "sin", handed_on=False),)),
            "the program has no returned slot 'h'; was it plann",
        ),
        (
            Transfers((stay("last.weight", "absent", "linear_1"),)),
            "the graph has no node %absent; was the pass applied",
        ),
        (Transfers((stay("last.weight", "linear", "absent"),)), "the graph has no node %absent; was the pass applied"),
    ],
)
def test_the_plan_of_another_graph_is_refused(transfers: Transfers, expected: str) -> None:
    with pytest.raises(PassError, match=f"^insert_transfers: {expected}".replace("?", r"\?")):
        swapped(plain(), transfers)


def test_invariants_of_what_is_returned() -> None:
    """The model's outputs first, then slots, then copies; what is handed on in the order of the stays."""
    given, graph_module = cached()
    transfers = Transfers(
        (
            stay("last.weight", "linear", "linear_1", handed_on=True),
            stay("first.weight", None, "linear", handed_on=True),
        ),
        (MadeSlot("slot_0", "sin", handed_on=True),),
    )
    assert transfers.copies == ("last.weight", "first.weight", "slot_0")
    apply_to(graph_module, partial(insert_transfers, plan=transfers), keeps_outputs=False)
    names = [node.name for node in outputs(graph_module.graph)]
    assert names == ["linear_1", "silu_gone", "last_weight_here", "first_weight_here", "silu"]
    assert [n.target for n in output_node(graph_module.graph).all_input_nodes[1:3]] == [RELEASE, WAIT]
    results = run(given, graph_module, first_weight=MODEL.first.weight.clone())
    expected = [given.eager()[0], F.silu(MODEL.first(X)), MODEL.last.weight, MODEL.first.weight, F.silu(MODEL.first(X))]
    assert all(map(torch.equal, results, expected))
    assert next(n for n in calls(graph_module.graph) if n.target is OFFLOAD).args[2] == "slot_0"

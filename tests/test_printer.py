"""The printer: golden prints of small exported programs, and that nothing but the graph reaches the text."""

import dataclasses
import enum
import io
import operator
import re

import pytest
import torch
from rich.console import Console
from torch import fx, nn
from torch.nn import functional as F

from golden import check_golden
from lightcache_fx.errors import ArgumentError
from lightcache_fx.printer import diff, format_dtype, format_graph, format_type, print_diff


class ConvNet(nn.Module):
    """A convolution in a submodule of its own, a buffer, and an activation written in the root's forward."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Dropout(0.5))
        self.register_buffer("scale", torch.ones(4, 1, 1))

    def forward(self, x):
        return F.silu(self.head(x)) * self.scale


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(8, 24, bias=False)

    def forward(self, x, *, mask=None):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return {"out": out.transpose(1, 2).flatten(2), "keys": k}


class Function(nn.Module):
    """A module around a function, because export takes modules."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def export(module, *args, dynamic=None, **kwargs):
    module = module if isinstance(module, nn.Module) else Function(module)
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, kwargs, strict=False, dynamic_shapes=dynamic)
    return program.graph_module


def several_outputs(x):
    values, indices = torch.topk(x, 2)
    left, right = torch.split(x, [1, 3], dim=1)
    return values, (indices, left > 0), [right, None, 2]


def views(x):
    transposed = x.t()
    every_other = x[:, ::2]
    image = x.reshape(1, 2, 2, 2).to(memory_format=torch.channels_last)
    return transposed, every_other, image, image.contiguous(), x.expand(3, 2, 4)


def mixed_types(x):
    half = x.to(torch.bfloat16)
    return half * 0.5, half.to(torch.float16), (x > 0), x.to(torch.int8), torch.arange(3), torch.fft.fft(x)


def symbolic(x):
    frames = x.shape[0]
    return x.reshape(frames // 2, 2, 3) + frames, x.transpose(0, 1), torch.cat([x, x[:1]])


@pytest.mark.parametrize(
    ("name", "module", "args"),
    [
        ("conv", ConvNet(), (torch.zeros(1, 3, 8, 8),)),
        ("attention", Attention(), (torch.zeros(2, 5, 8),)),
        ("several_outputs", several_outputs, (torch.zeros(2, 4),)),
        ("views", views, (torch.zeros(2, 4),)),
        ("mixed_types", mixed_types, (torch.zeros(2, 4),)),
    ],
)
def test_prints_as_recorded(name, module, args):
    check_golden(format_graph(export(module, *args), modules=True), f"printer_{name}", __file__)


def test_prints_symbolic_sizes_as_expressions():
    dynamic = (({0: 2 * torch.export.Dim("pairs", min=2, max=64)},),)
    check_golden(format_graph(export(symbolic, torch.zeros(8, 3), dynamic=dynamic)), "printer_symbolic", __file__)


def test_printing_asks_no_symbol_for_its_value():
    graph_module = export(symbolic, torch.zeros(8, 3), dynamic=(({0: 2 * torch.export.Dim("pairs", min=2, max=64)},),))
    (x,) = (node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder")
    environment = x.fake_mode.shape_env
    guards = len(environment.guards)
    format_graph(graph_module)
    assert len(environment.guards) == guards


def test_two_exports_print_the_same():
    first, second = (format_graph(export(Attention(), torch.zeros(2, 5, 8)), modules=True) for _ in range(2))
    assert first == second


def test_all_carriers_of_a_graph_print_the_same():
    @dataclasses.dataclass
    class Program:
        graph_module: fx.GraphModule

    graph_module = export(ConvNet(), torch.zeros(1, 3, 8, 8))
    text = format_graph(graph_module)
    assert text == format_graph(graph_module.graph) == format_graph(Program(graph_module))


def test_anything_else_is_refused():
    with pytest.raises(
        ArgumentError, match=r"cannot print ConvNet: expected a torch\.fx\.Graph, .* must be captured first"
    ):
        format_graph(ConvNet())
    with pytest.raises(ArgumentError, match="cannot print int"):
        diff(export(ConvNet(), torch.zeros(1, 3, 8, 8)), 3)


class Shade(enum.Enum):
    DARK = 1


class Plain:
    pass


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        (None, "none"),
        (True, "True"),
        (3, "3"),
        (1e-05, "1e-05"),
        (float("-inf"), "-inf"),
        (2 + 1j, "(2+1j)"),
        ("gelu", "'gelu'"),
        (..., "..."),
        (torch.bfloat16, "bf16"),
        (torch.float8_e4m3fnuz, "float8_e4m3fnuz"),
        (torch.device("cuda", 1), "cuda:1"),
        (torch.channels_last, "channels_last"),
        (torch.strided, "strided"),
        (slice(None, 3, None), "slice(none, 3, none)"),
        ([1, [2, None]], "[1, [2, none]]"),
        ((1,), "(1,)"),
        ((), "()"),
        ({"b": 1, "a": torch.float32}, "{'b': 1, 'a': f32}"),
        (Shade.DARK, "Shade.DARK"),
        (torch.zeros(2, 3), "<Tensor f32[2,3]>"),
        (torch.ops.aten.add.Tensor, "aten.add.Tensor"),
        (torch.ops.aten.add, "aten.add"),
        (torch.ops.higher_order.cond, "cond"),
        (torch.relu, "relu"),
        (operator.mul, "mul"),
        (int, "int"),
        (Plain(), "<Plain>"),
        (nn.Linear(1, 1), "<Linear>"),
        (torch.Generator(), "<Generator>"),
    ],
)
def test_arguments(argument, text):
    graph = fx.Graph()
    node = graph.placeholder("x")
    call = graph.call_function(torch.relu, (node,))
    object.__setattr__(call, "_args", (node, argument))  # past fx's own check, which refuses some of these
    object.__setattr__(call, "_kwargs", {"key": argument})
    graph.output(call)
    assert format_graph(graph).splitlines()[1] == f"%relu = relu(%x, {text}, key={text})"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.empty(2, 3), "f32[2,3]"),
        (torch.empty(()), "f32[]"),
        (torch.empty(0, 3).t(), "f32[3,0]"),
        (torch.empty(2, 8).t(), "f32[8,2]{stride 1,8}"),
        (torch.empty(1, 8).t(), "f32[8,1]"),  # a dimension of size 1 has no stride to speak of
        (torch.empty(4).expand(3, 4), "f32[3,4]{stride 0,1}"),
        (torch.empty(2, 4, 8, 8, memory_format=torch.channels_last), "f32[2,4,8,8]{channels_last}"),
        (torch.empty(2, 4, 2, 8, 8, memory_format=torch.channels_last_3d), "f32[2,4,2,8,8]{channels_last_3d}"),
        (torch.eye(3).to_sparse(), "f32[3,3]{sparse_coo}"),
        ([torch.empty(2), (torch.empty(1, dtype=torch.bool), None)], "(f32[2], (b8[1], none))"),
        (None, "none"),
        (3, "int"),
        (True, "bool"),
        (0.5, "float"),
    ],
)
def test_types(value, text):
    assert format_type(value) == text


def test_short_dtypes_are_distinct():
    dtypes = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    assert len({format_dtype(dtype) for dtype in dtypes}) == len(dtypes)
    assert [format_dtype(d) for d in (torch.half, torch.double, torch.uint8, torch.long)] == ["f16", "f64", "u8", "i64"]


def test_a_bound_input_prints_its_kind_and_name():
    @dataclasses.dataclass(frozen=True)
    class Binding:
        kind: str
        name: str

    graph = fx.Graph()
    for name, kind, outside in (("w", "weight", "conv.weight"), ("s", "slot", "cut.0")):
        node = graph.placeholder(name)
        node.meta = {"val": torch.empty(2), "lightcache_input": Binding(kind, outside)}
    graph.placeholder("y", default_value=2)
    graph.output(())
    assert format_graph(graph).splitlines() == [
        '%w : f32[2] = weight "conv.weight"',
        '%s : f32[2] = slot "cut.0"',
        "%y = placeholder(2)",
        "return ()",
    ]


def test_submodules_attributes_and_methods_print_by_name():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2))
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return (self.block(x) + self.weight).view(-1, 1)

    assert format_graph(fx.symbolic_trace(Root())).splitlines() == [
        "%x = placeholder",
        '%block_0 = module "block.0"(%x)',
        '%weight = attribute "weight"',
        "%add = add(%block_0, %weight)",
        "%view = method view(%add, -1, 1)",
        "return %view",
    ]


def test_no_address_or_path_is_printed():
    graph = export(ConvNet(), torch.zeros(1, 3, 8, 8)).graph
    node = next(iter(graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)))
    for argument in (Plain(), lambda x: x, Plain().__init__, nn.Linear(1, 1), torch.zeros(2), torch.Generator(), io):
        object.__setattr__(node, "_args", (*node.args, argument))
    text = format_graph(graph, modules=True)
    assert "<Plain>" in text
    assert re.search(r"0x[0-9a-f]{4,}|/\w+/| at ", text) is None


def without_dropout(graph_module):
    """A pass of the smallest kind, and a second graph to compare."""
    copy = fx.GraphModule(graph_module, fx.Graph())
    values = {}
    copy.graph.output(copy.graph.graph_copy(graph_module.graph, values))
    for before, after in values.items():
        after.meta = dict(before.meta)
    for node in copy.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default):
        node.replace_all_uses_with(node.args[0])
        copy.graph.erase_node(node)
    return copy


def test_diff_shows_what_a_pass_did_and_nothing_else():
    before = export(ConvNet(), torch.zeros(1, 3, 8, 8))
    text = diff(before, without_dropout(before))
    check_golden(text, "printer_diff", __file__)
    changed = [line for line in text.splitlines()[2:] if line[0] in "-+"]
    # One node is gone and its one user reads another value; every other node keeps its name and its line.
    assert [line.split(" ")[0] for line in changed] == ["-%dropout", "-%silu", "+%silu"]


def test_diff_of_equal_graphs_is_empty():
    assert diff(*(export(Attention(), torch.zeros(2, 5, 8)) for _ in range(2))) == ""


def test_diff_takes_names_and_context():
    before = export(ConvNet(), torch.zeros(1, 3, 8, 8))
    lines = diff(before, without_dropout(before), names=("full", "reuse"), context=0, modules=True).splitlines()
    assert lines[:2] == ["--- full", "+++ reuse"]
    assert lines[3].startswith("-%dropout")
    assert lines[3].endswith("# head.1")


def shown(before, after, *, colours=False):
    stream = io.StringIO()
    console = Console(file=stream, width=40, force_terminal=colours, color_system="standard" if colours else None)
    print_diff(before, after, console, names=("full", "reuse"))
    return stream.getvalue()


def test_the_terminal_view_is_the_diff_under_a_count():
    before = export(ConvNet(), torch.zeros(1, 3, 8, 8))
    after = without_dropout(before)
    first, *lines = shown(before, after).splitlines()
    assert first == "full → reuse: 2 removed, 1 added"
    assert lines == diff(before, after).splitlines()[2:]
    assert shown(before, before) == "full → reuse: the same program\n"


def test_the_terminal_view_colours_removed_and_added_lines():
    before = export(ConvNet(), torch.zeros(1, 3, 8, 8))
    coloured = shown(before, without_dropout(before), colours=True)
    assert "\x1b[31m-%dropout" in coloured
    assert "\x1b[32m+%silu" in coloured

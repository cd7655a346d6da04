"""Weights stay in the files that they were downloaded as: bound, not read, and not copied."""

from __future__ import annotations

import gc
import json
import os
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn

import lightcache_fx as lc
from lightcache_fx import mapped
from lightcache_fx.errors import SwapError, WeightFileError
from lightcache_fx.homes import Homes
from lightcache_fx.mapped import is_mapped, map_weights
from lightcache_fx.measure import measure_peak
from lightcache_fx.module import runtime_of
from lightcache_fx.module_state import weight_slots
from lightcache_fx.transfers import PREFETCH, WAIT, recorded_copies

CPU = torch.device("cpu")
UNET: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


class Tied(nn.Module):
    """An embedding that is the output layer's weight too, as text encoders have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.tie_weights()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("positions", torch.arange(4), persistent=False)

    def tie_weights(self) -> None:
        self.head.weight = self.embed.weight


def on_meta(kind: type[nn.Module], *args: object, **options: object) -> nn.Module:
    with torch.device("meta"):
        return kind(*args, **options)


def saved(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def linear(path: Path, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Path]:
    """A model and the file that it was saved to."""
    model = nn.Linear(3, 2).to(dtype)
    save_file({name: weight.detach() for name, weight in model.named_parameters()}, path / "model.safetensors")
    return model, path / "model.safetensors"


def assert_same(module: nn.Module, other: nn.Module) -> None:
    mine, its = module.state_dict(), other.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_it_is_part_of_the_package() -> None:
    assert lc.map_weights is map_weights


@pytest.mark.parametrize("sharded", [False, True])
def test_a_diffusers_folder(tmp_path: Path, sharded: bool) -> None:
    model = diffusers.UNet2DModel(**UNET).eval()
    model.save_pretrained(tmp_path, max_shard_size="200KB" if sharded else "1GB")
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == sharded
    with init_empty_weights():
        empty = diffusers.UNet2DModel.from_config(diffusers.UNet2DModel.load_config(tmp_path)).eval()
    assert map_weights(empty, tmp_path) is empty
    assert_same(empty, model)
    assert all(map(is_mapped, empty.parameters()))
    sample = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        found = empty(sample, 3).sample
        for parameter, mapped in zip(model.parameters(), empty.parameters(), strict=True):
            parameter.data = aligned_like(mapped, parameter)
        assert torch.equal(found, model(sample, 3).sample)


def aligned_like(mapped: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A copy that begins where the mapped one does in its cache line: some kernels sum in an order by that."""
    memory = torch.empty(value.nbytes + 128, dtype=torch.uint8)
    begin = (mapped.data_ptr() - memory.data_ptr()) % 64
    return memory[begin : begin + value.nbytes].view(value.dtype).view(value.shape).copy_(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_dtypes_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model, path = linear(tmp_path, dtype)
    empty = map_weights(on_meta(nn.Linear, 3, 2), path)
    assert empty.weight.dtype == dtype
    assert torch.equal(empty.weight.view(torch.uint8), model.weight.view(torch.uint8))
    assert isinstance(empty.weight, nn.Parameter)
    assert empty.weight.requires_grad


def test_nothing_is_allocated_and_nothing_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", weight=torch.ones(1000, 1000), bias=torch.ones(1000))
    empty = on_meta(nn.Linear, 1000, 1000)
    assert measure_peak(lambda: map_weights(empty, path)).peak_bytes == 0
    assert resident_bytes(path) < 2**21
    assert empty.weight.sum() == 1e6
    assert resident_bytes(path) > 3 * 2**20


def resident_bytes(path: Path) -> int:
    """Of a mapped file, what is in this process's memory."""
    _, *mappings = Path("/proc/self/smaps").read_text(encoding="utf-8").split(f" {path}\n")
    assert mappings
    return sum(int(re.search(r"^Rss: +(\d+) kB", mapping, re.MULTILINE)[1]) * 1024 for mapping in mappings)


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """What safetensors' own mapping is refused for: it counts as memory that could be written to."""
    rows = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 2**20 + 1
    header = {"weight": {"dtype": "U8", "shape": [rows, 2**20], "data_offsets": [0, rows * 2**20]}}
    text = json.dumps(header).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * 2**20)  # a hole
        file.seek(-1, os.SEEK_END)
        file.write(b"\7")
    with torch.device("meta"):
        model = nn.Module()
        model.register_buffer("weight", torch.empty(rows, 2**20, dtype=torch.uint8))
    map_weights(model, path)
    assert model.weight[-1, -2:].tolist() == [0, 7]


def test_tied_weights_stay_tied_and_need_be_there_once(tmp_path: Path) -> None:
    embed = torch.randn(5, 4)
    path = saved(tmp_path / "m.safetensors", **{"embed.weight": embed, "scale": torch.full((1,), 2.0)})
    model = Tied()
    map_weights(model, path)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, embed)
    assert model.scale.item() == 2
    assert model.positions.tolist() == [0, 1, 2, 3]


def test_what_is_written_to_a_weight_is_not_written_to_its_file(tmp_path: Path) -> None:
    model, path = linear(tmp_path)
    mapped_model = map_weights(on_meta(nn.Linear, 3, 2), path)
    with torch.no_grad():
        mapped_model.weight.add_(1)  # an adapter that is fused
    assert torch.equal(WAIT(PREFETCH(mapped_model.weight, CPU, "w")), model.weight + 1)
    assert_same(map_weights(nn.Linear(3, 2), path), model)


def test_a_mapping_ends_with_its_last_tensor(tmp_path: Path) -> None:
    _, path = linear(tmp_path)
    model = map_weights(on_meta(nn.Linear, 3, 2), path)
    kept = model.bias.detach()[1:]
    del model
    gc.collect()
    assert is_mapped(kept)
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    del kept
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len(mapped._FILES) == 0


# As homes -----------------------------------------------------------------------------------------------------------


def test_they_are_at_home(tmp_path: Path) -> None:
    model, path = linear(tmp_path)
    empty = map_weights(on_meta(nn.Linear, 3, 2), path)
    homes = Homes(weight_slots(empty), "disk", tmp_path)
    places = [weight.data_ptr() for weight in empty.parameters()]
    assert homes.adopt(["weight", "bias"]) == 0
    assert homes.num_bytes == 0
    assert all(map(homes.is_home, empty.parameters()))
    for name in ("weight", "bias"):
        assert torch.equal(WAIT(PREFETCH(getattr(empty, name), CPU, name)), getattr(model, name))
    with homes.all_present(CPU):
        assert not any(map(is_mapped, empty.parameters()))
        assert_same(empty, model)
    homes.recall(CPU)
    assert places == [weight.data_ptr() for weight in empty.parameters()]


def test_a_model_runs_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half the memory of its weights, which are copied to the device only, and never to an arena."""
    monkeypatch.setenv("LIGHTCACHE_FX_CACHE", str(tmp_path))
    layers = [nn.Linear(128, 128) for _ in range(6)]
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    path = saved(tmp_path / "m.safetensors", **model.state_dict())
    empty = map_weights(on_meta(nn.Sequential, *(nn.Linear(128, 128) for _ in range(6))), path)
    fast = lc.transform(empty.eval().requires_grad_(False), lc.Policy(swap=lc.Swap(budget="50%")))
    sample = torch.randn(2, 128)
    with recorded_copies() as log:
        assert torch.equal(fast(sample), model(sample))
    assert {copy.name for copy in log.copies} >= {f"{index}.weight" for index in range(6)}
    assert runtime_of(fast).homes.num_bytes == 0
    assert all(map(is_mapped, empty.parameters()))


def test_one_whose_data_is_replaced_is_not(tmp_path: Path) -> None:
    _, path = linear(tmp_path)
    empty = map_weights(on_meta(nn.Linear, 3, 2), path)
    empty.weight.data = torch.ones(2, 3)
    homes = Homes(weight_slots(empty), "disk", tmp_path)
    assert homes.adopt(["weight", "bias"]) == 24
    assert torch.equal(WAIT(PREFETCH(empty.weight, CPU, "w")), torch.ones(2, 3))


def test_a_file_that_is_truncated_later(tmp_path: Path) -> None:
    _, path = linear(tmp_path)
    empty = map_weights(on_meta(nn.Linear, 3, 2), path)
    content = path.read_bytes()
    os.truncate(path, 10)
    expected = (
        f"cannot copy weight (24 B) to the device: {path} has been truncated to 10 B, expected {len(content)} B: put"
        " the file back, then map the weights again; it is intact where it was"
    )
    with pytest.raises(SwapError, match=f"^{re.escape(expected)}$"):
        WAIT(PREFETCH(empty.weight, CPU, "weight"))


def test_a_file_that_is_removed_is_still_read(tmp_path: Path) -> None:
    model, path = linear(tmp_path)
    empty = map_weights(on_meta(nn.Linear, 3, 2), path)
    path.unlink()
    assert torch.equal(WAIT(PREFETCH(empty.weight, CPU, "w")), model.weight)


# Refused ------------------------------------------------------------------------------------------------------------


def refused(module: nn.Module, path: Path) -> str:
    before = {name: (table[key], id(table[key])) for name, (table, key) in weight_slots(module).items()}
    with pytest.raises(WeightFileError) as raised:
        map_weights(module, path)
    after = {name: (table[key], id(table[key])) for name, (table, key) in weight_slots(module).items()}
    assert {name: place for name, (_, place) in before.items()} == {name: place for name, (_, place) in after.items()}
    gc.collect()
    return str(raised.value).replace(str(path), "PATH").replace(str(path.parent), "PARENT")


def test_no_file(tmp_path: Path) -> None:
    assert refused(nn.Linear(3, 2), tmp_path / "absent") == "no such file or folder: PATH"


def test_wrong_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", wieght=torch.ones(2, 3), bias=torch.ones(2), other=torch.ones(1))
    assert refused(nn.Linear(3, 2), path) == (
        "PATH does not hold the weights of Linear (1 missing, 2 unexpected): it has no 'weight'; did you mean 'wieght'?"
        "; the model has no 'other'; the model has no 'wieght'; did you mean 'weight'?"
    )


def test_wrong_shapes(tmp_path: Path) -> None:
    _, path = linear(tmp_path)
    assert refused(nn.Linear(4, 2), path) == (
        "PATH does not hold the weights of Linear (wrong shapes): 'weight' has shape [2, 3] there, expected [2, 4]"
    )


def test_a_tied_weight_that_is_not_there_at_all(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", scale=torch.ones(1))
    assert refused(Tied(), path) == (
        "PATH does not hold the weights of Tied (2 missing, 0 unexpected): it has no 'embed.weight'; it has no"
        " 'head.weight'; if its weights are tied, call tie_weights() first"
    )


def test_buffers_that_no_file_holds(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", **{"embed.weight": torch.ones(5, 4), "scale": torch.ones(1)})
    assert refused(on_meta(Tied), path) == (
        "no file holds these buffers of Tied, which are on the meta device: positions; make the model with its"
        " parameters only there (accelerate.init_empty_weights() does), or set them before"
    )
    with init_empty_weights():
        model = Tied()
    assert "it has no 'head.weight'; if its weights are tied" in refused(model, path)  # accelerate unties them
    model.tie_weights()
    assert map_weights(model, path).positions.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "PATH is not a safetensors file: "),
        (b"\xff" * 100, "PATH is not a safetensors file: "),
        (b"\2\0\0\0\0\0\0\0[]", "PATH is not a safetensors file: AttributeError"),
        (b"\7\0\0\0\0\0\0\0" + b'{"w":1}', "PATH is not a safetensors file: TypeError"),
    ],
    ids=["empty", "noise", "no header", "no entry"],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert refused(nn.Linear(3, 2), path).startswith(expected)


def with_header(path: Path, **entry: object) -> Path:
    text = json.dumps({"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **entry}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    return path


def test_damaged_headers(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 2, bias=False), tmp_path / "m.safetensors"
    assert "'weight' has offsets 0 to 20 for shape (2, 3)" in refused(model, with_header(path, data_offsets=[0, 20]))
    assert "'weight' has offsets -4 to 20 for shape" in refused(model, with_header(path, data_offsets=[-4, 20]))
    unknown = refused(model, with_header(path, dtype="F4"))
    assert unknown == "PATH: 'weight' has dtype F4, which is not supported"
    assert map_weights(model, with_header(path)).weight.tolist() == [[0.0] * 3] * 2


def test_a_download_that_was_cut_short(tmp_path: Path) -> None:
    _, path = linear(tmp_path)
    size = path.stat().st_size
    os.truncate(path, size - 4)
    assert refused(nn.Linear(3, 2), path) == (f"PATH is cut short: it has {size - 4} B of {size} B; get it again")


def test_folders(tmp_path: Path) -> None:
    model, path = linear(tmp_path)
    assert_same(map_weights(nn.Linear(3, 2), tmp_path), model)
    path.rename(tmp_path / "model.fp16.safetensors")
    assert_same(map_weights(nn.Linear(3, 2), tmp_path), model)  # the only one
    saved(tmp_path / "model.safetensors", weight=torch.ones(2, 3), bias=torch.ones(2))
    assert map_weights(nn.Linear(3, 2), tmp_path).bias.tolist() == [1, 1]  # the one without a variant
    saved(tmp_path / "adapter.safetensors", weight=torch.ones(2, 3))
    assert refused(nn.Linear(3, 2), tmp_path) == (
        "PATH holds several sets of weights: adapter.safetensors, model.fp16.safetensors, model.safetensors; pass the"
        " path of one of them"
    )
    assert_same(map_weights(nn.Linear(3, 2), tmp_path / "model.fp16.safetensors"), model)


def test_folders_without(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    assert refused(nn.Linear(3, 2), tmp_path) == (
        "PATH holds no .safetensors file (it holds unet); pass a model's own folder, such as 'unet', or save it by"
        " save_pretrained(..., safe_serialization=True)"
    )
    assert "(it holds nothing)" in refused(nn.Linear(3, 2), tmp_path / "unet")


def test_indexes(tmp_path: Path) -> None:
    saved(tmp_path / "a-1.safetensors", weight=torch.ones(2, 3))
    saved(tmp_path / "a-2.safetensors", bias=torch.ones(2))
    index = tmp_path / "a.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "a-1.safetensors", "bias": "a-2.safetensors"}}))
    for path in (tmp_path, index):
        assert map_weights(on_meta(nn.Linear, 3, 2), path).bias.tolist() == [1, 1]
    (tmp_path / "a-2.safetensors").unlink()
    assert refused(nn.Linear(3, 2), index) == (
        "a.safetensors.index.json lists files that are not in PARENT: a-2.safetensors"
    )
    index.write_text("{}")
    assert refused(nn.Linear(3, 2), index) == "PATH is not an index of safetensors files: KeyError('weight_map')"

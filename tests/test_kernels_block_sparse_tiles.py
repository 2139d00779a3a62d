"""The data of tiles: what each GPU gets, and what it needs of registers and shared memory."""

from __future__ import annotations

import json

import pytest
import torch

from attnctl.kernels.block_sparse import tiles
from attnctl.kernels.block_sparse.tiles import OTHER, Tiles, gluon_stages, gpu_name, tiles_for


@pytest.fixture
def data(monkeypatch, tmp_path):
    def put(content):
        file = tmp_path / "tiles.json"
        file.write_text(json.dumps(content))
        monkeypatch.setattr(tiles, "FILE", file)
        tiles._data.cache_clear()

    yield put
    tiles._data.cache_clear()


def test_a_measured_gpu_gets_its_own_and_others_the_rest(data):
    own = {"m": 64, "n": 64, "warps": 4, "stages": 3, "descriptors": True, "registers": 200}
    other = {"m": 128, "n": 32, "warps": 8, "stages": 2}
    small = {"m": 32, "n": 32, "warps": 2, "stages": 1}
    table = {"sm90": {"128": own}, OTHER: {"64": small, "256": other}, "float32": {"256": small}}
    data({"triton": table, "gluon": {"sm90": {"64": {"stages": 5}}}})
    half = torch.float16
    assert tiles_for(128, 128, half, "sm90") == tiles_for(16, 128, half, "sm90") == Tiles(**own)
    assert tiles_for(128, 128, half, "sm86") == Tiles(**other)
    assert tiles_for(64, 128, half, "sm86") == Tiles(**small)
    assert tiles_for(128, 128, torch.float32, "sm90") == Tiles(**small)
    assert tiles_for(128, 64, half, "sm86") == Tiles(64, 32, 4, 2)  # no larger than the block
    assert gluon_stages() == {64: 5}


@pytest.mark.parametrize("gpu", ["sm80", "sm86", "sm90", "sm120"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shipped_tiles_divide_the_block_and_fit(gpu, dtype):
    room = {"sm80": 163, "sm90": 227}.get(gpu, 99) * 1024
    for width in (16, 32, 64, 128, 256):
        for block in (32, 64, 128, 256):
            found = tiles_for(width, block, dtype, gpu)
            assert block % found.m == block % found.n == 0
            held = (found.m + 2 * found.n * found.stages) * width * dtype.itemsize
            assert held <= room
            assert gpu == "sm90" or not found.descriptors


def test_names_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert gpu_name(torch.device("cuda:0")) == "sm120"
    assert gpu_name(torch.device("cpu")) == OTHER

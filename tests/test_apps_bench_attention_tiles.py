"""The tuner of tiles: what it tries, what it lets through, what it writes."""

from __future__ import annotations

import json

import pytest
import torch

from attnctl.apps.bench import attention_tiles
from attnctl.apps.bench.attention_cases import CASES, Case
from attnctl.apps.bench.attention_tiles import candidates, choose, main, name, written
from attnctl.kernels import BlockMask
from attnctl.kernels.block_sparse.reference import block_sparse_reference
from attnctl.kernels.block_sparse.tiles import FILE, OTHER, Tiles

torch.set_num_threads(1)
RIGHT, WRONG, LARGE = Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(128, 128, 8, 3)


def test_what_passes_is_timed_and_the_best_is_written(tmp_path, monkeypatch, capsys):
    def run(q, k, v, mask, tiles):
        if tiles == LARGE:
            raise RuntimeError("out of resource: shared memory")
        out, lse = block_sparse_reference(q, k, v, mask, q.shape[-1] ** -0.5)
        return (out + 0.01 if tiles == WRONG else out), lse

    monkeypatch.setattr(attention_tiles, "_run", run)
    monkeypatch.setattr(attention_tiles, "candidates", lambda *_: [WRONG, LARGE, RIGHT])
    for n in (100, 200):
        mask = BlockMask.full(n, n, 32)
        monkeypatch.setitem(CASES, f"n{n}", Case(f"n{n}", 1, 16, lambda mask=mask: mask))
    words = ["--case", "n100", "--case", "n200", "--device", "cpu", "--rounds", "1"]
    main([*words, "--beside", "reference,gluon", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "n100: 32x32 w4 s2: wrong" in said and "128x128 w8 s3: RuntimeError: out of" in said
    assert "n200: 64x32 w4 s2:" in said and "n200: 32x32" not in said
    assert "gluon: backend 'gluon' cannot run here" in said
    record = json.loads((tmp_path / "tiles-measured.json").read_text())
    assert record["widths"]["16"]["best"] == "64x32 w4 s2"
    assert set(record["widths"]["16"]["others"]["reference"]) == {"n100", "n200"}
    made, shipped = (json.loads(f.read_text()) for f in (tmp_path / "tiles.json", FILE))
    own = made["triton"][OTHER].pop("16")
    assert own == {"m": 64, "n": 32, "warps": 4, "stages": 2} and made == shipped


def test_the_best_has_the_lowest_geometric_mean_of_those_on_all_cases():
    found = {"a": {"x": 1.0, "y": 8.0}, "b": {"x": 2.0, "y": 3.0}, "c": {"x": 0.5}}
    assert choose(found) == "b"


@pytest.mark.parametrize("width", [64, 128])
def test_candidates_are_told_apart_by_their_names(width):
    tries = candidates(width, True)
    assert len({name(tiles) for tiles in tries}) == len(tries)
    assert any(tiles.descriptors for tiles in tries)
    assert not any(tiles.descriptors for tiles in candidates(width, False))


def test_the_shipped_file_is_as_the_tuner_writes_it():
    text = FILE.read_text()
    assert written(json.loads(text)) == text

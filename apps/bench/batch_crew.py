"""A batch by several processes beside the same batch by one: each item once, and equal?

    python -P -m attnctl.apps.bench.batch_crew --processes 2 --items 24 --out crew.json

Runs `attnctl batch` alone, and under `accelerate launch` with a GPU for each process (on a machine
without, all share the CPU). To read: how many items each process noted, whether every item is
noted once, and how many pictures are equal byte for byte; if some are not, by how much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attnctl.lines import read_lines

from .batch_folder import different, levels, noted, results

__all__ = ["compare"]

CONTROL = "softpag:scale=1,u=0.25"


def compare(root: Path, processes: int, items: int, steps: int, batch: int) -> dict[str, Any]:
    """Run a batch both ways in a folder and return how the outcomes compare.

    Args:
        root: folder to work in.
        processes: of the second run.
        items: pictures.
        steps: of a picture.
        batch: drawn at once.

    Raises:
        subprocess.CalledProcessError: if a run fails.
    """
    (root / "jobs.csv").write_text(
        f'prompt,seed\na red circle and a blue square,"0-{items - 1}"\n'
    )
    words = ["-m", "attnctl.apps.cli", "batch", "jobs.csv", "--control", CONTROL]
    words += ["--steps", str(steps), "--batch", str(batch)]
    seconds = {"one": _run(root, [*words, "--out", "one"])}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    seconds["crew"] = _run(root, [*launch, *words, "--out", "crew"])
    return {"seconds": seconds, **_compared(root / "one", root / "crew", items)}


def _run(root: Path, words: Sequence[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-P", *words], cwd=root, check=True)
    return round(time.perf_counter() - begin, 1)


def _compared(one: Path, crew: Path, items: int) -> dict[str, Any]:
    names, files = noted(crew), (results(one), results(crew))
    apart = different(*files)
    manifests = sorted(crew.glob("manifest*.jsonl"), key=lambda path: (len(path.name), path.name))
    shared = [name for name in apart if name in files[0] and name in files[1]]
    return {
        "shares": [len(read_lines(path)) for path in manifests],
        "each item once": len(names) == len(set(names)) == items,
        "equal": sum(name not in apart for name in files[0]),
        "different": len(apart),
        "largest difference in 255": max((levels(one / n, crew / n) for n in shared), default=0),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, action="append", help="drawn at once; several times")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    data: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "processes": given.processes,
        "items": given.items,
        "steps": given.steps,
    }
    for batch in given.batch or [1]:
        with tempfile.TemporaryDirectory() as root:
            found = compare(Path(root), given.processes, given.items, given.steps, batch)
        data[f"batch {batch}"] = found
        if given.out:  # after every run: the next may fail
            given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()

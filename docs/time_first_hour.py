"""Times a newcomer's path from a clone: install, first picture, real-checkpoint code, own control.

    python -P docs/time_first_hour.py --work /tmp/newcomer --out docs/measured/runs/first-hour.json

Clones this repository into an empty folder, makes a new environment there and runs, one after the
other: the README's command, taken from the README; `examples/two_line_patch_real.py` as it is,
with the shipped tiny-sd3 in a folder that has the checkpoint's name, since nothing is downloaded
here but packages (so this times everything but the download and the size of the model); the
tutorial's `examples/own_control.py`. Prints seconds by the clock and of CPU time, which tells how
far other work on the machine disturbed. Needs a package index, or a cache of its packages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_COMMAND = re.compile(r"^## Draw the first picture\n.*?```bash\n(.*?)\n```", re.M | re.DOTALL)
_MODEL = re.compile(r'^MODEL = "(.*)"$', re.MULTILINE)


def readme_command(readme: str) -> list[str]:
    """Return the parts of the README's command that draws the first picture."""
    found = _COMMAND.search(readme)
    if found is None:
        raise SystemExit("README.md has no command under 'Draw the first picture'")
    return found[1].split(" && ")


def timed(what: str, command: list[str] | str, cwd: Path) -> dict[str, Any]:
    """Run a command and return its seconds."""
    begin, before = time.perf_counter(), _cpu()
    subprocess.run(command, cwd=cwd, shell=isinstance(command, str), check=True)
    line = {"what": what, "seconds": time.perf_counter() - begin, "cpu_seconds": _cpu() - before}
    clock, cpu = line["seconds"], line["cpu_seconds"]
    print(f"{what:32} {clock:6.1f} s, {cpu:6.1f} s of CPU time", flush=True)
    return {key: round(v, 1) if isinstance(v, float) else v for key, v in line.items()}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def path(work: Path) -> list[dict[str, Any]]:
    """Walk the path in an empty folder; return the seconds of every part."""
    clone = work / "attnctl"
    lines = [timed("clone", ["git", "clone", "-q", str(ROOT), str(clone)], work)]
    venv, install, draw = readme_command((clone / "README.md").read_text("utf-8"))
    lines.append(timed("new environment", venv, clone))
    lines.append(timed("install", install, clone))
    lines.append(timed("first picture", draw, clone))
    real = (clone / "examples" / "two_line_patch_real.py").read_text("utf-8")
    name = _MODEL.search(real)
    assert name is not None
    shutil.copytree(clone / "assets" / "tiny-sd3", work / name[1])
    python = str(clone / ".venv" / "bin" / "python")
    example = [python, str(clone / "examples" / "two_line_patch_real.py"), "real.png"]
    lines.append(timed("real-checkpoint code, stand-in", example, work))
    own = [python, str(clone / "examples" / "own_control.py"), "own.png"]
    lines.append(timed("own control, the tutorial's", own, work))
    for file in (clone / "first.png", work / "real.png", work / "own.png"):
        assert file.stat().st_size > 1000, file
    return lines


def main() -> None:
    """Walk the path and print the times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if any(given.work.iterdir()):
        raise SystemExit(f"{given.work} is not empty")
    lines = path(given.work.resolve())
    total = round(sum(line["seconds"] for line in lines), 1)
    cpu = round(sum(line["cpu_seconds"] for line in lines), 1)
    print(f"{'in all':32} {total:6.1f} s, {cpu:6.1f} s of CPU time")
    if given.out:
        machine = {"cores": os.cpu_count(), "python": platform.python_version()}
        load = {"load": round(os.getloadavg()[2], 1)}  # processes that wanted a core meanwhile
        data = {**machine, **load, "parts": lines, "seconds": total, "cpu_seconds": cpu}
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

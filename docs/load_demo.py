"""Many clients at once on a running demo: what they are told, and how the server's memory grows.

    python -P docs/load_demo.py --url http://127.0.0.1:7860 --pid PID --clients 50 --seconds 60

Every client asks for pictures of two steps, one after the other. They share an address,
so start the server with `--per-minute 100000`, which leaves the queue as the only bound. Needs
httpx, which gradio brings.
"""

from __future__ import annotations

import argparse
import collections
import json
import threading
import time
from pathlib import Path

import httpx

ASK = ["tiny-sd", "a red circle", "softpag", "", 0, 2, 3, 0, 0, 0]


def one(client: httpx.Client, url: str) -> str:
    """Ask for one picture; return what came of it in a few words."""
    asked = client.post(f"{url}/gradio_api/call/draw", json={"data": ASK})
    if asked.status_code != 200:
        return f"{asked.status_code}: {asked.text[:80]}"
    event = asked.json()["event_id"]
    said = client.get(f"{url}/gradio_api/call/draw/{event}").text
    if "event: complete" in said:
        return "a picture"
    data = said.rpartition("data: ")[2].strip()
    return str((json.loads(data) or {}).get("error", said))[:80] if data else said[-80:]


def memory(pid: int) -> int:
    """Return the resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10


def main() -> None:
    """Run the clients and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    outcomes: collections.Counter[str] = collections.Counter()

    def visit() -> None:
        with httpx.Client(timeout=300) as client:
            while time.monotonic() < end:
                try:
                    said = one(client, args.url)
                except httpx.HTTPError as error:
                    said = type(error).__name__
                outcomes[said] += 1
                if said != "a picture":
                    time.sleep(1)

    before = memory(args.pid)
    threads = [threading.Thread(target=visit) for _ in range(args.clients)]
    for thread in threads:
        thread.start()
    most = before
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        now = memory(args.pid)
        most = max(most, now)
    for said, times in outcomes.most_common():
        print(f"{times:5} {said}")
    print(f"memory: {before} MiB before, {most} at most, {now} after")


if __name__ == "__main__":
    main()

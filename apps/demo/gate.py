"""What stands before the page: bounds on the size and the number of a visitor's requests."""

from __future__ import annotations

import collections
import json
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .limits import Limits

__all__ = ["Gate"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_WINDOW = 60.0
_LIGHT = 20
"""Requests that run no model, such as edits of the stack, are as many times as cheap."""


class Gate:
    """ASGI middleware.

    A visitor is an address; behind a proxy that is the address which uvicorn takes from the
    forwarded headers of a proxy on this machine.

    Args:
        app: what it stands before.
        limits: of the page.
        heavy: says whether the function of a number runs a model.
        waiting: returns how many runs of a visitor wait.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        heavy: Callable[[int], bool],
        waiting: Callable[[str], int],
    ) -> None:
        self.app, self.limits, self.heavy, self.waiting = app, limits, heavy, waiting
        self._times: dict[tuple[str, bool], collections.deque[float]] = {}
        self._lock = threading.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with the reason why not."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        path, client = str(scope["path"]), _client(scope)
        upload = "/upload" in path
        if upload:
            body = b""
        else:
            whole = await _whole(receive, self.limits.body_bytes)
            if whole is None:
                most = self.limits.body_bytes
                await _refuse(send, 413, f"the request is too large: at most {most} bytes")
                return
            body = whole
        data = _json(body)
        reason = self._reason(client, upload or "/call/" in path or self._runs(data))
        if reason is not None:
            await _refuse(send, 429, reason)
        elif _far(data):
            await _refuse(send, 400, "files are uploaded, not named by an address")
        elif upload:
            # a form has a little more than the file; gradio counts the file itself
            await self._bounded(scope, receive, send, self.limits.upload_bytes + 2**14)
        else:
            await self.app(scope, _replay(body, receive), send)

    def _runs(self, data: Any) -> bool:
        number = data.get("fn_index") if isinstance(data, dict) else None
        return isinstance(number, int) and self.heavy(number)

    def _reason(self, client: str, heavy: bool) -> str | None:
        """Return why a visitor has to wait, None if not."""
        most = self.limits.per_minute * (1 if heavy else _LIGHT)
        if not self._admit((client, heavy), most):
            return f"too many requests: at most {most} a minute; wait a little"
        if heavy and self.waiting(client) >= self.limits.at_once:
            return f"{self.limits.at_once} of your runs wait already; wait for one to end"
        return None

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, most: int) -> None:
        if _length(scope) > most:
            await _refuse(send, 413, f"the file is too large: at most {most >> 20} MiB")
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            return message if seen <= most else {"type": "http.disconnect"}

        await self.app(scope, counted, send)

    def _admit(self, visitor: tuple[str, bool], most: int) -> bool:
        """Whether a visitor has not asked too often within the last minute."""
        now = time.monotonic()
        with self._lock:
            if len(self._times) > 10_000:  # forget those who are gone
                alive = self._times.items()
                self._times = {k: v for k, v in alive if v and now - v[-1] < _WINDOW}
            times = self._times.setdefault(visitor, collections.deque())
            while times and now - times[0] > _WINDOW:
                times.popleft()
            if len(times) >= most:
                return False
            times.append(now)
            return True


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _length(scope: Scope) -> int:
    for key, value in scope["headers"]:
        if key == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


async def _whole(receive: Receive, most: int) -> bytes | None:
    """Return the body of a request, None if it is too long."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _json(body: bytes) -> Any:
    try:
        return json.loads(body or b"null")
    except (ValueError, RecursionError):
        return None  # the page refuses it itself


def _far(value: Any) -> bool:
    """Whether data hold an address, or the content itself, in place of an uploaded file."""
    if isinstance(value, dict):
        path, url = str(value.get("path") or ""), str(value.get("url") or "")
        far = "://" in path or path.startswith("data:") or url.startswith("data:")
        return far or any(map(_far, value.values()))
    return isinstance(value, list) and any(map(_far, value))


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

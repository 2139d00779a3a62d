"""A small reverse proxy that shows a server below a path, as nginx and the like do.

    python -P -m attnctl.testing.proxy --to http://127.0.0.1:7860 --prefix /apps/attnctl

It takes the prefix off, hands the host on, and passes answers on piece by piece, so that streams
of events arrive. What is asked for outside of the prefix it answers with 404 and notes: a page
that works here leaves nothing in `Proxy.outside`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import http.server
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

__all__ = ["Proxy", "shown_below"]

_HOP = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length")
)
"""Headers between two neighbours, which a proxy does not hand on."""
_PIECE = 2**16
_GONE = BrokenPipeError, ConnectionResetError, http.client.IncompleteRead
"""One of both sides has left in the middle of a stream."""


class Proxy(http.server.ThreadingHTTPServer):
    """The server.

    Args:
        to: address of the server behind it, http only.
        prefix: path below which that is shown.
        port: 0 for a free one.

    Attributes:
        outside: paths outside of the prefix that were asked for.
        failed: (status, path) of answers of the server that were errors.
        seen: number of requests below the prefix.
    """

    daemon_threads = True

    def __init__(self, to: str, prefix: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.to, self.prefix = urllib.parse.urlsplit(to).netloc, prefix.rstrip("/")
        self.outside: list[str] = []
        self.failed: list[tuple[int, str]] = []
        self.seen = 0

    @property
    def url(self) -> str:
        """Where the page is shown."""
        return f"http://127.0.0.1:{self.server_address[1]}{self.prefix}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Passes one request on."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass(self) -> None:
        proxy, path = self.server, self.path
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if not path.startswith(proxy.prefix + "/"):
            proxy.outside.append(path)
            self.log_message("outside of the path: %s", path)
            self.send_error(404)
            return
        proxy.seen += 1
        sent = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        sent["X-Forwarded-For"] = self.client_address[0]
        sent["X-Forwarded-Proto"] = "http"
        behind = http.client.HTTPConnection(proxy.to)
        try:
            behind.request(self.command, path.removeprefix(proxy.prefix), body, sent)
            answer = behind.getresponse()
            if answer.status >= 400:
                proxy.failed.append((answer.status, path))
                self.log_message("%s: %s", answer.status, path)
            with contextlib.suppress(*_GONE):
                self._hand_on(answer)
        except ConnectionRefusedError:
            self.send_error(502)
        finally:
            behind.close()

    def _hand_on(self, answer: http.client.HTTPResponse) -> None:
        length = answer.getheader("content-length")
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in _HOP:
                self.send_header(key, value)
        if length is None:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", length)
        self.end_headers()
        while self.command != "HEAD" and (piece := answer.read1(_PIECE)):
            self.wfile.write(piece if length else b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
        if length is None:
            self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = _pass

    def log_request(self, *args: Any) -> None:
        """Say nothing of what works."""


@contextlib.contextmanager
def shown_below(to: str, prefix: str) -> Iterator[Proxy]:
    """Have a server shown below a path for as long as the block lasts."""
    with Proxy(to, prefix) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", default="http://127.0.0.1:7860")
    parser.add_argument("--prefix", default="/apps/attnctl")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    with Proxy(args.to, args.prefix, args.port) as proxy:
        print(f"{proxy.url} shows {args.to}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            proxy.serve_forever()


if __name__ == "__main__":
    main()

"""An HTTP server on loopback that fails as told, with files of its own or in front of another server."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

Fault = Callable[["_Handler", bytes], None]


def status(code: int) -> Fault:
    """An answer without a body."""

    def answer(handler: "_Handler", body: bytes) -> None:
        handler.start(code, 0)

    return answer


def cut(handler: "_Handler", body: bytes) -> None:
    """Half of what was announced, then the end."""
    handler.start(200, len(body))
    handler.wfile.write(body[: len(body) // 2])


def stall(handler: "_Handler", body: bytes) -> None:
    """Half of what was announced, then nothing."""
    cut(handler, body)
    handler.wfile.flush()
    handler.server.over.wait(30)


def trickle(handler: "_Handler", body: bytes) -> None:
    """All of it, in sixteen parts, 0.1 s apart."""
    handler.start(200, len(body))
    for part in range(16):
        handler.wfile.write(body[len(body) * part // 16 : len(body) * (part + 1) // 16])
        handler.server.over.wait(0.1)


class FaultyServer(ThreadingHTTPServer):
    """faults[path] lists what the next requests of that path get; after them come files[path], or upstream's answer."""

    daemon_threads = True

    def __init__(self, upstream: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream  # host:port
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.requests: Counter[str] = Counter()
        self.over = Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests[path] += 1
        code, body = self.content(path)
        faults = self.server.faults.get(path)
        if faults:
            faults.pop(0)(self, body)
        else:
            self.start(code, len(body))
            self.wfile.write(body)

    def content(self, path: str) -> tuple[int, bytes]:
        if self.server.upstream is None:
            return (200 if path in self.server.files else 404), self.server.files.get(path, b"")
        connection = HTTPConnection(self.server.upstream)
        connection.request("GET", self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        return answer.status, answer.read()

    def start(self, code: int, length: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(upstream: str | None = None) -> Iterator[FaultyServer]:
    """A server for a while."""
    with FaultyServer(upstream) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()

"""A real HTTP server on loopback that answers as it is told to: well, late, wrongly, or not at all."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Script:
    """What the server does with each request, in order; the last entry goes on for ever.

    An entry is "ok", "slow", "cut" (closes in the middle of the answer), "drop" (closes at once), "garbage" (no JSON),
    "empty" (JSON of another form), "drip" (a byte now and then), "endless", or a status to answer with.
    """

    def __init__(self, *steps: Any, answer: Callable[[str, dict], Any], retry_after: str | None = None):
        self.steps, self.answer, self.retry_after = list(steps) or ["ok"], answer, retry_after
        self.requests: list[tuple[str, dict, dict]] = []
        self.at_once, self.most = 0, 0
        self.over = threading.Event()
        self._lock = threading.Lock()

    def next(self, path: str, body: dict, headers: dict) -> Any:
        with self._lock:
            self.requests.append((path, body, headers))
            return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]

    @contextlib.contextmanager
    def busy(self):
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        try:
            yield
        finally:
            with self._lock:
                self.at_once -= 1


@contextlib.contextmanager
def serve(script: Script) -> Iterator[str]:
    """The server's address, up to and with /v1, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def flow(self, part: bytes, pause: float):
            self.send_response(200)
            self.send_header("content-length", str(2**40))
            self.end_headers()
            self.close_connection = True
            with contextlib.suppress(OSError):
                while not script.over.is_set():
                    self.wfile.write(part)
                    time.sleep(pause)

        def do_POST(self):
            with script.busy():
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                step = script.next(self.path, body, dict(self.headers))
                time.sleep(0.6 if step == "slow" else 0.02)
                if step == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                status = step if isinstance(step, int) else 200
                if step in ("drip", "endless"):
                    self.flow(b"1" if step == "drip" else b"1" * 2**20, 0.05 if step == "drip" else 0)
                    return
                content = {"garbage": b"<html>busy", "empty": b'{"ok": true}'}.get(step)
                content = json.dumps(script.answer(self.path, body)).encode() if content is None else content
            # No longer counted: whoever has read the answer may ask again before this thread goes on.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                if status != 200 and script.retry_after:
                    self.send_header("retry-after", script.retry_after)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if step == "cut" else content)
            if step == "cut":
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        script.over.set()
        server.shutdown()
        server.server_close()
        thread.join()

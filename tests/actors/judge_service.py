"""A small local server that plays an OpenAI-compatible service, faults included."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # five by default: more questions at once than that find no connection


class Service:
    """Replies with what ``behave`` returns for the body of a question and the number of the try."""

    def __init__(self) -> None:
        self.behave: Callable[[dict[str, Any], int], Reply] = lambda body, tries: (200, completion(-0.5, -1.5))
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                service.bodies.append(body)
                service.keys.append(self.headers["authorization"])
                tries = sum(other == body for other in service.bodies)
                status, reply = service.behave(body, tries)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                with contextlib.suppress(ConnectionError):  # who asked may have been ended meanwhile
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        """Ends the server."""
        self.server.shutdown()
        self.server.server_close()


def completion(yes: float, no: float) -> dict[str, Any]:
    """A reply to a question for the continuation of a text: the log-probabilities of the two labels."""
    top = {" yes": yes, " no": no, " maybe": -9.0}
    return {"id": "1", "choices": [{"text": " yes", "index": 0, "logprobs": {"top_logprobs": [top]}}]}

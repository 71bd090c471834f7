"""A language model provider with prices whose limits the load decides: a stand-in, for its faults only."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUSY = {"error": {"message": "Rate limit reached. Please try again in 1s.", "code": "rate_limit_exceeded"}}
SPENT = {"error": {"message": "You exceeded your current quota.", "code": "insufficient_quota"}}
LIMITED_CALL = 2
"""The call of `/priced` that meets a limit once."""


class Handler(BaseHTTPRequestHandler):
    """`/priced/v1` answers after one refusal for a rate; `/spent/v1` has no quota left."""

    calls = itertools.count(1)
    rows = itertools.count()

    def do_GET(self) -> None:
        """List the one model."""
        self._answer(
            200, {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "us"}]}
        )

    def do_POST(self) -> None:
        """Answer a chat with as many rows as it asks for, or refuse it."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.startswith("/spent"):
            return self._answer(429, SPENT)
        if next(Handler.calls) == LIMITED_CALL:
            return self._answer(429, BUSY)
        wanted = int(body["messages"][-1]["content"].rsplit("Write ", 1)[1].split()[0])
        numbers = [next(Handler.rows) for _ in range(wanted)]
        items = [{"instruction": f"question {number}", "response": f"answer {number}"} for number in numbers]
        message = {"role": "assistant", "content": json.dumps({"items": items})}
        usage = {"prompt_tokens": 1000, "completion_tokens": 2000, "total_tokens": 3000}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        whole = {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": "toy",
            "choices": choices,
            "usage": usage,
        }
        return self._answer(200, whole)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def priced_and_spent() -> Iterator[dict[str, str]]:
    """Run the provider; yields the settings of datagen that name its two endpoints, `priced` and `spent`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    named = {
        f"LLM_{name.upper()}_{key}": value
        for name in ("priced", "spent")
        for key, value in {"BASE_URL": f"{url}/{name}/v1", "API_KEY": "sk-load", "MODEL": "toy"}.items()
    }
    try:
        yield named | {"LLM_PRICED_PRICE_INPUT": "0.5", "LLM_PRICED_PRICE_OUTPUT": "1.5"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)

"""The load test's client notices what it is there to notice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.serving.client import Load, ask, distinct

pytestmark = pytest.mark.loopback


class Flawed(BaseHTTPRequestHandler):
    """Answers with the seed's text; swaps 3 and 4, hangs up on 5, is full for 6."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        seed = json.loads(body)["seed"]
        if seed == 5:
            return
        said = json.dumps({"texts": [f"t{ {3: 4, 4: 3}.get(seed, seed) }"]}).encode()
        self.send_response(429 if seed == 6 else 200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flawed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/generate"
    server.shutdown()
    server.server_close()


def test_swapped_lost_and_refused_answers_are_counted(url: str):
    load = ask(url, ["ba"] * 10, list(range(10)), [f"t{i}" for i in range(10)], 3)
    assert (load.wrong, load.lost, load.statuses) == (2, 1, {200: 8, 429: 1})
    assert load.seconds > 0


def test_quantiles_are_latencies_that_so_many_do_not_exceed():
    load = Load(latencies={200: [i / 1000 for i in range(100, 0, -1)]})
    assert load.quantile(0.5) == pytest.approx(50)
    assert load.quantile(0.99) == pytest.approx(99)
    assert load.quantile(1) == pytest.approx(100)


def test_answers_that_a_swap_would_not_show_are_not_distinct():
    assert distinct(["a", "b", "a", "c"]) == 0.5

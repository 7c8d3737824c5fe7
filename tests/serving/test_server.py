"""The command from outside: statuses, answers, overload, and processes that are killed."""

from __future__ import annotations

import gzip
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from served import Server, free_port, gone, until

from dlmone_fast.errors import EXIT_MODEL, EXIT_PROCESS_LOST, EXIT_USAGE, UsageError
from dlmone_fast.serving.server import bound_sockets

pytestmark = pytest.mark.loopback
TIMEOUT_S = 4.0
IN_FLIGHT = 8
LIMITS = ("--max-batch-size", "4", "--max-queued", "4", "--timeout-s", str(TIMEOUT_S))
# So many rows that the tiny model is at them while its process is killed.
LONG = {"prompts": ["ba"] * 32, "num_candidates": 16, "steps": 16}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    started = Server(log, "--model", str(model), *LIMITS, "--max-body", "20000")
    try:
        yield started.wait()
    finally:
        started.end()


@pytest.fixture
def paused(server: Server) -> Iterator[Server]:
    """Its worker does nothing for the length of a test."""
    worker = server.child("worker")
    worker.suspend()
    yield server
    worker.resume()
    until(lambda: server.metric("dlmone_requests_in_flight") == 0)


def test_answers_are_those_of_generate(server: Server):
    generator = tiny.generator()
    one, several = "ba be", tiny.prompts(5)
    assert server.ask(one) == (200, {"texts": [generator.generate(one)]})
    assert server.ask(several, seed=7) == (200, {"texts": generator.generate(several, seed=7)})
    seeds = [2**64 - 1, 0, 5, 6, 7]
    expected = generator.generate(several, seed=seeds, num_candidates=3, steps=2)
    answer = server.ask(several, seed=seeds, num_candidates=3, steps=2)
    assert answer == (200, {"texts": expected})
    for temperature in (0, 2.5):
        expected = generator.generate(several, seed=7, temperature=temperature)
        assert server.ask(several, seed=7, temperature=temperature) == (200, {"texts": expected})
    long = "ba " * 30
    assert server.ask(long, on_overflow="truncate") == (
        200, {"texts": [generator.generate(long, on_overflow="truncate")]},
    )  # fmt: skip
    assert server.ask([]) == (200, {"texts": []})


def test_no_answer_is_lost_or_swapped_among_many_clients(server: Server):
    generator, prompts = tiny.generator(), tiny.prompts(300)
    settings = [{"num_candidates": 1 + i % 5 // 4, "seed": i} for i in range(300)]

    def ask(i: int) -> tuple[int, object]:
        return server.ask(prompts[i], **settings[i])

    before = server.metric("dlmone_batch_rows_count")
    with ThreadPoolExecutor(IN_FLIGHT) as clients:
        answers = list(clients.map(ask, range(300)))
    for prompt, setting, answer in zip(prompts, settings, answers, strict=True):
        expected = generator.generate([prompt], **setting)
        assert answer == (200, {"texts": expected})
    # Otherwise nothing was shared, and this test would say nothing.
    assert server.metric("dlmone_batch_rows_count") - before < 250


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompts": 3}, "prompts: Input should be a valid list, got 3"),
        ({"prompts": ["ba", None]}, "prompts[1]: Input should be a valid string, got None"),
        ({"prompts": ["ba"] * 33}, "prompts: List should have at most 32 items"),
        ({"prompts": "ba", "seed": -1}, "seed must be a whole number from 0 to"),
        ({"prompts": "ba", "seed": True}, "seed must be a whole number from 0 to"),
        ({"prompts": "ba", "seed": 2**64}, "seed must be a whole number from 0 to"),
        ({"prompts": "ba", "seed": [1, 2]}, "seed holds 2 seeds, expected one a prompt (1)"),
        ({"prompts": "ba", "temperature": 11}, "temperature: Input should be less than"),
        ({"prompts": "ba", "num_candidates": 17}, "num_candidates: Input should be less than"),
        ({"prompts": "ba", "select": "best"}, "select: Input should be 'none' or 'mbr'"),
        ({"prompts": "ba", "sampler": "ddim"}, "sampler: Extra inputs are not permitted"),
        ({"prompts": ["ba"] * 32, "num_candidates": 16}, "is 512, expected at most 256"),
        ({"prompts": "ba", "select": "mbr"}, "needs candidates to choose from, expected num_cand"),
        ({"seed": 1}, "prompts: Field required"),
        ({"prompts": ["ba", "\ud800"]}, "prompts[1]: Input should be a valid string"),
        ({"prompts": ["ba", "ba " * 30]}, "prompts[1]: 32 tokens"),
        ({"prompts": ["ba" * 150]}, "prompts[0]: 300 characters, the limit is 200"),
    ],
)
def test_a_bad_value_is_named_with_the_way_out(server: Server, fields: dict, said: str):
    status, _, answer = server.post(json.dumps(fields).encode())
    assert status == 422
    detail = json.loads(answer)["detail"]
    assert said in detail
    assert re.search(r"; (correct the request|shorten)", detail)


def test_what_is_not_json_is_refused(server: Server):
    for body in (b"", b"{", b'"x"', b"\xff", b"[" * 5000):
        status, _, said = server.post(body)
        assert status in (400, 422), said
        assert json.loads(said)["detail"]


_JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "said"),
    [
        (b'{"prompts": "caf\xe9"}', _JSON, "body: not UTF-8 (invalid continuation byte at"),
        ('{"prompts": "ba"}'.encode("utf-16"), _JSON, "body: not UTF-8"),
        (b"[" * 15000, _JSON, "body: nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", _JSON, "seed: expected a number"),
        (b'{"seed": [1, -' + b"9" * 5000 + b"]}", _JSON, "seed[1]: expected a number"),
        (b'{"steps": ' + b"9" * 5000 + b"}", _JSON, "steps: expected a number"),
        (b"9" * 5000, _JSON, "body: expected a number"),
        (b'{"prompts": "ba"}', {}, "Content-Type: expected application/json, and the header is mi"),
        (b'{"prompts": "ba"}', {"Content-Type": "text/plain"}, "Content-Type: expected applicatio"),
        (b'{"prompts": "ba"}', {"Content-Type": "application/json; charset=latin-1"},
         "Content-Type: expected the charset utf-8, got 'latin-1'"),
        (gzip.compress(b'{"prompts": "ba"}'), {**_JSON, "Content-Encoding": "gzip"},
         "Content-Encoding: expected none"),
        (gzip.compress(b'{"prompts": "ba"}'), _JSON, "body: not UTF-8"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_400_with_the_header_or_field(
    server: Server, body: bytes, headers: dict[str, str], said: str
):
    before = server.metric('dlmone_requests_total{status="400"}')
    status, _, answer = server.send("POST", "/generate", body, headers)
    detail = json.loads(answer)["detail"]
    assert (status, detail[: len(said)]) == (400, said)
    assert detail.endswith("; send JSON in UTF-8 with Content-Type: application/json")
    assert server.metric('dlmone_requests_total{status="400"}') == before + 1


def test_json_may_be_marked_as_unicode_and_as_a_kind_of_json(server: Server):
    expected = (200, {"texts": [tiny.generator().generate("ba")]})
    body = b'\xef\xbb\xbf{"prompts": "ba"}'
    for kind in ("application/json; charset=UTF-8", "application/x+json", "Application/JSON"):
        headers = {"Content-Type": kind, "Content-Encoding": "identity"}
        status, _, answer = server.send("POST", "/generate", body, headers)
        assert (status, json.loads(answer)) == expected


def test_a_seed_of_null_is_a_fresh_one(server: Server):
    answers = [server.ask(["ba be bi bo"] * 4, seed=None) for _ in range(4)]
    assert {status for status, _ in answers} == {200}
    assert len({text for _, answer in answers for text in answer["texts"]}) > 1


def test_head_is_get_without_a_body(server: Server):
    for path in ("/health", "/metrics", "/openapi.json", "/docs"):
        status, headers, body = server.send("HEAD", path)
        assert (status, body) == (200, "")
        assert headers.get("content-type") == server.send("GET", path)[1].get("content-type")
    assert server.send("HEAD", "/generate")[0] == 405
    assert server.send("HEAD", "/nowhere")[0] == 404


def test_a_name_stands_for_every_address_of_it(model: Path, start: Callable[..., Server]):
    server = start("--model", str(model), "--host", "localhost").wait()
    found = socket.getaddrinfo("localhost", server.port, type=socket.SOCK_STREAM)
    for family, _, _, _, address in found:
        with socket.socket(family) as client:
            assert client.connect_ex(address) == 0
    assert_stops_gracefully(server)


@pytest.mark.parametrize("host", ["127.0.0.2", "0.0.0.0", "::1"])
def test_any_address_of_the_machine_is_listened_at(host: str):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        (made,) = bound_sockets(host, free_port())
    except UsageError:
        assert host == "::1"
        pytest.skip("no IPv6 here")
    with made:
        assert made.getsockname()[0] == host


@pytest.mark.parametrize("host", ["192.0.2.1", "", "no-such-host.invalid", "a" * 100, "a\0b"])
def test_a_host_that_is_not_this_machine_s_is_named(host: str):
    with pytest.raises(UsageError, match=r"^--host .*; (name one of its own|the default is)"):
        bound_sockets(host, free_port())


def test_a_port_that_is_taken_at_one_address_of_a_name_leaves_nothing_bound(
    monkeypatch: pytest.MonkeyPatch,
):
    free, port = free_port(), free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        addresses = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", p)) for p in (free, port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        with pytest.raises(UsageError, match=f"--port {port}: localhost cannot be listened at"):
            bound_sockets("localhost", port)
    with socket.socket() as again:
        again.bind(("127.0.0.1", free))


def test_a_body_that_is_too_large_is_refused_with_and_without_a_length(server: Server):
    body = json.dumps({"prompts": ["ba" * 20000]}).encode()
    pieces = (body[i : i + 4096] for i in range(0, len(body), 4096))
    for sent, chunked in ((body, False), (pieces, True)):
        status, headers, said = server.post(sent, encode_chunked=chunked)
        assert status == 413
        assert "at most 20000 bytes" in said
        assert headers["connection"] == "close"


def test_a_full_server_refuses_at_once_and_answers_what_it_accepted(paused: Server):
    with ThreadPoolExecutor(IN_FLIGHT) as clients:
        waiting = [clients.submit(paused.ask, "ba") for _ in range(IN_FLIGHT)]
        until(lambda: paused.metric("dlmone_requests_in_flight") == IN_FLIGHT)
        started = time.perf_counter()
        # Refused before it is read: not even JSON.
        status, headers, said = paused.post(b"{")
        assert time.perf_counter() - started < 0.5
        assert (status, headers["retry-after"]) == (429, "1")
        assert "--max-queued" in said
        paused.child("worker").resume()
        assert {answer.result()[0] for answer in waiting} == {200}
    assert paused.metric('dlmone_requests_total{status="429"}') == 1


def test_time_runs_out_whatever_the_worker_does(paused: Server):
    started = time.perf_counter()
    status, answer = paused.ask("ba")
    assert status == 504
    assert TIMEOUT_S <= time.perf_counter() - started < TIMEOUT_S + 2
    assert answer["detail"].startswith("not answered within 4 s; try again")
    # Nothing of it is left behind.
    assert paused.metric("dlmone_requests_in_flight") == 0


def test_metrics_count_what_happened(server: Server):
    def counted() -> list[float]:
        return [
            server.metric(name)
            for name in (
                'dlmone_requests_total{status="200"}', 'dlmone_requests_total{status="422"}',
                'dlmone_request_seconds_count{status="200"}', "dlmone_prompts_total",
                "dlmone_batch_rows_sum",
            )
        ]  # fmt: skip

    before = counted()
    assert server.ask(["ba", "be", "bi"], num_candidates=2)[0] == 200
    assert server.ask("ba", seed="x")[0] == 422
    now = counted()
    assert [b - a for a, b in zip(before, now, strict=True)] == [1, 1, 1, 3, 6]
    assert server.metric("dlmone_workers_ready") == 1
    assert server.metric("dlmone_queue_depth") == 0


def test_openapi_describes_requests_bounds_and_statuses(server: Server):
    described = json.loads(server.get("/openapi.json")[1])
    route = described["paths"]["/generate"]["post"]
    assert {"200", "400", "413", "422", "429", "500", "503", "504"} <= route["responses"].keys()
    schema = described["components"]["schemas"]["GenerateRequest"]
    assert schema["properties"]["num_candidates"]["maximum"] == 16
    assert schema["properties"]["prompts"]["anyOf"][1]["maxItems"] == 32
    assert schema["required"] == ["prompts"]
    assert all(field.get("description") for field in schema["properties"].values())
    assert "GenerateResponse" in json.dumps(route["responses"]["200"])
    assert server.get("/docs")[0] == 200


def test_a_killed_worker_fails_what_it_had_at_once_and_another_one_serves_the_rest(
    model: Path, start: Callable[..., Server]
):
    server = start("--model", str(model), "--max-rows", "10000", "--timeout-s", "100").wait()
    # That it is up was asked of the worker, by nobody who counts.
    assert server.metric("dlmone_prompts_total") == 0
    assert server.metric("dlmone_batch_rows_count") == 0
    with ThreadPoolExecutor(2) as clients:
        lost = clients.submit(server.ask, **LONG)
        until(lambda: server.metric("dlmone_requests_in_flight") == 1)
        until(lambda: server.metric("dlmone_queue_depth") == 0)
        waiting = clients.submit(server.ask, "ba")
        until(lambda: server.metric("dlmone_queue_depth") == 1)
        killed = time.monotonic()
        server.child("worker").kill()
        status, answer = lost.result(10)
        assert time.monotonic() - killed < 3
        assert (status, answer["detail"][:18]) == (503, "the worker process")
        status, headers, said = server.post(b'{"prompts": "ba"}')
        assert (status, headers["retry-after"]) == (503, "1")
        assert "no worker process is ready" in said
        assert server.get("/health")[0] == 503
        assert waiting.result(120)[0] == 200
    until(lambda: server.ask("ba")[0] == 200)
    assert server.metric("dlmone_requests_lost_with_worker_total") == 1
    assert_stops_gracefully(server)


def assert_stops_gracefully(server: Server) -> None:
    """Told to stop, it lets nobody in and answers what it has accepted."""
    worker = server.child("worker")
    worker.suspend()
    with ThreadPoolExecutor(1) as client:
        last = client.submit(server.ask, ["ba", "be"])
        until(lambda: server.metric("dlmone_requests_in_flight") == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refused(server))
        assert not last.done()
        worker.resume()
        assert server.process.wait(60) == 0, server.log.read_text()
        status, answer = last.result(1)
    assert status == 200
    assert len(answer["texts"]) == 2
    assert "Traceback" not in server.log.read_text()


def refused(server: Server) -> bool:
    """Whether nobody listens."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", server.port)) != 0


@pytest.mark.parametrize("which", ["http", "queues"])
def test_a_server_that_lost_a_process_ends_with_an_error(
    which: str, model: Path, start: Callable[..., Server]
):
    server = start("--model", str(model)).wait()
    worker = server.child("worker")
    server.child(which).kill()
    assert server.process.wait(30) == EXIT_PROCESS_LOST, server.log.read_text()
    assert server.log.read_text().rstrip().endswith("start the server again")
    until(lambda: gone(worker))


def test_a_main_process_that_is_killed_leaves_nobody_listening(
    model: Path, start: Callable[..., Server]
):
    server = start("--model", str(model)).wait()
    left = [server.child(which) for which in ("worker", "queues", "http")]
    server.process.kill()
    until(lambda: all(map(gone, left)))


def test_a_teacher_s_own_steps_bound_a_request(tmp_path: Path, start: Callable[..., Server]):
    teacher = tiny.save(tmp_path / "teacher", kind="teacher")
    server = start("--model", str(teacher), "--max-rows", "6").wait()
    expected = tiny.generator("teacher").generate(["ba", "be"])
    assert server.ask(["ba", "be"]) == (200, {"texts": expected})
    status, answer = server.ask(["ba", "be", "bi"])
    assert status == 422
    assert "steps is 9 (with the model's own 3 steps), expected at most 6" in answer["detail"]


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(
    model: Path, tmp_path: Path, start: Callable[..., Server]
):
    server = start("--model", str(tmp_path / "missing"))
    assert server.process.wait(60) == EXIT_MODEL
    expected = f"{tmp_path}/missing: no such folder (No such file or directory); check the path"
    assert server.log.read_text() == f"error: {expected}\n"


def test_a_port_that_is_taken_and_a_bad_option_are_named(model: Path, start: Callable[..., Server]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        server = start("--model", str(model), "--port", port)
        assert server.process.wait(60) == EXIT_USAGE
    assert f"--port {port}: 127.0.0.1 cannot be listened at" in server.log.read_text()
    server = start("--model", str(model), "--max-batch-size", "0")
    assert server.process.wait(60) == EXIT_USAGE
    assert "--max-batch-size: expected 1 to 4,096, got 0" in server.log.read_text()

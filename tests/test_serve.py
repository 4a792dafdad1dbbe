"""`trace-sdk serve`, asked as its clients do: over a socket, with photos, with none, and with too many at once."""

from __future__ import annotations

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
import uvicorn

from trace_sdk import EdgeDetector, EdgeMap
from trace_sdk.errors import OutOfMemoryError
from trace_sdk.serving.http import EdgeServer, listen

CARS = Path(__file__).parents[1] / "examples/photos/cars.jpg"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from trace_sdk.cli import main; main()", "serve", *map(str, arguments)]


@contextmanager
def running(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address that the command says, and its process."""
    process = subprocess.Popen(
        command("--port", 0, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"Edges at (http://\S+) \((.*)\); Ctrl-C ends it\.", line)
        assert found, line + (process.communicate()[1] if process.poll() is not None else "")
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def in_a_thread(detector: Any, **limits: Any) -> Iterator[str]:
    """A server in this process, around any detector."""
    with listen("127.0.0.1", 0) as on:
        server = uvicorn.Server(uvicorn.Config(EdgeServer(detector, **limits).app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [on]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{on.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def ask(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def wide() -> bytes:
    """A PNG with a side that no JPEG has."""
    file = io.BytesIO()
    PIL.Image.new("L", (65501, 2)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def address(tiny_engine: Path) -> Iterator[str]:
    with running("--engine", tiny_engine) as (found, _):
        yield found


@pytest.fixture(scope="module")
def expected(tiny_engine: Path) -> EdgeMap:
    return EdgeDetector(tiny_engine).run(CARS)


def test_the_picture_is_what_save_writes(address: str, expected: EdgeMap, tmp_path: Path) -> None:
    status, headers, body = ask(address, "/v1/edges", CARS.read_bytes())
    assert status == 200 and headers["content-type"] == "image/png"
    assert body == expected.save(tmp_path / "edges.png").read_bytes()
    stages = re.findall(r"(\w+);dur=[\d.]+", headers["server-timing"])
    assert stages == ["decode", "resize", "network", "resize_back", "draw"]


@pytest.mark.parametrize(
    ("query", "kind"),
    [("draw=thin", "PNG"), ("draw=binary", "PNG"), ("draw=binary&threshold=0.9", "PNG"), ("draw=overlay", "JPEG")],
)
def test_other_drawings(address: str, expected: EdgeMap, query: str, kind: str) -> None:
    status, _, body = ask(address, f"/v1/edges?{query}", CARS.read_bytes())
    picture = PIL.Image.open(io.BytesIO(body))
    assert status == 200 and picture.format == kind
    want = {
        "draw=thin": np.rint(expected.thin() * 255).astype(np.uint8),
        "draw=binary": expected.binary(),
        "draw=binary&threshold=0.9": expected.binary(0.9),
        "draw=overlay": expected.overlay(),
    }[query]
    given = np.asarray(picture)
    assert given.shape == np.asarray(want).shape
    assert np.abs(given.astype(int) - np.asarray(want).astype(int)).mean() < (3 if kind == "JPEG" else 1e-9)


def test_instances_are_those_of_the_edges(address: str, expected: EdgeMap) -> None:
    status, _, body = ask(address, "/v1/instances?threshold=0.4&min_area=200", CARS.read_bytes())
    found = json.loads(body)
    want = expected.instances(0.4, min_area=200).to_coco()
    assert status == 200 and len(found["annotations"]) == len(want["annotations"]) > 1
    assert [a["segmentation"] for a in found["annotations"]] == [a["segmentation"] for a in want["annotations"]]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/edges", b"", 400, "no body.*--data-binary"),
        ("/v1/edges", b"hello", 400, "^photo: is text, not a picture"),
        ("/v1/edges", CARS.read_bytes()[:3000], 400, "truncated|damaged|cut off"),
        ("/v1/edges?draw=neon", b"x", 400, "draw='neon': give probability, thin"),
        ("/v1/edges?thick=1", b"x", 400, "thick is no option here. Known: draw"),
        ("/v1/edges?draw=thin&threshold=0.5", b"x", 400, "threshold is no option"),
        ("/v1/edges?draw=binary&threshold=high", b"x", 400, "threshold='high' is not a number"),
        ("/v1/edges?draw=binary&threshold=nan", CARS.read_bytes(), 400, r"must be in \[0, 1\]"),
        ("/v1/edges?draw=thin&draw=binary", b"x", 400, "draw is given 2 times, as thin, binary. Give it once"),
        ("/v1/edges?draw=overlay", wide(), 400, "A JPEG has at most 65,500 pixels a side, this picture is 65501x2"),
        ("/v1/instances?min_area=2.5", b"x", 400, "min_area='2.5' is not a whole number"),
        ("/v1/instances?min_area=-1", CARS.read_bytes(), 400, "min_area=-1"),
        ("/v1/edges", None, 405, "POST a photo's file"),
        ("/health/live", b"x", 405, "Not Allowed"),
        ("/edges", None, 404, "/edges: Not Found"),
    ],
)
def test_what_is_wrong_is_said(address: str, path: str, body: bytes | None, status: int, message: str) -> None:
    given, headers, answer = ask(address, path, body)
    assert given == status and headers["content-type"] == "application/json"
    assert re.search(message, json.loads(answer)["error"])


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Type": "multipart/form-data; boundary=x"}, "is a form. Send a photo's file: curl --data-binary"),
        ({"Content-Encoding": "gzip"}, r"is packed \(gzip\). Send a photo's file"),
    ],
)
def test_a_body_that_is_more_than_a_file_is_refused(address: str, headers: dict[str, str], message: str) -> None:
    status, _, answer = ask(address, "/v1/edges", CARS.read_bytes(), **headers)
    assert status == 415 and re.search(message, json.loads(answer)["error"])


def test_a_file_that_is_too_large_is_not_read(address: str) -> None:
    status, _, body = ask(address, "/v1/edges", b"\xff\xd8", **{"Content-Length": str(65 << 20)})
    assert status == 413 and "64 MiB" in json.loads(body)["error"]


def test_nor_one_that_does_not_say_how_large_it_is(tiny_engine: Path) -> None:
    with in_a_thread(EdgeDetector(tiny_engine), most_bytes=1 << 20) as address:
        parts = urlsplit(address)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        try:
            connection.request("POST", "/v1/edges", (bytes(100_000) for _ in range(50)), encode_chunked=True)
            status = connection.getresponse().status
        except (BrokenPipeError, ConnectionResetError):
            status = 413  # it said so and hung up while the rest was being sent
        assert status == 413
        assert ask(address, "/v1/edges", CARS.read_bytes())[0] == 200


def test_a_client_that_sends_nothing_is_let_go(tiny_engine: Path) -> None:
    with in_a_thread(EdgeDetector(tiny_engine), most_seconds=0.3) as address:
        status, _, body = ask(address, "/v1/edges", b"\xff\xd8", **{"Content-Length": "5000"})
    assert status == 408 and "after 0.3 s" in json.loads(body)["error"]


def test_what_runs_and_how_it_went(tiny_engine: Path) -> None:
    detector = EdgeDetector(tiny_engine)
    with in_a_thread(detector) as address:
        for body in (CARS.read_bytes(), CARS.read_bytes(), b"no photo"):
            ask(address, "/v1/edges", body)
        assert json.loads(ask(address, "/info")[2])["engine_sha256"] == detector.info["engine_sha256"]
        for health in ("live", "ready"):
            status, _, body = ask(address, f"/health/{health}")
            assert status == 200 and json.loads(body)["provider"] == "CPUExecutionProvider"
        metrics = ask(address, "/metrics")[2].decode()
    assert 'trace_requests_total{path="/v1/edges",status="200"} 2.0' in metrics
    assert 'trace_requests_total{path="/v1/edges",status="400"} 1.0' in metrics
    assert 'trace_seconds_count{stage="network"} 2.0' in metrics and "trace_waiting 0.0" in metrics


def test_many_clients_get_the_serial_answers(address: str) -> None:
    rng = np.random.default_rng(0)
    files = []
    for side in (40, 64, 111):
        file = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 256, (side, 50, 3), np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    alone = [ask(address, "/v1/edges", file)[2] for file in files]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda i: ask(address, "/v1/edges", files[i % 3])[::2], range(60)))
    assert together == [(200, alone[i % 3]) for i in range(60)]


class Slow:
    """A detector that waits until it is let go."""

    def __init__(self, detector: EdgeDetector) -> None:
        self.detector, self.info, self.go, self.error = detector, detector.info, threading.Event(), None

    def run(self, data: bytes) -> EdgeMap:
        self.go.wait(30)
        if self.error:
            raise self.error
        return self.detector.run(data)


def test_a_full_house_turns_away_at_once(tiny_engine: Path) -> None:
    slow = Slow(EdgeDetector(tiny_engine))
    with in_a_thread(slow, most_waiting=2) as address, ThreadPoolExecutor(2) as pool:
        inside = [pool.submit(ask, address, "/v1/edges", CARS.read_bytes()) for _ in range(2)]
        deadline = time.monotonic() + 20
        while b"trace_waiting 2.0" not in ask(address, "/metrics")[2]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        status, headers, body = ask(address, "/v1/edges", CARS.read_bytes())
        assert status == 503 and headers["retry-after"] == "1" and "2 photos are waiting" in json.loads(body)["error"]
        slow.go.set()
        assert [one.result()[0] for one in inside] == [200, 200]
        assert ask(address, "/v1/edges", CARS.read_bytes())[0] == 200


def test_memory_that_ran_out_is_no_fault_of_the_photo(tiny_engine: Path) -> None:
    slow = Slow(EdgeDetector(tiny_engine))
    slow.go.set()
    slow.error = OutOfMemoryError("The GPU's memory is full.")  # type: ignore[assignment]
    with in_a_thread(slow) as address:
        status, headers, body = ask(address, "/v1/edges", CARS.read_bytes())
    assert (status, headers["retry-after"]) == (503, "1") and "memory is full" in json.loads(body)["error"]


def test_what_nobody_thought_of_is_json_and_counted(tiny_engine: Path) -> None:
    slow = Slow(EdgeDetector(tiny_engine))
    slow.go.set()
    slow.error = ZeroDivisionError()  # type: ignore[assignment]
    with in_a_thread(slow) as address:
        status, headers, body = ask(address, "/v1/edges", CARS.read_bytes())
        metrics = ask(address, "/metrics")[2].decode()
    assert (status, headers["content-type"]) == (500, "application/json") and "ZeroDivisionError" in json.loads(body)[
        "error"
    ]
    assert 'trace_requests_total{path="/v1/edges",status="500"} 1.0' in metrics


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_without_a_word_when_it_is_asked_to(tiny_engine: Path, number: signal.Signals) -> None:
    with running("--engine", tiny_engine) as (address, process):
        assert ask(address, "/health/live")[0] == 200
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (0, "")


def test_photos_in_the_house_are_finished(tmp_path: Path) -> None:
    large = io.BytesIO()
    PIL.Image.open(CARS).resize((1500, 1000)).save(large, "JPEG")
    with running("--size", 1024) as (address, process), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, address, "/v1/edges", large.getvalue())
        deadline = time.monotonic() + 20
        while b"trace_waiting 1.0" not in ask(address, "/metrics")[2]:
            assert time.monotonic() < deadline and not answer.done()
        process.send_signal(signal.SIGTERM)
        status, _, body = answer.result()
        assert status == 200 and PIL.Image.open(io.BytesIO(body)).size == (1500, 1000)
        process.communicate(timeout=30)
        assert process.returncode == 0


def test_a_client_that_does_not_read_its_answer_holds_nothing(tiny_engine: Path) -> None:
    large = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 3000, 3), np.uint8)).save(large, "JPEG")
    program = "import trace_sdk.serving.http as http; http.LAST_SECONDS = 1; from trace_sdk.cli import main; main()"
    line = [sys.executable, "-c", program, "serve", "--port", "0", "--engine", str(tiny_engine)]
    with (
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        socket.socket() as client,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(address.rpartition(":")[2])))
        head = f"POST /v1/edges?draw=overlay HTTP/1.1\r\nHost: x\r\nContent-Length: {large.tell()}\r\n\r\n"
        client.sendall(head.encode() + large.getvalue())
        client.recv(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_an_address_that_is_taken(tiny_engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = subprocess.run(command("--port", port, "--engine", tiny_engine), capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert re.match(rf"error: Cannot listen on 127\.0\.0\.1, port {port}: .* --port", ended.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "no.such.host.invalid"), "Cannot listen on no.such.host"),
        (("--host", "a..b"), "Cannot listen on a..b, port 0: no host name"),
        (("--engine", "none.onnx"), "none.onnx"),
    ],
)
def test_what_cannot_start_says_so(arguments: tuple[str, ...], message: str) -> None:
    ended = subprocess.run(command("--port", 0, *arguments), capture_output=True, text=True)
    assert ended.returncode in (1, 2) and message in ended.stderr and "Traceback" not in ended.stderr


def test_without_the_extra_it_names_the_line(tiny_engine: Path) -> None:
    hidden = "import sys; sys.modules['starlette'] = sys.modules['starlette.applications'] = None; "
    line = [sys.executable, "-c", hidden + "from trace_sdk.cli import main; main()", "serve"]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 1 and 'pip install "trace-sdk[serve]"' in ended.stderr


def until(tab: Any, expression: str) -> None:
    """Wait for JavaScript to be true; playwright's own way needs an eval, which the page forbids itself."""
    deadline = time.monotonic() + 20
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


def test_the_page_in_a_browser(address: str, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no photo")
    tab = browser.new_page(viewport={"width": 1000, "height": 800})
    trouble: list[Any] = []
    tab.on("pageerror", lambda error: trouble.append(error))
    tab.goto(address)
    tab.set_input_files("input[type=file]", CARS)
    until(tab, "document.images.length === 2 && [...document.images].every(i => i.complete && i.naturalWidth)")
    sizes = tab.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight])")
    assert sizes[0] == sizes[1] == list(PIL.Image.open(CARS).size)
    first = tab.locator("figure img").nth(1).get_attribute("src")
    tab.locator("select").select_option("thin")
    until(tab, f"document.images[1].src !== {first!r}")
    tab.screenshot(path=str(tmp_path / "page.png"))
    tab.set_input_files("input[type=file]", tmp_path / "notes.jpg")
    until(tab, "document.querySelector('[role=alert]').textContent.includes('not a picture')")
    assert tab.locator("figure img").count() == 0 and address in tab.locator("code").inner_text()
    assert not trouble


def test_an_older_photos_end_is_no_matter_of_a_newer_one(address: str, browser: Any, tmp_path: Path) -> None:
    tab = browser.new_page()
    held: list[Any] = []
    tab.route("**/v1/edges*", lambda route: route.continue_() if held else held.append(route))
    tab.goto(address)
    tab.set_input_files("input[type=file]", CARS)
    deadline = time.monotonic() + 20
    while not held:
        assert time.monotonic() < deadline
        tab.wait_for_timeout(20)
    tab.locator("select").select_option("thin")
    until(tab, "document.images.length === 2")
    held[0].abort()
    tab.wait_for_timeout(200)
    assert tab.locator("figure img").count() == 2 and not tab.locator("[role=alert]").inner_text()

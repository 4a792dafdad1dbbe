"""An HTTP server around one detector: the bytes of a photo in, a picture of its edges or its instances out.

One engine, one process. Photos are read and decoded in threads, the engine works on one at a time, and what would wait
too long is turned away at once, so that a busy server still answers. For GPUs with many clients there is Triton, which
runs photos of several clients together (`trace_sdk.serving.triton`).
"""

from __future__ import annotations

import asyncio
import io
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from importlib.resources import files
from typing import TypeVar

import numpy as np
import PIL.Image

from trace_sdk import __version__
from trace_sdk.detector import EdgeDetector
from trace_sdk.edge_map import EdgeMap
from trace_sdk.errors import ArgumentError, InputError, MissingExtraError, OutOfMemoryError, TraceError, needs_extra
from trace_sdk.machine import usable_cpus
from trace_sdk.pictures import write_jpeg

with needs_extra("serve", "An HTTP server needs"):
    import uvicorn
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.applications import Starlette
    from starlette.datastructures import QueryParams
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route

MOST_BYTES = 64 << 20  # of a photo's file
MOST_SECONDS = 30.0  # that a client may take to send it
MOST_WAITING = 32  # photos in the house, the one in the engine included
LAST_SECONDS = 25  # for what is under way when the server is to end; orchestrators kill after 30
Number = TypeVar("Number", int, float)
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)  # buckets of the histogram


class EdgeServer:
    """The HTTP side of a detector; `app` is the ASGI application.

    POST /v1/edges, a photo's file as the body → a picture as large as the photo; `draw` in the query says which.
    POST /v1/instances, the same → a COCO data set of one image as JSON; `threshold` and `min_area` as
    `EdgeMap.instances` has them. GET / is a page to try it on, /info what runs, /health/live and /health/ready for an
    orchestrator, /metrics for Prometheus. Errors are JSON, {"error": what was wrong and what to do}.
    """

    def __init__(
        self,
        detector: EdgeDetector,
        *,
        most_bytes: int = MOST_BYTES,
        most_seconds: float = MOST_SECONDS,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        self._detector = detector
        self._most_bytes, self._most_seconds, self._most_waiting = most_bytes, most_seconds, most_waiting
        self._waiting = 0
        self._metrics = _Metrics(lambda: self._waiting)
        # Decoding takes a core for each; the engine has threads of its own and takes one photo at a time.
        self._pool = ThreadPoolExecutor(usable_cpus() + 1, thread_name_prefix="trace-http")
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/v1/edges", partial(self._photo, _edges), methods=["POST"]),
                Route("/v1/instances", partial(self._photo, _instances), methods=["POST"]),
                Route("/info", self._info),
                Route("/health/live", self._health),
                Route("/health/ready", self._health),
                Route("/metrics", self._show_metrics),
            ],
            exception_handlers={HTTPException: _no_such, Exception: _failed},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            self._pool.shutdown()

    async def _page(self, request: Request) -> Response:
        page = files("trace_sdk.serving").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; img-src blob:; connect-src 'self'; style-src 'unsafe-inline'; "
        return HTMLResponse(page, headers={"Content-Security-Policy": policy + "script-src 'unsafe-inline'"})

    async def _info(self, request: Request) -> Response:
        return JSONResponse({"trace_sdk": __version__, **self._detector.info})

    async def _health(self, request: Request) -> Response:
        """There is no answer before the engine is warm, so the two are one."""
        info = self._detector.info
        return JSONResponse({"status": "ready", **{name: info[name] for name in ("engine", "device", "provider")}})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _photo(self, asked: Callable[[QueryParams], Draw], request: Request) -> Response:
        """One photo: read, run, draw, and count how it went."""
        start = time.perf_counter()
        response = Response(status_code=500)
        try:
            response = await self._answered(asked(request.query_params), request)
        except HTTPException as error:
            response = _refusal(error.status_code, error.detail)
        except TraceError as error:
            response = _refusal(_status(error), str(error))
        except ClientDisconnect:
            response = Response(status_code=499)
        finally:
            self._metrics.requests.labels(request.url.path, response.status_code).inc()
            self._metrics.seconds.labels("answer").observe(time.perf_counter() - start)
        return response

    async def _answered(self, draw: Draw, request: Request) -> Response:
        if self._waiting >= self._most_waiting:
            raise HTTPException(503, f"{self._waiting} photos are waiting. Ask again in a second.")
        self._waiting += 1
        try:
            data = await self._body(request)
            loop = asyncio.get_running_loop()
            response, timings = await loop.run_in_executor(self._pool, _work, self._detector, data, draw)
        finally:
            self._waiting -= 1
        for stage, milliseconds in timings.items():
            self._metrics.seconds.labels(stage).observe(milliseconds / 1e3)
        response.headers["Server-Timing"] = ", ".join(f"{stage};dur={value:.2f}" for stage, value in timings.items())
        return response

    async def _body(self, request: Request) -> bytes:
        """The photo's file, not a byte more than allowed in memory."""
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, f"The body is a form. {_SEND}, not curl -F.")
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise HTTPException(415, f"The body is packed ({coding}). {_SEND}, as it is.")
        too_large = f"The file is larger than {self._most_bytes >> 20} MiB. Send a smaller one."
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most_bytes:
            raise HTTPException(413, too_large)
        data = bytearray()
        try:
            async with asyncio.timeout(self._most_seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > self._most_bytes:
                        raise HTTPException(413, too_large)
        except TimeoutError:
            too_slow = f"The photo had not arrived after {self._most_seconds:g} s. Send it again."
            raise HTTPException(408, too_slow) from None
        if not data:
            raise HTTPException(400, f"The request has no body. {_SEND} …")
        return bytes(data)


_SEND = "Send a photo's file: curl --data-binary @photo.jpg"
Draw = Callable[[EdgeMap], Response]


class _Photo(io.BytesIO):
    """What a client sent, by the name that errors give it."""

    name = "photo"


def _work(detector: EdgeDetector, data: bytes, draw: Draw) -> tuple[Response, dict[str, float]]:
    """In a thread: the answer to a photo, and ms by stage."""
    edges = detector.run(_Photo(data))
    start = time.perf_counter()
    response = draw(edges)
    timings = {**edges.info["timings"], "draw": (time.perf_counter() - start) * 1e3}
    return response, {stage: value for stage, value in timings.items() if stage != "total"}


def _edges(query: QueryParams) -> Draw:
    """The picture of the edges that a query asks for."""
    draw = query.get("draw", "probability")
    if draw not in ("probability", "thin", "binary", "overlay"):
        raise ArgumentError(f"draw={draw!r}: give probability, thin, binary or overlay.")
    _check(query, "draw", *(["threshold"] if draw == "binary" else []))
    threshold = _number(query, "threshold", float)

    def picture(edges: EdgeMap) -> Response:
        file = io.BytesIO()
        if draw == "overlay":
            write_jpeg(edges.overlay(), file)
            return Response(file.getvalue(), media_type="image/jpeg")
        if draw == "probability":
            edges.write_png(file)
        else:
            lines = edges.binary(threshold) if draw == "binary" else np.rint(edges.thin() * 255).astype(np.uint8)
            PIL.Image.fromarray(lines).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    return picture


def _instances(query: QueryParams) -> Draw:
    """The instances that a query asks for, as a COCO data set."""
    _check(query, "threshold", "min_area")
    threshold, min_area = _number(query, "threshold", float), _number(query, "min_area", int)

    def coco(edges: EdgeMap) -> Response:
        return JSONResponse(edges.instances(threshold, min_area=min_area).to_coco())

    return coco


def _check(query: QueryParams, *known: str) -> None:
    if unknown := sorted(set(query) - set(known)):
        raise ArgumentError(f"{unknown[0]} is no option here. Known: {', '.join(known)}.")
    for name in known:
        if len(values := query.getlist(name)) > 1:
            raise ArgumentError(f"{name} is given {len(values)} times, as {', '.join(values)}. Give it once.")


def _number(query: QueryParams, name: str, kind: Callable[[str], Number]) -> Number | None:
    if name not in query:
        return None
    try:
        return kind(query[name])
    except ValueError:
        whole = "a whole number" if kind is int else "a number"
        raise ArgumentError(f"{name}={query[name]!r} is not {whole}.") from None


def _status(error: TraceError) -> int:
    """What HTTP calls it: the client's fault, too busy, not installed, or ours."""
    if isinstance(error, InputError):
        return 400
    if isinstance(error, OutOfMemoryError):
        return 503
    return 501 if isinstance(error, MissingExtraError) else 500


async def _no_such(request: Request, error: Exception) -> Response:
    """404 and 405 as the other errors are."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. POST a photo's file to /v1/edges; / is a page."
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """What nobody thought of; uvicorn writes it to the log."""
    return _refusal(500, f"The server failed ({type(error).__name__}); its log says how.")


def _refusal(status: int, message: str) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else {}
    return JSONResponse({"error": message}, status_code=status, headers=headers)


class _Metrics:
    """What Prometheus is told of one server."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "trace_requests", "Photos sent, by path and HTTP status.", ["path", "status"], registry=self.registry
        )
        Gauge("trace_waiting", "Photos in the house now.", registry=self.registry).set_function(waiting)
        self.seconds = Histogram(
            "trace_seconds",
            "Seconds a photo spent in each stage; answer: in all.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address, before the engine is opened. Raises ArgumentError if it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:  # the latter of a name that can be none of a host
        reason = getattr(error, "strerror", "no host name")
        raise ArgumentError(
            f"Cannot listen on {host}, port {port}: {reason}. Choose others with --host and --port; port 0 takes a "
            "free one."
        ) from error


def serve(server: EdgeServer, on: socket.socket) -> None:
    """Answer until Ctrl-C or SIGTERM; photos in the house are finished first, for LAST_SECONDS at most."""
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,  # a client that does not read its answer would hold it for ever
    )
    with _ends_quietly():
        uvicorn.Server(config).run(sockets=[on])


@contextmanager
def _ends_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when all is done; for a server it is no accident."""
    ends = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""`trace-sdk serve`: edges over HTTP."""

from __future__ import annotations

import click

from trace_sdk.cli.console import output, status
from trace_sdk.cli.options import engine_options


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one, and says which."
)
@engine_options
def command(host: str, port: int, engine: str | None, device: str, size: int | None) -> None:
    """Answer photos with their edges over HTTP, until Ctrl-C. Its page, for a browser, is at /.

    \b
    Examples:
      trace-sdk serve
      curl --data-binary @street.jpg localhost:8000/v1/edges -o edges.png
      curl --data-binary @street.jpg 'localhost:8000/v1/edges?draw=overlay' -o overlay.jpg
      curl --data-binary @street.jpg 'localhost:8000/v1/instances?threshold=0.5'

    \b
    POST /v1/edges        a PNG; draw=probability (default), thin, binary (threshold=0.3, too), or overlay (a JPEG)
    POST /v1/instances    a COCO data set as JSON; threshold, min_area as of trace-sdk instances
    GET  /info, /health/live, /health/ready, /metrics (Prometheus)

    The body is a photo's file, 64 MiB at most. It asks for no password: leave it on 127.0.0.1, or put a proxy in front.
    For GPUs that many clients share, see trace-sdk deploy triton.
    """
    from trace_sdk.detector import EdgeDetector
    from trace_sdk.serving.http import EdgeServer, listen, serve

    with listen(host, port) as on:
        with status("serve") as note:
            note("opening the engine")
            detector = EdgeDetector(engine, device=device, size=size)
            note("warming up")
            detector.warmup()
        name, number = on.getsockname()[:2]
        address = f"[{name}]" if ":" in name else name
        output.print(
            f"Edges at http://{address}:{number} ({detector.info['engine']} on {detector.info['device']}, "
            f"size {detector.size}); Ctrl-C ends it.",
            markup=False,
            soft_wrap=True,
        )
        serve(EdgeServer(detector), on)

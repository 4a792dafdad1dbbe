"""`trace-sdk info`: what an engine says about itself."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from trace_sdk.cli.console import output


@click.command()
@click.argument("engine", required=False)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N (GPU number N).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts.")
def command(engine: str | None, device: str, as_json: bool) -> None:
    """Show what ENGINE says about itself, after checking that the file is whole.

    ENGINE is an .onnx file, a TensorRT .engine file, or the name of a bundled engine. Of a TensorRT file it tells
    what it was built for, without the GPU. Without ENGINE it is the one that the device gets where none is named:
    trace-nano on a CPU, trace-small on a GPU.

    \b
    Examples:
      trace-sdk info
      trace-sdk info my-engine.onnx --json

    \b
    Exit code: 0 fine, 1 the engine is missing, corrupt or foreign, 2 wrong usage
    """
    from trace_sdk.engines import default_engine, open_engine, read_engine
    from trace_sdk.engines.manifest import Manifest, verify_seal
    from trace_sdk.engines.model_proto import read_metadata
    from trace_sdk.engines.plan import MAGIC, unpack
    from trace_sdk.errors import DeviceError

    model, source = read_engine(engine or default_engine(device)[0])
    facts: dict[str, Any] = {"file": source, "bytes": len(model)}
    if model.startswith(MAGIC):
        manifest, built, _, facts["sha256"] = unpack(model, source)
        facts |= {"built": asdict(built)}
    else:
        try:
            opened = open_engine(engine, device)
        except DeviceError as error:
            if device != "auto":
                raise
            facts |= {"sha256": verify_seal(model, source), "device": f"none here ({error})"}
            manifest = Manifest.from_metadata(read_metadata(model, source), source)
        else:
            manifest = opened.manifest
            for name in ("sha256", "engine_reason", "device", "device_reason", "provider"):
                facts[name] = getattr(opened, name)
    facts |= asdict(manifest)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    table = Table(title=f"{manifest.name} (sha256 verified)", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, escape(_shown(key, value)))
    output.print(table)


def _shown(key: str, value: Any) -> str:
    if key == "bytes":
        return f"{value:,} ({value / 2**20:.1f} MiB)"
    if isinstance(value, dict):
        return "\n".join(f"{name}: {_shown(name, item)}" for name, item in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)

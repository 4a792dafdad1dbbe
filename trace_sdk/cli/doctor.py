"""`trace-sdk doctor`: what works on this machine, and what each missing part would add."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from trace_sdk.cli.console import FAILED, output, status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts and bug reports.")
def command(as_json: bool) -> None:
    """Try what is installed: each provider of onnxruntime with a model of one node, the engines that come with the
    package, and which extras are complete. Says what each missing one would add and how to get it.

    \b
    Examples:
      trace-sdk doctor
      trace-sdk doctor --json > doctor.json

    \b
    Exit code: 0 the engines that come with the package answer, 1 one of them does not
    """
    from trace_sdk.doctor import examine
    from trace_sdk.errors import OutputError
    from trace_sdk.machine import cache_folder, hardware, versions

    packages = ("trace-sdk", "onnxruntime", "onnxruntime-gpu", "numpy", "pillow", "torch", "cuda-bindings", "tensorrt")
    try:
        cache = str(cache_folder())
    except OutputError as error:
        cache = f"none ({error})"
    about: dict[str, Any] = {**hardware(), **versions(packages), "cache": cache}
    findings = []
    with status("doctor") as note:
        for finding in examine():
            note(finding.name)
            findings.append(finding)
    if as_json:
        click.echo(json.dumps({"machine": about, "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        output.print(", ".join(f"{name} {value}" for name, value in about.items()), markup=False, soft_wrap=True)
        table = Table("", "", "", show_header=False)
        table.columns[1].no_wrap = True
        table.columns[2].overflow = "fold"
        for one in findings:
            table.add_row("yes" if one.works else "no", f"{one.kind} {one.name}", escape(one.detail))
        output.print(table)
    if not all(one.works for one in findings if one.kind == "engine"):
        raise click.exceptions.Exit(FAILED)

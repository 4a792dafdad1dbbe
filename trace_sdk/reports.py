"""What reports share: what made their figures, and Markdown."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trace_sdk import __version__
from trace_sdk.machine import commit, hardware


def made_by() -> dict[str, Any]:
    """Version, commit, hardware, command line and time of this run."""
    return {
        "trace_sdk": __version__,
        "commit": commit(),
        "hardware": hardware(),
        "command": shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def markdown_list(facts: Mapping[str, Any]) -> list[str]:
    """A line a fact: `* name: value`."""
    return [
        f"* {name}: {', '.join(f'{key} {item}' for key, item in value.items()) if isinstance(value, dict) else value}"
        for name, value in facts.items()
    ]

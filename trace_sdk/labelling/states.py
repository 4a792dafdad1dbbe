"""What has become of each image, told by files beside each other: so any process of any machine can ask.

LABELS/a/b.jpg.npz      done: the label
LABELS/a/b.jpg.png      its picture, if asked for
LABELS/a/b.jpg.failed   failed: the reason, one line
neither                 pending
LABELS/manifest.jsonl   all of them in one file, written last
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from trace_sdk.atomic import remove, remove_unfinished, write_text

DONE, FAILED, PENDING = "done", "failed", "pending"
MANIFEST = "manifest.jsonl"


def label_file(labels: Path, name: str) -> Path:
    """Where the label of an image lies: a/b.jpg → LABELS/a/b.jpg.npz."""
    return labels / f"{name}.npz"


def plot_file(labels: Path, name: str) -> Path:
    """Where the picture of a label lies: a/b.jpg → LABELS/a/b.jpg.png."""
    return labels / f"{name}.png"


def state(labels: Path, name: str) -> str:
    """ "done", "failed" or "pending"."""
    if label_file(labels, name).is_file():
        return DONE
    return FAILED if _failure_file(labels, name).is_file() else PENDING


def failure(labels: Path, name: str) -> str:
    """Why an image failed, "" if it did not."""
    file = _failure_file(labels, name)
    return file.read_text().strip() if state(labels, name) == FAILED else ""


def record_failure(labels: Path, name: str, reason: str) -> None:
    """Say why there will be no label."""
    write_text(_failure_file(labels, name), f"{reason}\n")


def forget_failures(labels: Path, names: Iterable[str]) -> None:
    """Make failed images pending again. Raises OutputError if the folder cannot be written to."""
    for name in names:
        remove(_failure_file(labels, name))


def write_manifest(labels: Path, names: Iterable[str]) -> dict[str, str]:
    """One line of JSON an image, in the order given; the reason of each that failed is returned, too."""
    lines, reasons = [], {}
    for name in names:
        line = {"image": name, "state": state(labels, name)}
        if line["state"] == FAILED:
            line["reason"] = reasons[name] = failure(labels, name)
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_text(labels / MANIFEST, "".join(lines))
    return reasons


def remove_leftovers(labels: Path, names: Iterable[str]) -> None:
    """Remove what killed writers left. Raises OutputError if the folder cannot be written to."""
    files = ((label_file(labels, name), plot_file(labels, name), _failure_file(labels, name)) for name in names)
    remove_unfinished([labels / MANIFEST, *chain.from_iterable(files)])


def _failure_file(labels: Path, name: str) -> Path:
    return labels / f"{name}.failed"

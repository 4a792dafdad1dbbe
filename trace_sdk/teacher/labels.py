"""Label files: one `.npz` an image, and one `labels.json` that says how the folder was made."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trace_sdk.atomic import write_bytes, write_text
from trace_sdk.errors import ArgumentError, DatasetError
from trace_sdk.teacher.teacher import Annotation, TeacherSettings

INDEX = "labels.json"
CLAIMS = ".claims"  # of those at work in the folder


@dataclass(frozen=True)
class Label:
    """A stored annotation: `labels` int8 [H, W] (1, 0, −1), `abdiv` float32 [H, W], and how they came about."""

    labels: NDArray[np.int8]
    abdiv: NDArray[np.float32]
    about: dict[str, Any]


def save_label(file: Path, annotation: Annotation) -> None:
    """Write one label file, whole or not at all. Times are left out: equal inputs give equal bytes."""
    about = {
        "rule": annotation.rule,
        "timesteps": annotation.timesteps,
        "emergence": asdict(annotation.emergence) if annotation.emergence else None,
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        labels=annotation.labels,
        abdiv=annotation.abdiv.astype(np.float16),
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )
    write_bytes(file, buffer.getvalue())


def load_label(file: Path) -> Label:
    """Read one label file. Raises DatasetError if it is missing, cut short or not a label file."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return Label(
                stored["labels"],
                stored["abdiv"].astype(np.float32),
                json.loads(stored["about"].tobytes()),
            )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(
            f"{file} is not a label file ({error}). Remove it and run `trace-sdk label` again."
        ) from error


def claim_folder(out: Path, settings: TeacherSettings, backbone_sha256: str) -> None:
    """Write `labels.json`, or check that the labels already in `out` were made in the same way.

    One that a run left behind before it had made any label, as with a size that was too large, is written anew.

    Raises:
        ArgumentError: `out` holds labels of another backbone or other settings; mixing them would be silent harm.
        DatasetError: `labels.json` is cut or foreign.
    """
    now = json.loads(json.dumps({"backbone_sha256": backbone_sha256, "settings": asdict(settings)}))
    index = out / INDEX
    try:
        if index.is_file() and json.loads(index.read_bytes()) == now:
            return
    except ValueError as error:
        raise DatasetError(f"{index} is not whole ({error}). Remove it if the folder holds no labels.") from error
    if index.is_file() and (any(out.rglob("*.npz")) or any((out / CLAIMS).glob("*.claim"))):
        raise ArgumentError(
            f"{out} holds labels made with another backbone or other settings (see {index}). "
            "Give another folder (-o), or remove this one."
        )
    write_text(index, json.dumps(now, indent=2) + "\n")

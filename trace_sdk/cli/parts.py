"""What is done already of a long job that writes one file: a JSON for each item, named by all it depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_sdk.atomic import write_text

if TYPE_CHECKING:
    from trace_sdk.detector import EdgeDetector


def engine_facts(detector: EdgeDetector, threshold: float | None) -> dict[str, Any]:
    """What every item depends on that edges are made for: the engine, its size, and the threshold, None for its own."""
    return {
        "engine": detector.info["engine"],
        "engine_sha256": detector.info["engine_sha256"],
        "size": detector.size,
        "threshold": detector.info["threshold"] if threshold is None else threshold,
    }


class Parts:
    """Finished items of a job in a folder of their own; an item counts only if nothing it depends on has changed."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """`settings`: what every item depends on, as JSON takes it."""
        self._folder = folder
        self._settings = json.dumps(settings, sort_keys=True)

    def key(self, *depends_on: bytes) -> str:
        """Name of the item that depends on these, and on the settings."""
        digest = hashlib.sha256(self._settings.encode())
        for piece in depends_on:
            digest.update(len(piece).to_bytes(8, "little"))
            digest.update(piece)
        return digest.hexdigest()[:32]

    def get(self, key: str) -> Any:
        """The item, or None if it is not done, or its file is damaged and it has to be done again."""
        try:
            return json.loads((self._folder / f"{key}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def put(self, key: str, item: Any) -> None:
        """Keep an item. Raises OutputError if it cannot be written."""
        write_text(self._folder / f"{key}.json", json.dumps(item))

"""A known few lengths for the sides of a network's input, and the shapes that they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from trace_sdk.engines.manifest import Manifest
from trace_sdk.errors import ArgumentError
from trace_sdk.network_input import padded_length


def checked_buckets(buckets: Sequence[int], manifest: Manifest) -> tuple[int, ...]:
    """Those lengths, sorted, each once. Raises ArgumentError if the engine does not take one of them."""
    step, least, most = manifest.multiple_of, manifest.min_size, manifest.max_size
    whole = isinstance(buckets, Iterable) and all(map(is_whole, buckets))
    sides = sorted(set(buckets)) if whole else []
    if not sides or sides[0] < least or sides[-1] > most or any(side % step for side in sides):
        raise ArgumentError(
            f"buckets={buckets!r} must be multiples of {step} from {least} to {most}, at least one, for "
            f"{manifest.name}."
        )
    return tuple(map(int, sides))


def bucket_length(side: int, manifest: Manifest, buckets: Sequence[int]) -> int:
    """What a side of that many pixels is padded to; above the largest bucket what the engine alone asks for."""
    fitting = padded_length(side, manifest.multiple_of, manifest.min_size)
    return next((bucket for bucket in buckets if bucket >= fitting), fitting)


def bucket_shapes(size: int, manifest: Manifest, buckets: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of every input that pictures scaled to `size` can make; none without buckets."""
    if not buckets:
        return []
    longest = min(bucket_length(size, manifest, buckets), buckets[-1])
    sides = buckets[: buckets.index(longest) + 1]
    return [(side, longest) for side in sides] + [(longest, side) for side in sides[:-1]]


def is_whole(value: Any) -> bool:
    """A whole number, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)

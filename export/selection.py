"""Which layers bear fewer bits: all of them if the answers allow it, else all but the fewest that do the most harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from trace_sdk.errors import ParityError
from trace_sdk.export.verify import Change

T = TypeVar("T")
Note = Callable[[str], None]
RANKED_ON = 2  # pictures; an order of layers needs fewer than a figure


def fewest_in_float(
    layers: Sequence[str],
    tried: Callable[[Sequence[str], int | None], tuple[T, Change]],
    limit: float,
    what: str,
    note: Note,
) -> tuple[T, Change, dict[str, float]]:
    """Try `what` ("8 bits") in all layers; if answers change by more than `limit` on average, measure each alone and
    keep as few of the worst as needed in float.

    Args:
        tried: the model with fewer bits in the layers named, and its change over so many pictures (None: all).

    Returns:
        The model, its change, and of each layer kept in float the mean change when it alone has fewer bits.

    Raises:
        ParityError: no layer can have fewer bits within the limit.
    """
    note(f"measuring {what} in all {len(layers)} layers")
    best, change = tried(layers, None)
    if change.mean <= limit:
        return best, change, {}
    harm = {}
    for number, layer in enumerate(layers, start=1):
        note(f"measuring layer {number} of {len(layers)} alone")
        harm[layer] = tried([layer], RANKED_ON)[1].mean
    worst_first = sorted(layers, key=lambda layer: -harm[layer])
    # Bisection, since each layer that is given back brings the answers closer.
    enough, too_few = len(layers), 0
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        note(f"measuring {middle} layers in float")
        candidate, measured = tried([layer for layer in layers if layer not in worst_first[:middle]], None)
        if measured.mean <= limit:
            enough, best, change = middle, candidate, measured
        else:
            too_few = middle
    if enough == len(layers):
        raise ParityError(
            f"No layer can have {what}: the least harmful changes the edge probability by {min(harm.values()):.2g} on "
            f"average, {limit:g} is allowed. Calibrate on other photos, or export at fp16."
        )
    return best, change, {layer: harm[layer] for layer in worst_first[:enough]}

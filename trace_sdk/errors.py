"""Every error that trace-sdk raises on purpose::

    TraceError
    ├── InputError            what the caller gave cannot be used
    │   ├── ImageError        an image: unreadable, truncated, too large, NaN, wrong dtype or layout
    │   └── ArgumentError     an option or argument out of its range
    ├── EngineError           an engine file: missing, corrupt, foreign, not verified
    │   └── ParityError       an export whose answers differ from PyTorch's
    ├── CheckpointError       weights or training state: missing, pickled, corrupt, of another run
    ├── DatasetError          a folder of photos, labels or annotations that is empty or malformed
    ├── DownloadError         a model on the hub: gated, unknown, or no network
    ├── DeviceError           the device or provider asked for is not there
    │   └── OutOfMemoryError  its memory is too small for what was asked
    ├── MissingExtraError     an optional package is not installed
    └── OutputError           a result could not be written

Each message says what was wrong, with which file, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TraceError(Exception):
    """Base of all errors of trace-sdk; catch this to catch them all."""


class InputError(TraceError):
    """What the caller gave cannot be used."""


class ImageError(InputError):
    """An image that cannot be read or has no defined meaning."""


class ArgumentError(InputError):
    """An option or argument out of its range."""


class EngineError(TraceError):
    """An engine file that is missing, corrupt or not one of ours."""


class ParityError(EngineError):
    """An exported engine whose answers differ from PyTorch's."""


class CheckpointError(TraceError):
    """Weights or training state that are missing, pickled, corrupt or from another run."""


class DatasetError(TraceError):
    """A folder of photos, labels or annotations that is empty or malformed."""


class DeviceError(TraceError):
    """The device or provider that was asked for is not there."""


class OutOfMemoryError(DeviceError):
    """The device's memory is too small for what was asked."""


class DownloadError(TraceError):
    """A model that cannot be fetched from the hub."""


class MissingExtraError(TraceError):
    """An optional package is not installed."""


class OutputError(TraceError):
    """A result could not be written."""


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """A package that is missing in this block raises a MissingExtraError that names the extra; `what`: who needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'{what} {error.name}, which is not installed. Run: pip install "trace-sdk[{extra}]"'
        ) from error

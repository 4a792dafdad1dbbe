"""What an ONNX file says about itself, read without the onnx package and without loading its weights."""

from __future__ import annotations

from collections.abc import Iterator

from trace_sdk.errors import EngineError

_METADATA_PROPS = 14  # of onnx.ModelProto; key is field 1 of an entry, value field 2
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


def read_metadata(model: bytes, source: str) -> dict[str, str]:
    """The metadata_props of a serialised ModelProto; `source` is for messages.

    Raises:
        EngineError: not a serialised message.
    """
    try:
        entries = [dict(_fields(entry)) for number, entry in _fields(memoryview(model)) if number == _METADATA_PROPS]
        return {bytes(entry[1]).decode(): bytes(entry.get(2, b"")).decode() for entry in entries}
    except (IndexError, KeyError, ValueError) as error:
        raise EngineError(f"{source}: is not an ONNX model, or is cut short. Export it again.") from error


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field that is bytes, a string or a message; the others are stepped over."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == _BYTES:
            length, place = _varint(message, place)
            if place + length > len(message):
                raise ValueError(f"field {key >> 3} is cut short")
            yield key >> 3, message[place : place + length]
            place += length
        elif kind == _VARINT:
            _, place = _varint(message, place)
        elif kind in (_FIXED_64, _FIXED_32):
            place += 8 if kind == _FIXED_64 else 4
        else:
            raise ValueError(f"no such wire type: {kind}")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """The number at `place`, seven bits a byte, lowest first; and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")

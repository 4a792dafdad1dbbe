"""Every accepted input becomes one 8-bit RGB array, or an ImageError that says what to do.

Content decides, never the name of a file. Alpha is composited on white, 16 bits become 8 by dropping
the low byte, and EXIF orientation is applied, so that an answer lies over the picture as people see it.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from trace_sdk.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

ImageInput: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | PIL.Image.Image | NDArray[Any] | Tensor"
)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # and HEIC, with the extra of that name
PHOTO_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".hif",
}  # fmt: skip
# How an ISO media file that begins so is called; others are video.
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"mif1")
# Below the size at which Pillow starts to warn (89 million), so that no global limit of Pillow is touched.
MAX_PIXELS = 80_000_000

_FOREIGN = (
    (b"<!doctype html", "a web page; the download probably failed"),
    (b"<html", "a web page; the download probably failed"),
    (b"<svg", "an SVG drawing; render it to PNG first"),
    (b"<?xml", "an XML or SVG file; render it to PNG first"),
    (b"%pdf", "a PDF; export its page as PNG first"),
    (b"pk\x03\x04", "a zip archive; unpack it first"),
    (b"\x93numpy", "a numpy file; load it with numpy.load and pass the array"),
)


@dataclass(frozen=True, eq=False)
class Image:
    """A decoded picture, upright.

    Attributes:
        rgb: uint8 [H, W, 3], contiguous, read-only, H and W at least 1.
        source: the file's name, or what kind of object it came from; for messages.
    """

    rgb: NDArray[np.uint8]
    source: str


def read_image(image: ImageInput, source: str | None = None) -> Image:
    """Decode one picture.

    Args:
        image: path, encoded bytes, binary file object, PIL image, numpy array (HxW, HxWx1, HxWx3 RGB or
            HxWx4 RGBA; bool, uint8, uint16, or float in [0, 1]) or torch tensor (HxW or CxHxW; the same
            dtypes, any device).
        source: name for messages where `image` is not a path.

    Raises:
        ImageError: unreadable, truncated, animated, over MAX_PIXELS, NaN, wrong dtype, range or layout.
    """
    if isinstance(image, (str, os.PathLike)):
        return _from_path(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        name = source or "bytes"
        return _finish(_decode(io.BytesIO(image), name), name)
    if isinstance(image, PIL.Image.Image):
        name = source or "PIL image"
        with _damage_reported(name):
            return _finish(_pixels(image, name), name)
    if isinstance(image, np.ndarray):
        name = source or "array"
        return _finish(_from_array(image, name), name)
    if _is_tensor(image):
        name = source or "tensor"
        return _finish(_from_tensor(image, name), name)
    if callable(getattr(image, "read", None)):
        name = source or str(getattr(image, "name", "file object"))
        return _finish(_decode(io.BytesIO(_read(image, name)), name), name)
    hint = " For several images use run_batch or stream." if isinstance(image, (list, tuple)) else ""
    raise ImageError(
        f"{source or 'image'}: cannot make a picture of {type(image).__name__}. Pass a path, bytes, a binary "
        f"file, a PIL image, a numpy array or a torch tensor.{hint}"
    )


def upright_size(data: bytes, source: str) -> tuple[int, int]:
    """(width, height) of an encoded picture as `read_image` turns it, without decoding its pixels.

    Raises:
        ImageError: it is none of the readable formats.
    """
    with _damage_reported(source), _open(io.BytesIO(data), source) as picture:
        turned = picture.getexif().get(PIL.ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        width, height = picture.size
    return (height, width) if turned else (width, height)


def _finish(rgb: NDArray[np.uint8], source: str) -> Image:
    rgb = np.ascontiguousarray(rgb)
    if rgb.flags.writeable:
        rgb = rgb.view()
        rgb.flags.writeable = False
    return Image(rgb, source)


def _from_path(path: str | os.PathLike[str]) -> Image:
    name = os.fspath(path)
    if not isinstance(name, str) or not name:
        raise ImageError(f"{name!r} is not the name of a picture. Pass a path as text, or the bytes.")
    try:
        # Opening a pipe would wait for a writer, so the kind of file is asked first.
        mode = Path(name).stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(f"{name} is a folder. Pass the pictures in it (trace-sdk detect takes folders).")
        if not stat.S_ISREG(mode):
            raise ImageError(f"{name} is not a regular file. Save the picture to a file, or pass its bytes.")
        file = Path(name).open("rb")  # noqa: SIM115
    except FileNotFoundError:
        hint = "Download it first." if "://" in name else "Check the spelling and the current folder."
        raise ImageError(f"{name}: no such file. {hint}") from None
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror}. Check the name and its permissions.") from error
    except ValueError as error:
        raise ImageError(f"{name!r} is not a possible file name ({error}).") from error
    with file:
        return _finish(_decode(file, name), name)


def _read(file: Any, source: str) -> bytes:
    try:
        data = file.read()
    except (OSError, ValueError) as error:
        raise ImageError(f"{source}: cannot be read ({error}). Pass an open binary file.") from error
    if not isinstance(data, bytes):
        raise ImageError(f"{source}: gives {type(data).__name__}, not bytes. Open the file in mode 'rb'.")
    return data


def _decode(file: IO[bytes], source: str) -> NDArray[np.uint8]:
    with _damage_reported(source), _open(file, source) as picture:
        return _pixels(picture, source)


def _open(file: IO[bytes], source: str) -> PIL.Image.Image:
    """The picture with its size known and its pixels not yet decoded."""
    head = file.read(32)
    file.seek(0)
    if not head:
        raise ImageError(f"{source}: is empty (0 bytes). Save or download the picture again.")
    try:
        return PIL.Image.open(file, formats=FORMATS)
    except PIL.UnidentifiedImageError:
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF:
            file.seek(0)
            return _open_heif(file, source)
        raise ImageError(
            f"{source}: {_what_it_is(head)}. Readable formats: {', '.join(FORMATS)}, HEIC with trace-sdk[heic]."
        ) from None


def _open_heif(file: IO[bytes], source: str) -> PIL.Image.Image:
    try:
        # Opened by its class: registering the format would change what Pillow reads for the whole process.
        from pi_heif import HeifImageFile
    except ImportError as error:
        raise ImageError(
            f'{source}: is a HEIC photo. Run: pip install "trace-sdk[heic]", or convert it to JPEG.'
        ) from error
    picture: PIL.Image.Image = HeifImageFile(file)
    return picture


@contextmanager
def _damage_reported(source: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise ImageError(f"{source}: has more than {MAX_PIXELS:,} pixels. Scale it down or cut it up.") from None
    # A decoder fed with damaged data raises anything: struct.error, KeyError, zlib.error, MemoryError…
    except Exception as error:
        raise ImageError(
            f"{source}: the picture is damaged or incomplete ({str(error) or type(error).__name__}). "
            "Save or download it again."
        ) from error


def _what_it_is(head: bytes) -> str:
    start = head.lstrip().lower()
    for magic, meaning in _FOREIGN:
        if start.startswith(magic):
            return f"is {meaning}"
    if head[4:8] == b"ftyp":
        return "is a video, or a photo in a rare form of HEIC; convert a photo to JPEG first"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head):
        return "is text, not a picture"
    return "is not a picture, or one that is damaged from its first bytes on"


def _pixels(picture: PIL.Image.Image, source: str) -> NDArray[np.uint8]:
    width, height = picture.size
    _check_size(height, width, source)
    # A phone's MPO carries a depth map or a second view behind the photo: not an animation.
    frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
    if frames > 1:
        raise ImageError(
            f"{source}: holds {frames} frames or pages. Extract frames first and pass them one by one "
            "(Pillow: image.seek(n), then image.copy())."
        )
    picture.load()
    return _to_rgb(PIL.ImageOps.exif_transpose(picture), source)


def _to_rgb(picture: PIL.Image.Image, source: str) -> NDArray[np.uint8]:
    mode = picture.mode
    if mode.startswith("I"):
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"{source}: 32-bit grey values from {values.min()} to {values.max()}; 0 to 65535 have a "
                "meaning here. Scale them to 16 bits."
            )
        grey = (values >> 8).astype(np.uint8)
        if isinstance(clear := picture.info.get("transparency"), int):
            grey[values == clear] = 255
        return _grey_to_rgb(grey)
    if mode == "F":
        return _from_array(np.asarray(picture), source)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _from_array(array: NDArray[Any], source: str) -> NDArray[np.uint8]:
    if isinstance(array, np.ma.MaskedArray):
        raise ImageError(f"{source}: is a masked array. Fill the masked values first (array.filled(...)).")
    array = np.asarray(array)  # a matrix, too, which has two axes whatever is done to it
    if array.ndim == 4:
        raise ImageError(
            f"{source}: shape {array.shape} is a batch. Pass the images one by one, or use run_batch(array)."
        )
    if array.ndim not in (2, 3):
        raise ImageError(f"{source}: shape {array.shape} is no picture. Pass HxW, HxWx1, HxWx3 or HxWx4.")
    if 0 in array.shape:
        raise ImageError(f"{source}: shape {array.shape} holds no pixels. Pass at least 1x1.")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        hint = "Pass HxW, HxWx1 (grey), HxWx3 (RGB) or HxWx4 (RGBA)."
        if array.shape[0] in (1, 3, 4):
            hint = "It looks like CHW: transpose it, array.transpose(1, 2, 0)."
        raise ImageError(f"{source}: shape {array.shape} has {array.shape[2]} channels. {hint}")
    _check_size(array.shape[0], array.shape[1], source)
    values = _to_uint8(array, source)
    if values.ndim == 2:
        return _grey_to_rgb(values)
    if values.shape[2] == 1:
        return _grey_to_rgb(values[:, :, 0])
    if values.shape[2] == 4:
        return _to_rgb(PIL.Image.fromarray(np.ascontiguousarray(values)), source)
    # The caller may write into the array while a thread still reads the picture.
    return values.copy() if values is array or values.base is not None else values


def _to_uint8(array: NDArray[Any], source: str) -> NDArray[np.uint8]:
    kind, bytes_each = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if kind == "u" and bytes_each == 1:
        return array
    if kind == "u" and bytes_each == 2:
        return (array >> 8).astype(np.uint8)
    if kind != "f" or bytes_each > 8:
        raise ImageError(
            f"{source}: dtype {array.dtype} has no defined range. Pass bool, uint8, uint16 or float in "
            "[0, 1] (values 0 to 255: array.astype(numpy.uint8))."
        )
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise ImageError(f"{source}: {bad} values are NaN or infinite. Replace them (numpy.nan_to_num).")
    if low < 0 or high > 1:
        raise ImageError(
            f"{source}: float values from {low:.4g} to {high:.4g}, expected [0, 1]. Divide by 255 if they "
            "are 0 to 255; numpy.clip(array, 0, 1) if they overshoot a little."
        )
    levels: NDArray[np.uint8] = np.rint(array.astype(np.float32) * np.float32(255)).astype(np.uint8)
    return levels


def _is_tensor(image: object) -> bool:
    kinds = type(image).__mro__
    return any(kind.__module__.startswith("torch") and kind.__name__ == "Tensor" for kind in kinds)


def _from_tensor(tensor: Any, source: str) -> NDArray[np.uint8]:
    shape = tuple(tensor.shape)
    if str(tensor.layout) != "torch.strided":
        raise ImageError(f"{source}: {tensor.layout} is not a dense picture. Pass tensor.to_dense().")
    if tensor.device.type == "meta":
        raise ImageError(f"{source}: a tensor on the meta device has no values. Pass one with data.")
    if tensor.ndim == 4:
        raise ImageError(f"{source}: shape {shape} is a batch. Pass the images one by one, or use run_batch(tensor).")
    if tensor.ndim == 3 and shape[0] not in (1, 3, 4):
        hint = "Pass CxHxW or HxW."
        if shape[2] in (1, 3, 4):
            hint = "It looks like HWC: use tensor.permute(2, 0, 1)."
        raise ImageError(f"{source}: shape {shape} has {shape[0]} channels. {hint}")
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        array = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    except (RuntimeError, TypeError) as error:
        raise ImageError(f"{source}: tensor of {tensor.dtype} cannot be read ({error}).") from error
    return _from_array(np.moveaxis(array, 0, 2) if array.ndim == 3 else array, source)


def _grey_to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _check_size(height: int, width: int, source: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{source}: {width}x{height} holds no pixels. Pass at least 1x1.")
    if height * width > MAX_PIXELS:
        raise ImageError(f"{source}: {width}x{height} has more than {MAX_PIXELS:,} pixels. Scale it down or cut it up.")

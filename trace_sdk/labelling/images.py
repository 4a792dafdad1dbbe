"""Every layout that images come in, as one list of named images. Of a data set only file names are read.

photos/                 a folder, with its sub-folders; VOC: the images in its JPEGImages/
'photos/**/*.jpg'       a pattern, quoted
photos.txt              a list: a path a line, relative to the list; VOC: ids as in ImageSets/
instances_val.json      COCO: the file names in its "images"
shards/train-00.tar     WebDataset: one image for each key
"""

from __future__ import annotations

import glob
import json
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from trace_sdk.errors import DatasetError, ImageError
from trace_sdk.folders import files_below
from trace_sdk.pretraining.photos import SUFFIXES

Where: TypeAlias = "str | os.PathLike[str]"

LONGEST_NAME = 255 - len(".failed")  # in bytes: file systems allow 255
_TAR, _COMPRESSED = ".tar", (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# A key with several images has its photo in a format of photos and a mask beside it as PNG.
_PHOTO_FIRST = (".jpg", ".jpeg", ".jpe", ".webp", ".avif", ".heic", ".heif", ".hif", ".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class NamedImage:
    """An image that is read when it is needed.

    Attributes:
        name: relative path with "/", unique in its list and the same on every machine; names the label.
        file: the image, or the tar that holds it.
        span: (first byte, count) inside the tar; None for a file of its own.
    """

    name: str
    file: Path
    span: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The encoded image. Raises ImageError if it cannot be read."""
        try:
            if self.span is None:
                return self.file.read_bytes()
            with self.file.open("rb") as tar:
                tar.seek(self.span[0])
                return tar.read(self.span[1])
        except OSError as error:
            raise ImageError(f"{self.name}: {error.strerror}. Check the name and its permissions.") from error


def find_images(where: Where | Iterable[Where]) -> list[NamedImage]:
    """Every image of one or several folders, patterns, lists, COCO files and tars, in a fixed order.

    Names are relative to the folder, to the list, to the part of a pattern before its first wildcard, or to COCO's
    image folder; those in a tar begin with the tar's.

    Raises:
        DatasetError: there is none, a file is missing or malformed, or two images would share a name.
    """
    arguments = [os.fspath(one) for one in ([where] if isinstance(where, (str, os.PathLike)) else where)]
    found: dict[str, NamedImage] = {}
    for argument in arguments:
        for image in _expand(argument):
            _check_name(image)
            other = found.setdefault(image.name, image)
            if (other.file.absolute(), other.span) != (image.file.absolute(), image.span):
                raise DatasetError(
                    f"{other.file} and {image.file} would both be called {image.name}. Give the folder that holds "
                    "both, or make labels of each in a folder of its own."
                )
    if not found:
        raise DatasetError(
            f"No photos in {', '.join(arguments)}. Give a folder that holds {', '.join(sorted(SUFFIXES))} or "
            ".tar files, a list (.txt) or a COCO file (.json)."
        )
    return list(found.values())


def _check_name(image: NamedImage) -> None:
    """Raise DatasetError unless a label can be called so."""
    wrong = None
    if any("\udc80" <= character <= "\udcff" for character in image.name):  # what os.fsdecode makes of other bytes
        wrong = "is not UTF-8"
    elif len(Path(image.name).name.encode()) > LONGEST_NAME:
        wrong = f"is longer than {LONGEST_NAME} bytes"
    if wrong:
        raise DatasetError(f"The name of {image.name!a} {wrong}, so no label can be called so. Rename the photo.")


def _expand(argument: str) -> Iterator[NamedImage]:
    path = Path(argument)
    if path.is_dir():
        yield from _folder(path, path)
    elif not path.exists() and glob.has_magic(argument):
        root = Path(argument)
        while glob.has_magic(str(root)):
            root = root.parent
        # Path.glob refuses absolute patterns.
        for match in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207
            found = Path(match)
            yield from _folder(found, root) if found.is_dir() else _file(found, root)
    elif not path.exists():
        raise DatasetError(f"{argument} does not exist. Check the name.")
    else:
        yield from _file(path, path.parent)


def _folder(folder: Path, root: Path) -> Iterator[NamedImage]:
    if (folder / "JPEGImages").is_dir():  # VOC, whose other folders hold masks
        folder = root = folder / "JPEGImages"
    for file in sorted(files_below(folder)):
        # COCO keeps panoptic masks as pictures below annotations/.
        if file.suffix.lower() in {*SUFFIXES, _TAR} and "annotations" not in file.relative_to(folder).parts[:-1]:
            yield from _file(file, root)


def _file(file: Path, root: Path) -> Iterator[NamedImage]:
    name = file.relative_to(root).as_posix()
    if name.lower().endswith(_COMPRESSED):
        raise DatasetError(f"{file} is compressed, so no image in it can be read alone. Unpack it to a .tar first.")
    if file.exists() and not file.is_file():
        return  # a folder or a pipe; a link to nothing fails with its name when it is read
    suffix = file.suffix.lower()
    if suffix == ".txt":
        yield from _list(file)
    elif suffix == ".json":
        yield from _coco(file)
    elif suffix == _TAR:
        yield from _tar(file, name)
    else:
        yield NamedImage(name, file)


def _list(file: Path) -> Iterator[NamedImage]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # Windows' editors put a mark first
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} cannot be read as a list of paths ({error}).") from error
    sets = next((folder for folder in file.absolute().parents if folder.name == "ImageSets"), None)
    for line in filter(None, map(str.strip, lines)):
        if sets is None:
            yield NamedImage(_name(line, file.parent), file.parent / line)
        else:
            photo = f"{line.split()[0]}.jpg"  # what stands behind the id says if a class is present
            yield NamedImage(_name(photo, sets), sets.parent / "JPEGImages" / photo)


def _coco(file: Path) -> Iterator[NamedImage]:
    try:
        names = [str(image["file_name"]) for image in json.loads(file.read_bytes())["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f'{file} is not a COCO file with "images" ({error!r}). Download it again.') from error
    split = file.stem.rpartition("_")[2]  # instances_val2017 → val2017
    near = [file.parent, file.parent.parent]
    folders = [base / sub for base in near for sub in (split, "images", f"images/{split}", ".")]
    folder = next((folder for folder in folders if names and (folder / names[0]).is_file()), None)
    if names and folder is None:
        looked = ", ".join(str(folder) for folder in folders)
        raise DatasetError(f"{names[0]}, named by {file}, is in none of {looked}. Put the images there.")
    for name in names:
        assert folder is not None
        yield NamedImage(_name(name, folder), folder / name)


def _tar(file: Path, name: str) -> Iterator[NamedImage]:
    chosen: dict[str, tuple[int, str, tuple[int, int]]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            members = [member for member in tar if member.isfile()]
    except (OSError, tarfile.TarError) as error:
        raise DatasetError(f"{file} is not a whole, uncompressed tar ({error}). Make or download it again.") from error
    for member in members:
        folder, base = posixpath.split(posixpath.normpath(member.name))
        key, dot, suffix = base.partition(".")
        if key and dot + suffix.lower() in _PHOTO_FIRST:
            span = (member.offset_data, member.size)
            if sum(span) > file.stat().st_size:
                raise DatasetError(f"{file} ends within {member.name}. Make or download it again.")
            image = (_PHOTO_FIRST.index(dot + suffix.lower()), posixpath.join(folder, base), span)
            chosen[posixpath.join(folder, key)] = min(image, chosen.get(posixpath.join(folder, key), image))
    for _, inside, span in chosen.values():
        yield NamedImage(f"{name}/{_name(inside, file)}", file, span)


def _name(path: str, root: Path) -> str:
    """A name that stays inside any folder it is put in: what leads out of `root` is named from / on, or its drive's."""
    relative = posixpath.normpath(Path(path).as_posix())
    if Path(relative).anchor or relative.startswith("../"):
        whole = Path(posixpath.normpath((root.absolute() / path).as_posix()))
        relative = whole.relative_to(whole.anchor).as_posix()
    return relative

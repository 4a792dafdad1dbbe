"""Which photos a command is to do, what their results are called, and pictures among these."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trace_sdk.atomic import write_whole
from trace_sdk.errors import ImageError, OutputError
from trace_sdk.folders import files_below
from trace_sdk.images import PHOTO_SUFFIXES
from trace_sdk.pictures import write_jpeg

if TYPE_CHECKING:
    from PIL.Image import Image

_OURS = (".edges.png", ".edges.tif", ".overlay.jpg", ".instances.jpg")


@dataclass(frozen=True)
class PhotoJob:
    """A photo, the name of its results inside the output folder, and its own name inside the folder given."""

    photo: Path
    name: Path
    relative: Path


def find_photos(arguments: Iterable[str], out: Path) -> list[PhotoJob]:
    """Every photo of files, folders and patterns once, with names that don't clash.

    `out`, the folder for the results, may lie in a folder of photos; it is passed over there.

    Raises:
        click.UsageError: there is none.
        OutputError: `out` is a file.
    """
    jobs = _named(_found(arguments, out.resolve()))
    if not jobs:
        suffixes = " ".join(sorted(PHOTO_SUFFIXES))
        raise click.UsageError(f"No photo found in {', '.join(arguments)}. In folders, photos are: {suffixes}")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file. Give a folder with -o.")
    return jobs


def check_new(out: Path, *given: Path | None) -> None:
    """Raise click.UsageError if `out` is one of the folders that a command only reads."""
    if out.resolve() in [folder.resolve() for folder in given if folder]:
        raise click.UsageError(f"{out} is what is read, and would be written over. Give another folder (-o).")


def check_apart(out: Path, photos: Iterable[str | Path]) -> None:
    """Raise click.UsageError if `out`, which gets pictures, lies in a folder of photos: a later run would read them."""
    place = out.resolve()
    if inside := next((name for name in photos if Path(name).resolve() in (place, *place.parents)), None):
        raise click.UsageError(
            f"{out} lies in {inside}: its pictures would be taken for photos. Give a folder beside it (-o)."
        )


def read_photo(photo: Path) -> bytes:
    """The file as it is. Raises ImageError if it cannot be read."""
    try:
        return photo.read_bytes()
    except OSError as error:
        raise ImageError(f"{photo}: {error.strerror}. Check the name and its permissions.") from error


def photo_count(count: int) -> str:
    """How many, for people: 1 photo, 2 photos."""
    return f"{count} photo{'' if count == 1 else 's'}"


def save_jpeg(picture: Image, file: Path, quality: int = 92) -> None:
    """Write a picture, whole or not at all. Raises ImageError if it is too long for a JPEG, and OutputError."""
    try:
        with write_whole(file) as opened:
            write_jpeg(picture, opened, quality=quality)
    except ImageError as error:
        raise ImageError(f"{file} cannot be written. {error}") from error


def _found(arguments: Iterable[str], out: Path) -> list[PhotoJob]:
    """Every photo once, in the order of the arguments, folders sorted by name."""
    jobs: dict[Path, PhotoJob] = {}
    for argument in arguments:
        for job in _expanded(argument, out):
            jobs.setdefault(job.photo.absolute(), job)
    return list(jobs.values())


def _expanded(argument: str, out: Path) -> Iterator[PhotoJob]:
    if not os.path.lexists(argument) and glob.has_magic(argument):
        # Path.glob refuses absolute patterns.
        for match in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207
            yield from _file_or_folder(Path(match), out)
    else:
        yield from _file_or_folder(Path(argument), out)


def _file_or_folder(path: Path, out: Path) -> Iterator[PhotoJob]:
    if not path.is_dir():
        yield PhotoJob(path, Path(path.name), Path(path.name))
        return
    top = path.resolve()
    passed_over = {out} - {top, *top.parents}
    for folder, photos in groupby(sorted(files_below(path), key=_folder_first), lambda file: file.parent):
        place = folder.resolve()
        if passed_over & {place, *place.parents}:
            continue
        for photo in photos:
            if photo.suffix.lower() in PHOTO_SUFFIXES and not photo.name.endswith(_OURS):
                yield PhotoJob(photo, photo.relative_to(path), photo.relative_to(path))


def _folder_first(file: Path) -> tuple[Path, str]:
    return file.parent, file.name


def _named(jobs: list[PhotoJob]) -> list[PhotoJob]:
    """Results named by stem; by full name where stems clash; numbered in order where names clash, too."""
    stems = Counter(_key(job.name.with_suffix("")) for job in jobs)
    taken: set[str] = set()
    named = []
    for job in jobs:
        stem = job.name.with_suffix("")
        base = stem if stems[_key(stem)] == 1 else job.name
        name, number = base, 1
        while _key(name) in taken:
            number += 1
            name = base.with_name(f"{base.name}-{number}")
        taken.add(_key(name))
        named.append(PhotoJob(job.photo, name, job.relative))
    return named


def _key(name: Path) -> str:
    # Some file systems take A.png and a.png for one file.
    return str(name).casefold()

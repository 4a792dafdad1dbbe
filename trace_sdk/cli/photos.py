"""Which photos a command is to do, and what their results are called."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from trace_sdk.errors import ImageError, OutputError

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
_OURS = (".edges.png", ".edges.tif", ".overlay.jpg", ".instances.jpg")


@dataclass(frozen=True)
class PhotoJob:
    """A photo, the name of its results inside the output folder, and its own name inside the folder given."""

    photo: Path
    name: Path
    relative: Path


def find_photos(arguments: Iterable[str], out: Path) -> list[PhotoJob]:
    """Every photo of files, folders and patterns once, with names that don't clash.

    Raises:
        click.UsageError: there is none.
        OutputError: `out` is a file.
    """
    jobs = _named(_found(arguments))
    if not jobs:
        suffixes = " ".join(sorted(PHOTO_SUFFIXES))
        raise click.UsageError(f"No photo found in {', '.join(arguments)}. In folders, photos are: {suffixes}")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file. Give a folder with -o.")
    return jobs


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


def _found(arguments: Iterable[str]) -> list[PhotoJob]:
    """Every photo once, in the order of the arguments, folders sorted by name."""
    jobs: dict[Path, PhotoJob] = {}
    for argument in arguments:
        for job in _expanded(argument):
            jobs.setdefault(job.photo.absolute(), job)
    return list(jobs.values())


def _expanded(argument: str) -> Iterator[PhotoJob]:
    if not os.path.lexists(argument) and glob.has_magic(argument):
        # Path.glob refuses absolute patterns.
        for match in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207
            yield from _file_or_folder(Path(match))
    else:
        yield from _file_or_folder(Path(argument))


def _file_or_folder(path: Path) -> Iterator[PhotoJob]:
    if not path.is_dir():
        yield PhotoJob(path, Path(path.name), Path(path.name))
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            hidden_or_ours = name.startswith(".") or name.endswith(_OURS)
            if Path(name).suffix.lower() in PHOTO_SUFFIXES and not hidden_or_ours:
                photo = Path(folder, name)
                yield PhotoJob(photo, photo.relative_to(path), photo.relative_to(path))


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

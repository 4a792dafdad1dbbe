"""`trace-sdk detect`: photos in, pictures of their instance edges out."""

from __future__ import annotations

import glob
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click

from trace_sdk.atomic import write_whole
from trace_sdk.cli.console import FAILED, errors, output, progress, say_error
from trace_sdk.errors import InputError, OutputError

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
_OURS = (".edges.png", ".edges.tif", ".overlay.jpg")


@dataclass(frozen=True)
class _Job:
    photo: Path
    name: Path  # of the photo inside the output folder


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option(
    "-o",
    "out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the results; made if missing.",
)
@click.option("--overlay", is_flag=True, help="Also write the edges drawn over each photo, as a JPEG.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["png", "npy", "tif"]),
    default="png",
    show_default=True,
    help="png: 8-bit grey, white is edge. npy, tif: float32 in [0, 1].",
)
@click.option("--engine", help="An .onnx engine, or the name of a bundled one.  [default: trace-small]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N (GPU number N).")
@click.option(
    "--size",
    type=click.IntRange(16, 8192),
    help="Longest side that the network sees, in pixels. Larger finds smaller things and takes longer.  "
    "[default: the engine's own]",
)
@click.option(
    "--buckets",
    metavar="N,N,...",
    help="The only lengths that a side of the network's input may have, in pixels; photos are padded to them.",
)
@click.option("--verbose", is_flag=True, help="Also list what ran: provider, threads, precision, time by stage.")
def command(
    photos: tuple[str, ...],
    out: Path,
    overlay: bool,
    form: str,
    engine: str | None,
    device: str,
    size: int | None,
    buckets: str | None,
    verbose: bool,
) -> None:
    """Find the instance edges of photos.

    PHOTO is a file, a folder (searched with its sub-folders, which are kept), or a quoted pattern. Each
    photo gives OUT/NAME.edges.png, as large as the photo, grey from black (no edge) to white (edge).

    \b
    Examples:
      trace-sdk detect street.jpg -o edges/
      trace-sdk detect holiday/ -o edges/ --overlay      edges drawn over each photo, too
      trace-sdk detect 'shots/**/*.png' -o edges/        a pattern, quoted
      trace-sdk detect big.tif -o edges/ --size 2048     finer edges of a large picture
      trace-sdk detect street.jpg -o out/ --format npy   float32 array for numpy.load

    A file that cannot be read is reported and the others are still done. Two photos that would share one
    name (a.jpg and a.png) keep their suffix: a.jpg.edges.png. In folders, files that are no photos by their
    suffix, hidden files and earlier results (*.edges.*, *.overlay.jpg) are passed over; files that you name
    are always tried.

    \b
    Exit code:
      0    all photos done
      1    a photo, the engine, the device or the output folder failed (see stderr)
      2    wrong usage, or no photo found
      130  interrupted; finished files are whole, run it again to go on
    """
    jobs = _named(_found(photos))
    if not jobs:
        suffixes = " ".join(sorted(PHOTO_SUFFIXES))
        raise click.UsageError(f"No photo found in {', '.join(photos)}. In folders, photos are: {suffixes}")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file. Give a folder with -o.")

    from trace_sdk.detector import EdgeDetector

    start = time.perf_counter()
    detector = EdgeDetector(engine, device=device, size=size, buckets=numbers(buckets))
    timings: list[dict[str, float]] = []
    failed = 0
    try:
        with progress("detect", total=len(jobs)) as advance:
            for job in jobs:
                try:
                    edges = detector.run(job.photo)
                except InputError as error:
                    failed += 1
                    say_error(error)
                else:
                    edges.save(out / f"{job.name}.edges.{form}")
                    if overlay:
                        with write_whole(out / f"{job.name}.overlay.jpg") as file:
                            edges.overlay().save(file, "JPEG", quality=92)
                    timings.append(edges.info["timings"])
                advance(note=job.photo.name)
    except KeyboardInterrupt:
        errors.print(f"{len(timings)} of {len(jobs)} photos done, each whole.")
        raise
    seconds = time.perf_counter() - start
    if verbose:
        for line in _what_ran(detector.info, timings):
            output.print(line, markup=False, soft_wrap=True)
    milliseconds = [one["total"] for one in timings]
    output.print(_summary(milliseconds, failed, seconds, out, detector.info), markup=False, soft_wrap=True)
    if failed:
        raise click.exceptions.Exit(FAILED)


def _summary(milliseconds: list[float], failed: int, seconds: float, out: Path, info: dict[str, object]) -> str:
    count = f"{len(milliseconds)} photo{'' if len(milliseconds) == 1 else 's'}"
    trouble = f", {failed} failed" if failed else ""
    speed = f"median {median(milliseconds):.0f} ms, " if milliseconds else ""
    where = f"{info['engine']} on {info['device']}, size {info['size']}"
    return f"{count} → {out}{trouble}: {speed}total {seconds:.1f} s ({where})"


def _what_ran(info: dict[str, object], timings: list[dict[str, float]]) -> Iterator[str]:
    """`name: value` of everything in `info`, then of each stage over the photos."""
    for name, value in info.items():
        yield f"{name}: {', '.join(map(str, value)) or 'none' if isinstance(value, tuple) else value}"
    for stage in timings[0] if timings else ():
        values = sorted(one[stage] for one in timings)
        yield f"{stage}: median {median(values):.1f} ms, slowest {values[-1]:.1f} ms"


def numbers(text: str | None) -> list[int] | None:
    """`--buckets 256,352` as numbers. Raises click.UsageError."""
    try:
        return [int(part) for part in text.split(",")] if text is not None else None
    except ValueError:
        raise click.UsageError(f"--buckets {text}: give whole numbers of pixels, for example 256,352,448") from None


def _found(arguments: Iterable[str]) -> list[_Job]:
    """Every photo once, in the order of the arguments, folders sorted by name."""
    jobs: dict[Path, _Job] = {}
    for argument in arguments:
        for job in _expanded(argument):
            jobs.setdefault(job.photo.absolute(), job)
    return list(jobs.values())


def _expanded(argument: str) -> Iterator[_Job]:
    if not os.path.lexists(argument) and glob.has_magic(argument):
        # Path.glob refuses absolute patterns.
        for match in sorted(glob.glob(argument, recursive=True)):  # noqa: PTH207
            yield from _file_or_folder(Path(match))
    else:
        yield from _file_or_folder(Path(argument))


def _file_or_folder(path: Path) -> Iterator[_Job]:
    if not path.is_dir():
        yield _Job(path, Path(path.name))
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            hidden_or_ours = name.startswith(".") or name.endswith(_OURS)
            if Path(name).suffix.lower() in PHOTO_SUFFIXES and not hidden_or_ours:
                photo = Path(folder, name)
                yield _Job(photo, photo.relative_to(path))


def _named(jobs: list[_Job]) -> list[_Job]:
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
        named.append(_Job(job.photo, name))
    return named


def _key(name: Path) -> str:
    # Some file systems take A.png and a.png for one file.
    return str(name).casefold()

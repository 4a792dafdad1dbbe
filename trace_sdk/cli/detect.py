"""`trace-sdk detect`: photos in, pictures of their instance edges out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sized
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING

import click

from trace_sdk.cli.console import FAILED, errors, output, progress, say_error
from trace_sdk.cli.options import engine_options
from trace_sdk.cli.photos import find_photos, photo_count, save_jpeg
from trace_sdk.engines import RUNTIMES
from trace_sdk.errors import InputError

if TYPE_CHECKING:
    from trace_sdk.detector import EdgeDetector

STDIN = "-"
_VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"}


@click.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the results, made if missing; or -, the standard output.",
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
@engine_options
@click.option(
    "--buckets",
    metavar="N,N,...",
    help="The only lengths that a side of the network's input may have, in pixels; photos are padded to them.",
)
@click.option("--runtime", type=click.Choice(["auto", *RUNTIMES]), default="auto", help="What runs the engine.")
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
    runtime: str,
    verbose: bool,
) -> None:
    """Find the instance edges of photos.

    PHOTO is a file, a folder (searched with its sub-folders, which are kept), a quoted pattern, or - for the
    standard input. Each photo gives OUT/NAME.edges.png, as large as the photo, grey from black (no edge) to
    white (edge).

    \b
    Examples:
      trace-sdk detect street.jpg -o edges/
      trace-sdk detect holiday/ -o edges/ --overlay      edges drawn over each photo, too
      trace-sdk detect 'shots/**/*.png' -o edges/        a pattern, quoted
      trace-sdk detect big.tif -o edges/ --size 2048     finer edges of a large picture
      trace-sdk detect street.jpg -o out/ --format npy   float32 array for numpy.load
      trace-sdk detect clip.mp4 -o out/ --overlay        a video, with instances that keep their colour
      trace-sdk detect camera:0 -o out/ --overlay        the first camera, until Ctrl-C
      curl URL | trace-sdk detect - -o - > edges.png     one photo through a pipe

    A video that you name (mp4, mov, mkv, avi, webm; or a quoted pattern that ends so) gives OUT/NAME.edges.mp4, with
    --overlay OUT/NAME.overlay.mp4, and OUT/NAME.frames.jsonl: the instances of each frame, numbered alike from frame
    to frame; pip install "trace-sdk[video]". So does a camera, camera:0 or just 0 (NAME is camera-0), until it is
    interrupted.

    A file that cannot be read is reported and the others are still done. Two photos that would share one
    name (a.jpg and a.png) keep their suffix: a.jpg.edges.png; those of one name in two folders are numbered:
    a.jpg-2.edges.png. In folders, files that are no photos by their
    suffix, hidden files, the output folder and earlier results (*.edges.*, *.overlay.jpg) are passed over; files
    that you name are always tried.

    \b
    Exit code:
      0    all photos done
      1    a photo, the engine, the device or the output folder failed (see stderr)
      2    wrong usage, or no photo found
      130  interrupted; finished files are whole, run it again to go on
    """
    numbered = {name: camera_number(name) for name in photos if name != STDIN}
    cameras = {number for number in numbered.values() if number is not None}
    clips = [
        name for name, number in numbered.items() if number is None and Path(name).suffix.lower() in _VIDEO_SUFFIXES
    ]
    pictures = [name for name, number in numbered.items() if number is None and name not in clips]
    videos = [(job.photo, out / job.name) for job in find_photos(clips, out)] if clips else []
    jobs: list[tuple[Path | IO[bytes], Path]] = [
        (job.photo, job.name) for job in (find_photos(pictures, out) if pictures else ())
    ]
    if STDIN in photos:
        jobs.append((sys.stdin.buffer, Path("stdin")))
    if to_stdout := out == Path(STDIN):
        _check_pipe(jobs, videos or cameras, overlay, form)

    from trace_sdk.detector import EdgeDetector

    start = time.perf_counter()
    detector = EdgeDetector(engine, device=device, size=size, buckets=numbers(buckets), runtime=runtime)
    failed = sum(not _detect_video(detector, video, stem, overlay) for video, stem in videos)
    for number in sorted(cameras):
        failed += not _detect_video(detector, number, out / f"camera-{number}", overlay)
    if to_stdout:
        detector.run(jobs[0][0]).write_png(sys.stdout.buffer)
        return
    if not jobs:
        if failed:
            raise click.exceptions.Exit(FAILED)
        return
    timings: list[dict[str, float]] = []
    try:
        with progress("detect", total=len(jobs)) as advance:
            for photo, name in jobs:
                try:
                    edges = detector.run(photo)
                    edges.save(out / f"{name}.edges.{form}")
                    if overlay:
                        save_jpeg(edges.overlay(), out / f"{name}.overlay.jpg")
                except InputError as error:
                    failed += 1
                    say_error(error)
                else:
                    timings.append(edges.info["timings"])
                advance(note=photo.name)
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


def _check_pipe(jobs: Sized, clips: object, overlay: bool, form: str) -> None:
    """Raise click.UsageError unless it is one PNG that goes to the standard output, and that to a program or a file."""
    if len(jobs) != 1 or clips or overlay or form != "png":
        raise click.UsageError("-o - writes the edges of one photo as a PNG. For anything else give a folder with -o.")
    if sys.stdout.isatty():
        raise click.UsageError("-o - would print a PNG on the terminal. Add > edges.png, or a pipe.")


def _detect_video(detector: EdgeDetector, source: Path | int, stem: Path, overlay: bool) -> bool:
    """A file, or a camera by its number. False where it failed, which is said."""
    from trace_sdk.video import detect_video, open_camera, open_video

    try:
        with open_camera(source) if isinstance(source, int) else open_video(source) as clip:
            if clip.live:
                errors.print(f"Watching {clip.name}; Ctrl-C ends it.")
            with progress(clip.name, total=clip.count) as advance:
                result = detect_video(
                    detector,
                    clip,
                    stem,
                    overlay=overlay,
                    on_frame=lambda done, speed: advance(note=f"{speed:.1f} frames/s"),
                )
    except InputError as error:
        say_error(error)
        return False
    output.print(
        f"{clip.name}: {result.frames} frames of {result.rate:.3g}/s → {stem}.edges.mp4, {result.numbers} instances "
        f"followed in {stem}.frames.jsonl: {result.speed:.1f} frames/s, total {result.seconds:.1f} s "
        f"({detector.info['engine']} on {detector.info['device']}, size {detector.size})",
        markup=False,
        soft_wrap=True,
    )
    return True


def camera_number(source: str) -> int | None:
    """The number in camera:0, or of a device given as a plain number; None for a file."""
    prefix, colon, number = source.rpartition(":")
    named = prefix == "camera" or not (colon or Path(source).exists())
    return int(number) if named and number.isascii() and number.isdigit() else None


def _summary(milliseconds: list[float], failed: int, seconds: float, out: Path, info: dict[str, object]) -> str:
    count = photo_count(len(milliseconds))
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

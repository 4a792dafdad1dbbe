"""`trace-sdk benchmark`: how long answers take on this machine, and what they cost."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.cli.console import FAILED, output, progress


@click.command()
@click.argument("engines", nargs=-1, metavar="ENGINE...")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for latency.json and latency.md.")
@click.option("--plot", is_flag=True, help="Also draw OUT/latency.png.")
@click.option(
    "--photo",
    "photos",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure on this photo; repeatable.  [default: one drawn JPEG of 768x512]",
)
@click.option("--size", type=click.IntRange(16, 8192), help="Longest side that the network sees, in pixels.")
@click.option(
    "--runs", type=click.IntRange(min=1), default=40, show_default=True, help="Answers in a round, or what fits 20 s."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="To see whether it repeats.")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="For throughput; repeatable.  [default: 1 2 4 8]",
)
@click.option("--teacher", metavar="BACKBONE", help="Also time the teacher on this backbone (needs torch).")
@click.option(
    "--structured-forests",
    "forests",
    metavar="MODEL",
    type=click.Path(exists=True, dir_okay=False),
    help="Also time structured forests, with this model of OpenCV's (model.yml.gz).",
)
def command(
    engines: tuple[str, ...],
    out: Path | None,
    plot: bool,
    photos: tuple[Path, ...],
    size: int | None,
    runs: int,
    rounds: int,
    batches: tuple[int, ...],
    teacher: str | None,
    forests: str | None,
) -> None:
    """Measure ENGINE..., files, students or bundled names (by default all bundled), on every device and runtime found.

    Latency from the photo's bytes to edges of its size (p50, p90, p99, and the stages), cold start in fresh
    processes, throughput by batch size and peak memory; Canny beside it, and the teacher on request. All of it is
    done in several rounds, and the last line says whether they agree within 5 %.

    \b
    Examples:
      trace-sdk benchmark
      trace-sdk benchmark mine.onnx mine-int8.onnx --photo street.jpg -o speed/ --plot

    Engines are checked and run once before anything is timed; `change` is how far their edges are from the first
    engine's. Containers' limits hold: threads are what the control group and the affinity allow.
    """
    from trace_sdk.atomic import make_folder
    from trace_sdk.benchmarking.measure import BATCHES, FORESTS, TEACHER, benchmark, steps
    from trace_sdk.engines import BUNDLED
    from trace_sdk.figures import need_matplotlib

    if plot and not out:
        raise click.UsageError("--plot needs a folder: -o DIR")
    if plot:
        need_matplotlib()
    if out:
        make_folder(out)
    engines = engines or BUNDLED
    given = {name: file for name, file in ((FORESTS, forests), (TEACHER, teacher)) if file is not None}
    with progress("benchmark", total=steps(engines, rounds, len(given))) as advance:
        report = benchmark(
            engines,
            photos,
            size=size,
            runs=runs,
            rounds=rounds,
            batches=batches or BATCHES,
            files=given,
            on_step=lambda name: advance(note=name),
        )
    for table in report.to_tables():
        output.print(table)
    for name, reason in report.missing.items():
        output.print(f"{name}: not measured ({reason})", markup=False, soft_wrap=True)
    about = report.provenance["hardware"]
    output.print(report.footnote(), markup=False)
    output.print(
        f"{about['cpu']}, {about['usable_cores']} of {about['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in report.provenance["versions"].items())
        + f"; commit {report.provenance['commit']}",
        markup=False,
    )
    output.print(report.verdict(), markup=False)
    if out:
        files = report.save(out, plot=plot)
        output.print(f"Written: {', '.join(map(str, files))}", markup=False, soft_wrap=True)
    if not any(row.info for row in report.rows):
        raise click.exceptions.Exit(FAILED)

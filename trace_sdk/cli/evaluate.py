"""`trace-sdk evaluate`: engines, baselines and other edge maps against human annotations, in one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from trace_sdk.cli.console import Advance, output, progress
from trace_sdk.errors import ArgumentError


@click.command("evaluate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the table and the cache.")
@click.option("--engine", "engines", multiple=True, metavar="NAME|PATH", help="Bundled engine or .onnx; repeatable.")
@click.option(
    "--edges",
    "folders",
    multiple=True,
    metavar="NAME=DIR",
    help="Edge maps made elsewhere, one a photo: DIR/STEM.png (8 or 16 bit grey) or .npy (float in [0, 1]), "
    "as large as the photo; sub-folders DIR/DATASET/ are looked into first. Repeatable.",
)
@click.option("--size", type=click.IntRange(16, 8192), help="Longest side that engines see, in pixels.")
@click.option("--device", default="auto", show_default=True, help="Of engines: auto, cpu, cuda or cuda:N.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images of each data set.")
@click.option("--thresholds", type=click.IntRange(1, 999), default=99, show_default=True, help="Fewer is faster.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Processes that match pixels."
)
def command(
    datasets: tuple[Path, ...],
    out: Path,
    engines: tuple[str, ...],
    folders: tuple[str, ...],
    size: int | None,
    device: str,
    limit: int | None,
    thresholds: int,
    workers: int,
) -> None:
    """Measure edges against human annotations: ODS, OIS, AP, clDice, and touching instances apart.

    Canny and a Lab colour gradient are always measured beside your engines, by the same code: a figure
    without its baselines is not a result. OUT/quality.json and OUT/quality.md are the table with what made
    it.

    \b
    DATASET is a folder of one of these kinds:
      instances.json + images/      COCO instances; edges are the borders of instances
      groundTruth/*.mat + images/   BSDS500, several annotators a photo
      NAME.png + NAME.ids.png       instance id maps (0 = background)

    \b
    Examples:
      trace-sdk evaluate coco_val/ --engine trace-small -o quality/
      trace-sdk evaluate coco_val/ bsds500_val/ --engine my.onnx --size 768 -o quality/
      trace-sdk evaluate coco_val/ --edges teacher=maps/ --limit 20 --thresholds 25 -o quick/

    The protocol is the one of BSDS: maps are thinned, cut at 99 thresholds, and matched one-to-one to human
    boundaries within 0.75 % of the image diagonal. A hundred photos take some minutes a method on two cores.
    "touch F" is the F-measure on the lines between touching instances of one class alone (on id maps: of any two
    instances), "touch R" their recall where all edges together are as precise as Canny's at its ODS.
    Results are kept for each image in OUT/cache; a run that was cut goes on where it stopped.
    """
    from trace_sdk.evaluation.datasets import open_dataset
    from trace_sdk.evaluation.evaluate import annotator_agreement, evaluate
    from trace_sdk.evaluation.methods import BASELINES, EdgeFolder, Engine, Method, check_names, not_measured
    from trace_sdk.evaluation.report import Report

    methods: list[Method] = [*BASELINES]
    methods += [EdgeFolder(name, folder) for name, folder in map(_named_folder, folders)]
    methods += [Engine(engine, device=device, size=size) for engine in engines]
    check_names(methods)
    sets = [open_dataset(path).first(limit) for path in datasets]
    if len({dataset.name for dataset in sets}) < len(sets):
        raise ArgumentError("Two data sets have a folder of the same name. Rename one; the table goes by these names.")
    for method in methods:
        if isinstance(method, EdgeFolder):
            for dataset in sets:
                method.check(dataset)

    report = Report(thresholds, missing=not_measured())
    for dataset in sets:
        report.add_dataset(dataset)
        with progress(f"annotators on {dataset.name}", total=len(dataset)) as advance:
            agreement = annotator_agreement(dataset, on_image=_naming(advance))
        if agreement is not None:
            report.agreement[dataset.name] = agreement
        for method in methods:
            with progress(f"{method.name} on {dataset.name}", total=len(dataset)) as advance:
                scores = evaluate(
                    dataset,
                    method,
                    thresholds=thresholds,
                    workers=workers,
                    cache=out / "cache",
                    on_image=_naming(advance),
                )
            report.add(dataset, method.name, scores)
    json_file, markdown = report.save(out)
    for table in report.to_tables():
        output.print(table)
    output.print(f"Written: {json_file}, {markdown}", markup=False, soft_wrap=True)


def _naming(advance: Advance) -> Callable[[str], None]:
    return lambda name: advance(note=name)


def _named_folder(argument: str) -> tuple[str, Path]:
    name, equals, folder = argument.partition("=")
    if not (name and equals and folder):
        raise ArgumentError(f"--edges {argument}: give NAME=DIR, for example --edges teacher=maps/")
    return name, Path(folder)

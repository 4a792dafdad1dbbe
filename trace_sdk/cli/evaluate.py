"""`trace-sdk evaluate`: engines, baselines and other edge maps against human annotations, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from trace_sdk.cli.console import Advance, output, progress
from trace_sdk.errors import ArgumentError


@click.command()
@click.argument("datasets", nargs=-1, required=True, metavar="DATASET...", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the table and the cache.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    metavar="NAME|PATH",
    help="Bundled engine, .onnx or folder of a student; repeatable.",
)
@click.option(
    "--edges",
    "folders",
    multiple=True,
    metavar="NAME=DIR",
    help="Edge maps made elsewhere, one a photo: DIR/STEM.png (8 or 16 bit grey), .npy or .tif (float in "
    "[0, 1]), as large as the photo; sub-folders DIR/DATASET/ are looked into first. Repeatable.",
)
@click.option(
    "--masks",
    "mask_files",
    multiple=True,
    metavar="NAME=FILE",
    help="Masks of a method, COCO results or data set: class-agnostic AP and AR100 on each COCO data set. Repeatable.",
)
@click.option(
    "--panoptic",
    "panoptic_files",
    multiple=True,
    metavar="NAME=FILE",
    help="COCO panoptic JSON, PNGs in the folder of its name beside it: PQ, SQ, RQ on each panoptic set. Repeatable.",
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
    mask_files: tuple[str, ...],
    panoptic_files: tuple[str, ...],
    size: int | None,
    device: str,
    limit: int | None,
    thresholds: int,
    workers: int,
) -> None:
    """Measure edges, masks and panoptic segments against human annotations.

    Edges: ODS, OIS, AP, clDice, and touching instances apart. Canny and a Lab colour gradient are always measured
    beside your engines, by the same code: a figure without its baselines is not a result. Masks: AP, AP50, AP75,
    AR100. Panoptic segments: PQ, SQ, RQ. OUT/quality.json and OUT/quality.md are the tables with what made them.
    Where only --masks or --panoptic is given, edges are left out.

    \b
    DATASET is a folder of one of these kinds:
      instances.json + images/      COCO instances; edges are the borders of instances
      panoptic.json + panoptic/*.png + images/   COCO panoptic; edges are the borders of all segments
      groundTruth/*.mat + images/   BSDS500, several annotators a photo
      NAME.png + NAME.ids.png       instance id maps (0 = background)

    \b
    Examples:
      trace-sdk evaluate coco_val/ --engine trace-small -o quality/
      trace-sdk evaluate coco_val/ bsds500_val/ --engine my.onnx --size 768 -o quality/
      trace-sdk evaluate coco_val/ --edges teacher=maps/ --limit 20 --thresholds 25 -o quick/
      trace-sdk evaluate coco_val/ --masks cutler=pred.json --masks cutler+trace=refined.json -o quality/
      trace-sdk evaluate pano_val/ --panoptic mine=out/panoptic.json -o quality/

    The protocol is the one of BSDS: maps are thinned, cut at 99 thresholds, and matched one-to-one to human
    boundaries within 0.75 % of the image diagonal. A hundred photos take some minutes a method on two cores.
    "touch F" is the F-measure on the lines between touching instances of one class alone (on id maps: of any two
    instances), "touch R" their recall where all edges together are as precise as Canny's at its ODS.
    Results are kept for each image in OUT/cache; a run that was cut goes on where it stopped.
    """
    from trace_sdk.evaluation.datasets import open_dataset
    from trace_sdk.evaluation.evaluate import annotator_agreement, evaluate
    from trace_sdk.evaluation.instances import score_file
    from trace_sdk.evaluation.methods import BASELINES, EdgeFolder, EngineMethod, Method, check_names, not_measured
    from trace_sdk.evaluation.panoptic import open_panoptic, score_panoptic
    from trace_sdk.evaluation.report import Report

    mask_rows = [_named("--masks", text) for text in mask_files]
    panoptic_rows = [_named("--panoptic", text) for text in panoptic_files]
    only_others = bool(mask_rows or panoptic_rows) and not (engines or folders)
    methods: list[Method] = [] if only_others else [*BASELINES]
    methods += [EdgeFolder(name, folder) for name, folder in (_named("--edges", text) for text in folders)]
    methods += [EngineMethod(engine, device=device, size=size) for engine in engines]
    check_names(methods)
    sets = [open_dataset(path).first(limit) for path in datasets]
    if len({dataset.name for dataset in sets}) < len(sets):
        raise ArgumentError("Two data sets have a folder of the same name. Rename one; the table goes by these names.")
    for method in methods:
        if isinstance(method, EdgeFolder):
            for dataset in sets:
                method.check(dataset)

    for option, rows, kind, holds in (
        ("--masks", mask_rows, "coco", "instances.json"),
        ("--panoptic", panoptic_rows, "panoptic", "panoptic.json"),
    ):
        if rows and not any(dataset.kind == kind for dataset in sets):
            raise ArgumentError(f"{option} needs a data set with {holds}; give its folder as DATASET.")
        if len({name for name, _ in rows}) < len(rows):
            raise ArgumentError(f"Two files of {option} have one name. Give each its own.")

    report = Report(thresholds, missing={} if only_others else not_measured())
    for dataset in sets:
        report.add_dataset(dataset)
        if dataset.kind == "coco":
            for name, file in mask_rows:
                report.masks.setdefault(name, {})[dataset.name] = score_file(dataset.path, file, dataset.names)
        if dataset.kind == "panoptic" and panoptic_rows:
            truth = open_panoptic(dataset.path)
            kept = {n: i for n, i in truth.images.items() if Path(str(i["file_name"])).stem in dataset.names}
            truth = replace(truth, images=kept)
            for name, file in panoptic_rows:
                with progress(f"{name} on {dataset.name}", total=len(kept)) as advance:
                    scores_of_segments = score_panoptic(truth, open_panoptic(file), _naming(advance))
                report.panoptic.setdefault(name, {})[dataset.name] = scores_of_segments
        if only_others:
            continue
        if dataset.kind == "bsds":
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


def _named(option: str, argument: str) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    if not (name and equals and path):
        raise ArgumentError(f"{option} {argument}: give NAME=PATH, for example {option} mine=results/")
    return name, Path(path)

"""Measure what each part of the pipeline brings: one table of ablations, in the order of the paper's table 3.

python recipes/trace-small/ablations.py OUT COCO_VAL SCENES --images WORK/distil/photos --labels WORK/labels/photos

The backbone is the shipped one (weights/backbone), the images are the first 20 photos and the first 20 scenes, the
students are short. Everything made is kept in OUT: run the same line again to go on. Writes OUT/ablations.json and .md.
"""

import argparse
import csv
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from teacher_edges import snapped_map, soft_map

from trace_sdk.atomic import write_text, write_whole
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli.console import progress, run_script
from trace_sdk.evaluation.datasets import Dataset, Sample, open_dataset
from trace_sdk.evaluation.edges import EdgeScores
from trace_sdk.evaluation.evaluate import evaluate
from trace_sdk.evaluation.methods import BASELINES, EngineMethod, Method
from trace_sdk.evaluation.report import Report
from trace_sdk.reports import markdown_table
from trace_sdk.student.distill import DistillSettings, distill
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.teacher.pseudo_labels import standard_scores
from trace_sdk.teacher.teacher import Teacher, TeacherSettings
from trace_sdk.training.state import STATE

HERE = Path(__file__).resolve().parent
TRAINED = HERE / "weights/backbone"
COUNT = 20  # images of each data set
PHOTO_SIZE, SCENE_SIZE = 800, 448  # at which the recipe labels, pixels
MIDDLE_BLOCKS = (2, 3, 4, 5, 6)
THRESHOLDS = 33
MISSING = "not measured"

DECODER_STEPS, MORE_STEPS = 200, 150
SHORT = partial(
    DistillSettings,
    steps=DECODER_STEPS + MORE_STEPS,
    tokens=4096,
    sizes=(256,),
    batches=30,
    lora_learning_rate=1e-3,  # five times the recipe's, for so few steps
)
LORA_FROM = DECODER_STEPS / (DECODER_STEPS + MORE_STEPS)
STUDENTS = {
    "decoder alone": SHORT(lora_from=1),
    "+ LoRA": SHORT(lora_from=LORA_FROM, reconstruction=0),
    "+ LoRA + reconstruction": SHORT(lora_from=LORA_FROM),
}


@cache
def teacher(backbone: Path, settings: TeacherSettings) -> Teacher:
    """One for all images."""
    return Teacher(PixelBackbone.load(backbone), settings)


@dataclass(frozen=True)
class Reading:
    """A backbone's ABDiv with the paper's mean map or the recipe's form; t None: by IEP. Kept in `out`."""

    out: Path
    t: float | None
    backbone: Path = TRAINED
    form: str = "mean"
    blocks: tuple[int, ...] | None = None
    windows: bool = False

    def settings(self, dataset: Dataset) -> TeacherSettings:
        """Windows of 256 px on an enlarged photo, else the photo whole."""
        return TeacherSettings(
            size=PHOTO_SIZE if self.windows and dataset.kind != "ids" else SCENE_SIZE,
            tile=256 if self.windows else None,
            timesteps=None if self.t is None else (self.t,),
            iep_rows=256,
            form=self.form,
            blocks=self.blocks,
            precision="bf16",
        )

    def folder(self, dataset: Dataset) -> Path:
        """One .npz an image: ABDiv float32 [h, w] over tokens, and the t it was read at."""
        key = hashlib.sha256(f"{self.backbone} {self.settings(dataset)}".encode()).hexdigest()[:12]
        return self.out / "abdiv" / key / dataset.name

    def abdiv(self, dataset: Dataset, sample: Sample) -> NDArray[np.float32]:
        """Of one image: float32 [h, w] over tokens."""
        file = self.folder(dataset) / f"{sample.name}.npz"
        if not file.is_file():
            found = teacher(self.backbone, self.settings(dataset)).annotate(sample.rgb)
            with write_whole(file) as stream:
                np.savez(stream, abdiv=found.abdiv, t=found.timesteps)
        with np.load(file) as kept:
            abdiv: NDArray[np.float32] = kept["abdiv"]
        return abdiv

    def timesteps(self, dataset: Dataset) -> dict[str, int]:
        """How many of the images read so far have which t."""
        return Counter(f"{np.load(file)['t'][0]:.1f}" for file in sorted(self.folder(dataset).glob("*.npz")))


@dataclass(frozen=True)
class TeacherEdges:
    """One reading, or the mean of several in standard scores; snapped: times the colour gradient, as students learn."""

    name: str
    readings: tuple[Reading, ...]
    snapped: bool = False
    timed: bool = False

    def fingerprint(self, dataset: Dataset, sample: Sample) -> str:
        return f"{self.readings} {self.snapped}"

    def edges(self, dataset: Dataset, sample: Sample) -> NDArray[np.float32]:
        maps = [reading.abdiv(dataset, sample) for reading in self.readings]
        abdiv = maps[0] if len(maps) == 1 else np.mean([standard_scores(one) for one in maps], axis=0, dtype=np.float32)
        return snapped_map(abdiv, sample.rgb) if self.snapped else soft_map(abdiv, sample.rgb.shape[:2])


def student(name: str, out: Path, images: Path, labels: Path) -> Method:
    """All go on from one decoder, which learnt alone, for the same number of steps on the same crops."""
    common, folder = out / "students/common", out / "students" / name.replace(" ", "-")
    learn = partial(train, images=LabelledImages([images], labels, seed=0))
    if not (common / "student.json").is_file():
        learn(common, SHORT(steps=DECODER_STEPS, lora_from=1))
    if not (folder / STATE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for file in (STATE, "curves.csv"):
            shutil.copyfile(common / file, folder / file)
    if not (folder / "student.json").is_file():
        learn(folder, STUDENTS[name])
    return engine(str(folder), f"student: {name}")


def train(out: Path, settings: DistillSettings, images: LabelledImages) -> None:
    """A student from the shipped backbone, written to `out`."""
    with progress(f"distill {out.name}", total=settings.steps) as advance:
        distill(PixelBackbone.load(TRAINED), images, out, settings, report=lambda step, losses: advance(note=str(step)))


def last_losses(folder: Path) -> dict[str, float]:
    """Means of a student's loss terms over its steps after the common ones."""
    rows = csv.DictReader((folder / "curves.csv").read_text("utf-8").splitlines())
    curve = [row for row in rows if int(row["step"]) > DECODER_STEPS]
    return {term: float(np.mean([float(row[term]) for row in curve])) for term in ("dice", "graded", "reconstruction")}


def engine(path: str, name: str) -> Method:
    """An engine or a student's folder under a row's name."""
    method = EngineMethod(path, device="cpu")
    method.name = name
    return method


def rows(out: Path, images: Path, labels: Path) -> dict[str, Callable[[], Method]]:
    """What makes each row, in the order of the table."""
    mean = partial(Reading, out)
    per_head = partial(Reading, out, form="log-per-head")
    recipe = partial(per_head, blocks=MIDDLE_BLOCKS, windows=True)
    ensemble = tuple(recipe(t) for t in (0.2, 0.3, 0.4, 0.5))
    readings: dict[str, tuple[tuple[Reading, ...], bool]] = {
        "untrained backbone, mean map, t=.2": ((mean(0.2, backbone=out / "untrained"),), False),
        "untrained backbone, as the recipe reads": ((recipe(0.2, backbone=out / "untrained"),), False),
        "ABDiv of the mean map, t=0": ((mean(0.0),), False),
        "ABDiv of the mean map, t=.6": ((mean(0.6),), False),
        "ABDiv of the mean map, t=.2": ((mean(0.2),), False),
        "ABDiv of the mean map, t by IEP": ((mean(None),), False),
        "per-head form, t=.2": ((per_head(0.2),), False),
        "+ blocks 2 to 6": ((per_head(0.2, blocks=MIDDLE_BLOCKS),), False),
        "+ windows on the enlarged photo": ((recipe(0.2),), False),
        "the same, t by IEP": ((recipe(None),), False),
        "+ ensembling over t": (ensemble, False),
        "snapped target, t=.2": ((recipe(0.2),), True),
        "snapped target, ensembled": (ensemble, True),
    }
    return (
        {baseline.name: lambda baseline=baseline: baseline for baseline in BASELINES}
        | {name: partial(TeacherEdges, name, *reading) for name, reading in readings.items()}
        | {f"student: {name}": partial(student, name, out, images, labels) for name in STUDENTS}
        | {name: partial(engine, name, name) for name in ("trace-small", "trace-nano")}
    )


def main() -> None:
    """Row after row, in the table's order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--limit", type=int, default=COUNT, help="images of each data set")
    parser.add_argument("--images", type=Path, required=True, help="labelled photos for the students")
    parser.add_argument("--labels", type=Path, required=True, help="what `trace-sdk label` wrote for them")
    parser.add_argument(
        "--row", action="append", help='only what this is part of, as in "t=.2" or "trace-nano on scenes"; repeatable'
    )
    options = parser.parse_args()
    if not (options.out / "untrained").is_dir():
        subprocess.run([sys.executable, HERE / "random_backbone.py", options.out / "untrained"], check=True)
    report = Report(THRESHOLDS)
    sets = [open_dataset(path).first(options.limit) for path in options.datasets]
    for dataset in sets:
        report.add_dataset(dataset)
    for name, make in rows(options.out, options.images, options.labels).items():
        asked = [one for one in sets if not options.row or any(p in f"{name} on {one.name}" for p in options.row)]
        if not asked:
            report.missing[name] = MISSING
            continue
        method = make()
        for dataset in asked:
            with progress(f"{name} on {dataset.name}", total=len(dataset)) as advance:
                scores = evaluate(
                    dataset,
                    method,
                    thresholds=THRESHOLDS,
                    cache=options.out / "cache",
                    on_image=lambda image, advance=advance: advance(note=image),
                )
            report.add(dataset, name, scores)
    write(report, options.out, sets)


def cells(scores: EdgeScores | None) -> tuple[str, str]:
    """ODS and AP."""
    return (f"{scores.ods:.3f}", f"{scores.ap:.3f}") if scores else (MISSING, MISSING)


def write(report: Report, out: Path, sets: list[Dataset]) -> None:
    """The table as JSON, with the t that IEP chose and the students' losses, and as Markdown, also printed."""
    students = {name: out / "students" / name.replace(" ", "-") for name in STUDENTS}
    found = {name: last_losses(folder) for name, folder in students.items() if (folder / "student.json").is_file()}
    emergence = {dataset.name: Reading(out, None).timesteps(dataset) for dataset in sets}
    steps = {"decoder alone": DECODER_STEPS, "then": MORE_STEPS}
    content = report.to_dict() | {"t by IEP": emergence, "student steps": steps, "student losses": found}
    write_text(out / "ablations.json", json.dumps(content, indent=2) + "\n")
    names = [f"{dataset.name}, {figure}" for dataset in sets for figure in ("ODS", "AP")]
    lines = [[name, *(cell for one in sets for cell in cells(row.get(one.name)))] for name, row in report.rows.items()]
    lines += [[name, *[MISSING] * len(names)] for name in report.missing]
    table = "\n".join(markdown_table(["", *names], lines))
    write_text(out / "ablations.md", f"{table}\n")
    print(table)


if __name__ == "__main__":
    run_script(main)

"""Write a teacher's edges as soft maps for `trace-sdk evaluate --edges teacher=OUT/plain --edges target=OUT/snapped`.

Plain is its ABDiv; snapped is what a student learns, the same times the photo's colour gradient.

python recipes/trace-small/teacher_edges.py WORK/backbone OUT DATASET… --form log-per-head -t 0.2 --size 800 --tile 256
python recipes/trace-small/teacher_edges.py WORK/backbone OUT DATASET… --limit 20          # t by IEP
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trace_sdk.atomic import write_whole
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli.console import progress, run_script
from trace_sdk.evaluation.baselines import lab_gradient
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.student.snapping import graded_edges
from trace_sdk.teacher.pseudo_labels import standard_scores
from trace_sdk.teacher.teacher import FORMS, Teacher, TeacherSettings


def soft_map(abdiv: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """ABDiv [h, w] as values in [0, 1] over (H, W) pixels: its range up to the 99.5 % quantile."""
    low, high = float(abdiv.min()), float(np.quantile(abdiv, 0.995))
    return np.clip(enlarge((abdiv - low) / max(high - low, 1e-9), size), 0, 1)


def snapped_map(abdiv: NDArray[np.float32], rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The graded edges that a student learns, at the photo's own size: [H, W] in [0, 1]."""
    return graded_edges(lab_gradient(rgb), enlarge(standard_scores(abdiv), rgb.shape[:2]))


def save(file: Path, edges: NDArray[np.float32]) -> None:
    """Write one map, whole or not at all."""
    with write_whole(file) as stream:
        np.save(stream, edges)


def enlarge(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """[h, w] over tokens as [H, W] over pixels, bicubic."""
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC))


def main() -> None:
    """Two .npy an image; images that have them are skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--tile", type=int)
    parser.add_argument("--form", choices=FORMS, default="mean")
    parser.add_argument("--block", dest="blocks", action="append", type=int)
    parser.add_argument("-t", "--timestep", dest="timesteps", action="append", type=float)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    settings = TeacherSettings(
        size=options.size,
        tile=options.tile,
        form=options.form,
        blocks=tuple(options.blocks) if options.blocks else None,
        timesteps=tuple(options.timesteps) if options.timesteps else None,
        precision="bf16",
    )
    teacher = Teacher(PixelBackbone.load(options.backbone), settings)
    for path in options.datasets:
        dataset = open_dataset(path)
        if options.limit:
            dataset = dataset.first(options.limit)
        with progress(dataset.name, total=len(dataset.names)) as advance:
            for name in dataset.names:
                plain, snapped = (options.out / form / dataset.name / f"{name}.npy" for form in ("plain", "snapped"))
                if not snapped.is_file():
                    rgb = dataset.read(name).rgb
                    abdiv = teacher.annotate(rgb).abdiv
                    save(plain, soft_map(abdiv, rgb.shape[:2]))
                    save(snapped, snapped_map(abdiv, rgb))
                advance(note=name)


if __name__ == "__main__":
    run_script(main)

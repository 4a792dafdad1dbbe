"""Write a teacher's edges as soft maps for `trace-sdk evaluate --edges NAME=OUT`.

python recipes/trace-small/teacher_edges.py WORK/backbone OUT DATASET… --form log-per-head -t 0.2 -t 0.4
python recipes/trace-small/teacher_edges.py WORK/backbone OUT DATASET… --limit 20          # t by IEP
python recipes/trace-small/teacher_edges.py random OUT DATASET… --form log-per-head -t 0.2 -t 0.4
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from trace_sdk.backbones.pixel import SMALL, PixelBackbone
from trace_sdk.cli.console import progress
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.teacher.teacher import FORMS, Teacher, TeacherSettings


def soft_map(abdiv: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """ABDiv [h, w] as values in [0, 1] over (H, W) pixels: its range up to the 99.5 % quantile."""
    low, high = float(abdiv.min()), float(np.quantile(abdiv, 0.995))
    scaled = Image.fromarray((abdiv - low) / max(high - low, 1e-9))
    return np.clip(np.asarray(scaled.resize(size[::-1], Image.Resampling.BICUBIC)), 0, 1)


def main() -> None:
    """One .npy an image; images that have one are skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help='folder, or "random" for untrained weights of the small shape')
    parser.add_argument("out", type=Path)
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--form", choices=FORMS, default="mean")
    parser.add_argument("-t", "--timestep", dest="timesteps", action="append", type=float)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    torch.manual_seed(0)
    backbone = PixelBackbone.create(**SMALL) if options.backbone == "random" else PixelBackbone.load(options.backbone)
    timesteps = tuple(options.timesteps) if options.timesteps else None
    settings = TeacherSettings(size=options.size, form=options.form, timesteps=timesteps, precision="bf16")
    teacher = Teacher(backbone, settings)
    for path in options.datasets:
        dataset = open_dataset(path)
        if options.limit:
            dataset = dataset.first(options.limit)
        with progress(dataset.name, total=len(dataset.names)) as advance:
            for name in dataset.names:
                file = options.out / dataset.name / f"{name}.npy"
                if not file.is_file():
                    rgb = dataset.read(name).rgb
                    file.parent.mkdir(parents=True, exist_ok=True)
                    np.save(file, soft_map(teacher.annotate(rgb).abdiv, rgb.shape[:2]))
                advance(note=name)


if __name__ == "__main__":
    main()

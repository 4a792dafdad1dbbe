"""Make the pictures of walkthrough.md, one photo through the whole method, and the README's.

    python docs/make_pictures.py examples/photos/cars.jpg --backbone runs/backbone --engine trace-small \\
        -o docs/pictures

Without --engine the student's pictures are left as they are. `made-with.json` says what the pictures were made
with.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from trace_sdk import EdgeDetector
from trace_sdk.atomic import write_bytes, write_text
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.images import read_image
from trace_sdk.teacher.emergence import Emergence
from trace_sdk.teacher.plot import along_t, colour_labels
from trace_sdk.teacher.teacher import Annotation, Teacher, TeacherSettings

SHOWN = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)  # and t*
WIDTH = 10.0  # of a picture, inches
DPI = 100
QUALITY = 72
ACCENT = "#d62f5b"

Picture = NDArray[np.uint8] | NDArray[np.float32]


def draw_panels(out: Path, panels: Mapping[str, Picture], columns: int, marked: str = "", cmap: str = "gray") -> None:
    """Images with their titles, row by row, one of them marked; grey ones are from 0 to 1."""
    height, width = next(iter(panels.values())).shape[:2]
    rows = -(-len(panels) // columns)
    figure = Figure((WIDTH, rows * (WIDTH / columns * height / width + 0.35)), layout="constrained")
    for number, (title, image) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(rows, columns, number)
        axis.imshow(image, cmap=cmap, vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(title, fontsize=10, color=ACCENT if title == marked else "black")
    save(figure, out)


def draw_curve(out: Path, emergence: Emergence, window: tuple[float, float]) -> None:
    """KL along t, the search window and t*."""
    figure = Figure((6.4, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(*window, color=ACCENT, alpha=0.08, linewidth=0, label="search window")
    axis.plot(emergence.timesteps, emergence.kl, color="black", marker="o", markersize=4)
    best = emergence.kl[emergence.timesteps.index(emergence.t_star)]
    axis.plot(
        emergence.t_star,
        best,
        color=ACCENT,
        marker="o",
        markersize=9,
        linestyle="none",
        label=f"t* = {emergence.t_star:g}",
    )
    axis.set(xlabel="t", ylabel="KL in nats", xlim=(0, 1), ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write a figure as the suffix says, .png or .jpg."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    options = {"quality": QUALITY} if out.suffix == ".jpg" else {"optimize": True}
    figure.savefig(buffer, format=out.suffix[1:], dpi=DPI, pil_kwargs=options)
    write_bytes(out, buffer.getvalue())


def draw_teacher(teacher: Teacher, rgb: NDArray[np.uint8], out: Path) -> Annotation:
    """Steps 1 to 5: noised images, KL curve, attention and ABDiv along t, labels."""
    annotation = teacher.annotate(rgb)
    assert annotation.emergence is not None
    t_star = annotation.emergence.t_star
    timesteps = tuple(sorted({*SHOWN, t_star}))
    titles = {t: f"t* = {t:g}" if t == t_star else f"t = {t:g}" for t in timesteps}
    images = teacher.prepare(rgb)
    with torch.inference_mode():
        noised = teacher.trajectory(images, teacher.noise_like(images), timesteps)
    steps = dict(zip(titles.values(), along_t(teacher, rgb, timesteps), strict=True))
    marked = titles[t_star]
    draw_panels(out / "noised.jpg", {titles[t]: to_pixels(x_t) for t, x_t in noised}, 4, marked)
    draw_curve(out / "kl-curve.png", annotation.emergence, teacher.settings.window)
    draw_panels(out / "attention.png", {title: pca for title, (pca, _) in steps.items()}, 4, marked)
    maps = {title: brighten(divergence) for title, (_, divergence) in steps.items()}
    draw_panels(out / "abdiv.png", maps, 4, marked, cmap="magma")
    size = (images.shape[-1], images.shape[-2])
    photo = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))
    labels = colour_labels(np.kron(annotation.labels, np.ones((8, 8), np.int8)))
    both = (photo * 0.45 + labels * 0.55).astype(np.uint8)
    draw_panels(out / "labels.jpg", {"photo": photo, "labels": labels, "both": both}, 3)
    return annotation


def draw_student(detector: EdgeDetector, photo: Path, out: Path) -> dict[str, Any]:
    """Steps 6 and 7: edges, thinned, drawn over the photo; and the README's picture."""
    edges = detector.run(photo)
    thick = np.asarray(Image.fromarray(edges.thin()).filter(ImageFilter.MaxFilter(3)))
    panels = {"edge probability": edges.probability, "thinned (drawn 3 px wide)": thick}
    draw_panels(out / "edges.jpg", panels, 2)
    overlay = edges.overlay()
    panels = {"photo": edges.rgb, "instance edges": edges.probability, "overlay": np.asarray(overlay)}
    draw_panels(out / "readme.jpg", panels, 3)
    buffer = io.BytesIO()
    overlay.thumbnail((960, 960))
    overlay.save(buffer, "JPEG", quality=QUALITY)
    write_bytes(out / "overlay.jpg", buffer.getvalue())
    return {name: edges.info[name] for name in ("engine", "engine_sha256", "size", "threshold")}


def to_pixels(images: torch.Tensor) -> NDArray[np.uint8]:
    """[1, 3, H, W] in [−1, 1] → uint8 [H, W, 3]."""
    pixels = (images[0].permute(1, 2, 0) * 127.5 + 127.5).clamp(0, 255)
    return pixels.cpu().numpy().astype(np.uint8)


def brighten(abdiv: NDArray[np.float32]) -> NDArray[np.float32]:
    """0 … 1, with the highest half per cent cut off."""
    highest = max(float(np.quantile(abdiv, 0.995)), 1e-12)
    brightened: NDArray[np.float32] = np.clip(abdiv / np.float32(highest), 0, 1)
    return brightened


def main() -> None:
    """Draw what there is a backbone and an engine for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--backbone", type=Path, required=True, help="folder that `trace-sdk pretrain` wrote")
    parser.add_argument("--engine", help="bundled name or .onnx file; without it no student's pictures")
    parser.add_argument("--size", type=int, default=512, help="longest side shown to the backbone, pixels")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    teacher = Teacher(PixelBackbone.load(options.backbone), TeacherSettings(size=options.size))
    annotation = draw_teacher(teacher, read_image(options.photo).rgb, options.out)
    record = options.out / "made-with.json"
    about = json.loads(record.read_bytes()) if record.is_file() else {}
    about["teacher"] = {
        "photo": options.photo.name,
        "backbone_sha256": PixelBackbone.sha256(options.backbone),
        "size": options.size,
        "t_star": annotation.timesteps[0],
        "interior_rule": annotation.rule,
    }
    if options.engine:
        about["student"] = {
            "photo": options.photo.name,
            **draw_student(EdgeDetector(options.engine), options.photo, options.out),
        }
    write_text(record, json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()

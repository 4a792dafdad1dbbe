"""One picture of what the teacher sees: KL curve, attention and ABDiv along t, a prompt's words, labels."""

from __future__ import annotations

import io
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trace_sdk.atomic import write_bytes
from trace_sdk.backbones.words import WordedPrompt
from trace_sdk.errors import MissingExtraError
from trace_sdk.kernels import abdiv
from trace_sdk.teacher.limits import memory_of
from trace_sdk.teacher.teacher import Annotation, Teacher
from trace_sdk.teacher.words import word_maps

CURVES = {
    "kl": ("KL(SA(X$_{t_{prev}}$) ‖ SA(X$_t$))", "nats"),
    "l2": ("‖SA(X$_{t_{prev}}$) − SA(X$_t$)‖$_2$", ""),
    "entropy": ("|H(SA(X$_{t_{prev}}$)) − H(SA(X$_t$))|", "nats"),
    "wasserstein": ("W$_1$(SA(X$_{t_{prev}}$), SA(X$_t$))", "tokens"),
}
SHOWN = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
EDGE_COLOUR, INTERIOR_COLOUR, UNCERTAIN_COLOUR = (240, 80, 60), (40, 90, 160), (200, 200, 200)


@dataclass(frozen=True)
class Words:
    """A prompt of the teacher's model, and those of its words to show; none means all."""

    prompt: WordedPrompt
    words: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ArgumentError if a word is not in the prompt."""
        for word in self.words:
            self.prompt.positions(word)


def plot(
    teacher: Teacher, rgb: NDArray[np.uint8], annotation: Annotation, out: Path, words: Words | None = None
) -> None:
    """Draw one photo's way through the teacher into a PNG.

    Args:
        words: adds a row for each word: where the image looks at it, from least (dark) to most over all t shown.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ArgumentError: a word is not in the prompt, or the model takes no text.
        OutOfMemoryError: the device's memory does not hold the maps.
    """
    with memory_of(teacher.backbone, teacher.settings.size):
        steps = along_t(teacher, rgb, SHOWN)
        words_shown: list[tuple[str, NDArray[np.float32]]] = []  # with maps [steps, H, W]
        if words:
            found = word_maps(teacher, rgb, words.prompt, words.words, SHOWN)
            words_shown = list(zip(found.words, found.maps.swapaxes(0, 1), strict=True))
    rows = len(words_shown)
    figure = new_figure(2.6 * len(SHOWN), 9.6 + 2.8 * rows)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.3, 2 + rows))  # so that no curve sets rows of maps apart
    photo, curve, labels = upper.subplots(1, 3)
    grid = lower.subplots(2 + rows, len(SHOWN))
    photo.imshow(rgb)
    photo.set_title("photo")
    if annotation.emergence:
        emergence = annotation.emergence
        curve.plot(emergence.timesteps, emergence.kl, marker="o", color="black")
        curve.axvline(emergence.t_star, color="tab:red", label=f"t* = {emergence.t_star:g}")
        curve.axvspan(*teacher.settings.window, color="tab:red", alpha=0.08, label="search window")
        curve.legend()
    title, unit = CURVES[teacher.settings.criterion]
    curve.set(title=title, xlabel="t", ylabel=unit)
    labels.imshow(colour_labels(annotation.labels), interpolation="nearest")
    labels.set_title(f"labels: edge, interior ({annotation.rule}), uncertain")
    for column, (t, (attention, divergence)) in enumerate(zip(SHOWN, steps, strict=True)):
        top, bottom = grid[:2, column]
        top.imshow(attention)
        top.set_title(f"attention PCA, t = {t:g}")
        bottom.imshow(divergence, cmap="magma", vmax=float(np.quantile(divergence, 0.995)))
        bottom.set_title(f"ABDiv, t = {t:g}")
        shown = [top, bottom]
        for row, (word, maps) in enumerate(words_shown):
            axes = grid[2 + row, column]
            axes.imshow(maps[column], cmap="viridis", vmin=float(maps.min()), vmax=float(maps.max()))
            axes.set_title(f"“{word}”, t = {t:g}")
            shown.append(axes)
        for axes in shown:
            axes.set_axis_off()
    for axes in (photo, labels):
        axes.set_axis_off()
    save_figure(figure, out)


def plot_t_star(t_star: Sequence[float], window: tuple[float, float], out: Path) -> None:
    """Draw how often each t* was found over a data set (paper's figure 7) into a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    found = Counter(t_star)
    figure = new_figure(6, 3.6)
    axes = figure.add_subplot()
    steps = sorted(found)
    width = 0.8 * min((b - a for a, b in itertools.pairwise(steps)), default=0.1)
    axes.bar(steps, [found[t] for t in steps], width=width, color="tab:red")
    axes.axvspan(*window, color="tab:red", alpha=0.08, label="search window")
    axes.set(title=f"t* of {len(t_star)} photos", xlabel="t*", ylabel="photos", xlim=(0, 1))
    axes.legend()
    save_figure(figure, out)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError('--plot needs matplotlib: pip install "trace-sdk[train]".') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, out: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=70)
    write_bytes(out, buffer.getvalue())


@torch.inference_mode()
def along_t(
    teacher: Teacher, rgb: NDArray[np.uint8], timesteps: tuple[float, ...]
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """For each timestep: attention PCA as colours [H, W, 3] in [0, 1], and ABDiv [H, W]."""
    clean = teacher.backbone.encode(teacher.prepare(rgb))
    grid = teacher.grid(clean)
    shown = []
    for t, x_t in teacher.trajectory(clean, teacher.noise_like(clean), timesteps):
        log_map = teacher.attention(x_t, t)
        shown.append((attention_pca(log_map[0], grid), abdiv(log_map, grid)[0].cpu().numpy()))
    return shown


def attention_pca(log_map: torch.Tensor, grid: tuple[int, int]) -> NDArray[np.float32]:
    """First three principal components of the attention rows as RGB [H, W, 3] in [0, 1]."""
    rows = log_map.float().exp2().sqrt()  # square roots put distributions on a sphere, where PCA is at home
    with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
        torch.manual_seed(0)
        components, _, _ = torch.pca_lowrank(rows, q=3)
    low, high = components.quantile(0.01, dim=0), components.quantile(0.99, dim=0)
    colours = ((components - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return colours.view(*grid, 3).cpu().numpy()


def colour_labels(labels: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Ternary labels [H, W] as colours [H, W, 3]: edge red, interior blue, uncertain grey."""
    palette = np.array([INTERIOR_COLOUR, EDGE_COLOUR, UNCERTAIN_COLOUR], np.uint8)  # 0, 1, −1 as index
    colours: NDArray[np.uint8] = palette[labels.astype(int)]
    return colours

"""The teacher: one image → IEP, ABDiv, ternary labels, with no annotation and no training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trace_sdk.backbones.backbone import Backbone
from trace_sdk.backbones.device import torch_dtype
from trace_sdk.errors import ArgumentError
from trace_sdk.kernels.divergence import NEIGHBOURHOODS
from trace_sdk.network_input import scaled
from trace_sdk.teacher.attention import AttentionAverage
from trace_sdk.teacher.boundary import MeanBoundary, PerHeadBoundary
from trace_sdk.teacher.criteria import CRITERIA
from trace_sdk.teacher.emergence import TRAJECTORIES, Emergence, row_sample, schedule, search_window
from trace_sdk.teacher.limits import in_fp32, is_finite, memory_of
from trace_sdk.teacher.pseudo_labels import ternary_labels
from trace_sdk.tiling import Window, blend, tiles

log = logging.getLogger("trace_sdk")
LEAST_SIZE = 64  # no backbone takes less
FORMS = ("mean", "per-head", "log-per-head")


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher reads a backbone.

    Attributes:
        size: longest side in pixels at which the image is shown, both scaled up and down; sides become
            multiples of what the backbone takes (8 px from 64 for a pixel backbone).
        tile: side in pixels of square windows, overlapping by a quarter, in which a larger image is read; their
            ABDiv is blended, and the KL of the IEP is the mean over all of them. Finer tokens without attention
            over more of them than the backbone was trained on. None reads the image whole.
        timesteps: fixed timesteps in [0, 1) whose ABDiv maps are averaged, each divided by its mean;
            None finds t* by the Instance Emergence Point.
        stride: of the IEP schedule, in thousandths.
        window: (lowest, highest) t that t* may take.
        criterion: what t* is the largest of: "kl" (the paper's), or for comparison "l2", "entropy", "wasserstein"; see
            `criteria`.
        iep_rows: how many rows of the map the KL is taken on, a fixed sample: no N×N map is then held, and 256 rows
            move the KL by about 1 % (DESIGN section 6); None takes all of them.
        trajectory: "noising" (one fixed ε) or "inversion" (the model's own flow).
        form: "mean" for the paper's divergence of the head-averaged map; without any N×N map, "per-head" for the
            mean of each head's own divergence, "log-per-head" for the mean of its log1p, symmetric: the student's
            features averaged, less ruled by the few heads with the largest values.
        neighbourhood: 4 or 8; the per-head forms have 4 only.
        blocks: self-attention blocks to average, None for all.
        mirror: average with the mirrored image's map.
        precision: of the backbone's arithmetic, "fp32", "bf16" or "fp16"; maps are taken in fp32 in all of them. A
            backbone that was opened in half precision is used as it is, and its precision must be said here. Where
            it overflows, the image is read in fp32.
        seed: of the noise ε.
    """

    size: int = 512
    tile: int | None = None
    timesteps: tuple[float, ...] | None = None
    stride: int = 100
    window: tuple[float, float] = (0.1, 0.6)
    criterion: str = "kl"
    iep_rows: int | None = None
    trajectory: str = "noising"
    form: str = "mean"
    neighbourhood: int = 4
    blocks: tuple[int, ...] | None = None
    mirror: bool = False
    precision: str = "fp32"
    seed: int = 0

    def check(self) -> None:
        """Raise ArgumentError naming the setting that is out of its range."""
        if self.size < LEAST_SIZE:
            raise ArgumentError(f"size must be at least {LEAST_SIZE} px, got {self.size}.")
        if self.timesteps is not None and not (self.timesteps and all(0 <= t < 1 for t in self.timesteps)):
            raise ArgumentError(f"timesteps must lie in [0, 1), got {self.timesteps}.")
        if self.timesteps is None:
            search_window(schedule(self.stride)[1:], self.window)
        if self.trajectory not in TRAJECTORIES:
            raise ArgumentError(f"trajectory must be one of {sorted(TRAJECTORIES)}, got {self.trajectory!r}.")
        if self.criterion not in CRITERIA:
            raise ArgumentError(f"criterion must be one of {', '.join(CRITERIA)}; got {self.criterion!r}.")
        if self.form not in FORMS:
            raise ArgumentError(f"form must be one of {', '.join(FORMS)}; got {self.form!r}.")
        torch_dtype(self.precision)
        if self.blocks is not None and not 0 < len(self.blocks) == len(set(self.blocks)):
            raise ArgumentError(f"blocks must name at least one block, each once, or be None for all; {self.blocks}.")
        if not -(2**63) <= self.seed < 2**64:
            raise ArgumentError(f"seed must be a number of 64 bits, got {self.seed}.")
        if self.iep_rows is not None and self.iep_rows < 1:
            raise ArgumentError(f"iep_rows must be at least 1, or None for all rows, got {self.iep_rows}.")
        if self.neighbourhood not in NEIGHBOURHOODS or (self.form != "mean" and self.neighbourhood != 4):
            raise ArgumentError(f"neighbourhood must be 4 or 8 (4 with a per-head form), got {self.neighbourhood}.")


@dataclass(frozen=True)
class Annotation:
    """What the teacher says about one image; H×W is the token grid.

    Attributes:
        abdiv: float32 [H, W], ≥ 0: nats with one timestep, relative to each map's mean with several.
        labels: int8 [H, W]: 1 edge, 0 interior, −1 uncertain.
        rule: how the interior was found: "mu-sigma", "quantile" or "flat".
        timesteps: the timesteps whose ABDiv this is; one, t*, unless they were fixed.
        emergence: the KL curve and t*, None with fixed timesteps.
    """

    abdiv: NDArray[np.float32]
    labels: NDArray[np.int8]
    rule: str
    timesteps: tuple[float, ...]
    emergence: Emergence | None


class Teacher:
    """Reads instance edges from a frozen backbone's self-attention.

    Args:
        backbone: used as it is, in evaluation mode, on the device where its weights are.
        settings: see `TeacherSettings`.

    Raises:
        ArgumentError: a setting is out of its range, or the backbone has no such block.
    """

    def __init__(self, backbone: Backbone, settings: TeacherSettings | None = None) -> None:
        self.backbone = backbone.eval()
        self.settings = settings or TeacherSettings()
        self.settings.check()
        last = self.backbone.self_attention_blocks - 1
        if self.settings.blocks is not None and not all(0 <= block <= last for block in self.settings.blocks):
            raise ArgumentError(f"blocks must lie in 0 … {last} for this backbone, got {self.settings.blocks}.")
        self._blocks = self.settings.blocks or tuple(range(last + 1))
        self._said_overflow = False
        self._check_against_backbone()

    def _check_against_backbone(self) -> None:
        size, tile, precision = self.settings.size, self.settings.tile, self.settings.precision
        least, step = self.backbone.min_size, self.backbone.multiple_of
        if size < least:
            raise ArgumentError(f"size must be at least {least} px for this backbone, got {size}.")
        if tile is not None and (tile < least or tile % step):
            raise ArgumentError(f"tile must be a multiple of {step} px from {least} for this backbone, got {tile}.")
        tokens = getattr(self.backbone, "most_tokens", None)
        if tokens is not None and (tile or size) > tokens * self.backbone.token_side:
            raise ArgumentError(
                f"This backbone has learnt positions up to {tokens * self.backbone.token_side} px, got {tile or size}. "
                "Lower size, or read larger images in windows (tile)."
            )
        if self.backbone.dtype not in (torch.float32, torch_dtype(precision)):
            raise ArgumentError(
                f"The backbone's weights are {self.backbone.dtype}, but precision is {precision}. Open it with "
                f"precision={precision!r}, or change the setting."
            )

    def annotate(self, rgb: NDArray[np.uint8]) -> Annotation:
        """Edges of one image, uint8 [H, W, 3] RGB. The same image and seed give the same answer."""
        return self.annotate_batch([self.prepare(rgb)])[0]

    @torch.inference_mode()
    def annotate_batch(self, prepared: Sequence[Tensor]) -> list[Annotation]:
        """Edges of several images of one shape, each as `prepare` gives it, in one pass a timestep.

        Each image has the same ε, its own curve and its own t*. Arithmetic on batches of another size may differ in
        the last bit, so equal bytes need equal batches.

        Where the attention overflows in half precision, those images are read again in fp32, and that is said once.

        Raises:
            OutOfMemoryError: the device's memory does not hold it; says what to lower.
            ArgumentError: the images differ in shape, the attention is not finite in fp32, either, or the weights are
                offloaded.
        """
        shapes = {tuple(image.shape) for image in prepared}
        if len(shapes) != 1:
            raise ArgumentError(f"A batch is of images of one shape, got {sorted(shapes)}. Annotate the others apart.")
        with memory_of(self.backbone, self.settings.size):
            return self._annotate(torch.cat(list(prepared)))

    def _annotate(self, images: Tensor) -> list[Annotation]:
        precision = self.settings.precision
        found, maps = self._read(images, precision)
        overflown = [index for index, one in enumerate(zip(found, maps, strict=True)) if not is_finite(*one)]
        if overflown and precision != "fp32":
            if not self._said_overflow:
                log.warning(
                    "%s overflows in %s: where it does, images are read again in fp32, which takes its time. "
                    "--precision bf16 would not overflow.",
                    self.backbone.family,
                    precision,
                )
            self._said_overflow = True
            with in_fp32(self.backbone):
                again, exact = self._read(images[overflown], "fp32")
            for place, index in enumerate(overflown):
                found[index], maps[index] = again[place], exact[place]
        annotations = []
        for emergence, divergence in zip(found, maps, strict=True):
            timesteps = (emergence.t_star,) if emergence else self.settings.timesteps or ()
            if not is_finite(emergence, divergence):
                raise ArgumentError("The backbone's attention is not finite, in fp32 either. Are its weights whole?")
            labels, rule = ternary_labels(divergence)
            annotations.append(Annotation(divergence, labels, rule, timesteps, emergence))
        return annotations

    def _read(self, images: Tensor, precision: str) -> tuple[list[Emergence | None], list[NDArray[np.float32]]]:
        """Each image's curve, None with fixed timesteps, and its ABDiv [H, W]."""
        found: list[Emergence | None]
        with self._arithmetic(precision):
            seen = [images, images.flip(-1)] if self.settings.mirror else [images]
            views = [self.backbone.encode(view) for view in seen]
            noise = self.noise_like(views[0])
            if self.settings.timesteps is None:
                curve = self._curve(views[0], noise)
                maps = [self._divergence_at(view, noise, curve) for view in views]
                found = list(curve.read())
            else:
                maps = [self._divergences(view, noise, self.settings.timesteps) for view in views]
                found = [None] * len(images)
        both = maps[0]
        if self.settings.mirror:
            both = ((maps[0] + maps[1][..., ::-1]) / 2).astype(np.float32)
        return found, list(both)

    def _arithmetic(self, precision: str) -> torch.autocast:
        """Autocast for weights in fp32; those in half precision compute in it anyway."""
        wanted = torch_dtype(precision)
        enabled = self.backbone.dtype == torch.float32 != wanted
        return torch.autocast(self.backbone.device.type, wanted if enabled else None, enabled=enabled)

    def prepare(self, rgb: NDArray[np.uint8]) -> Tensor:
        """uint8 [H, W, 3] → float [1, 3, h, w] in [−1, 1] at the settings' size, on the backbone's device.

        Raises ArgumentError for another array.
        """
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or not rgb.size:
            raise ArgumentError(
                f"The teacher takes uint8 [H, W, 3], RGB; got {rgb.dtype} {list(rgb.shape)}. "
                "trace_sdk.images.read_image makes that of any picture."
            )
        multiple, least = self.backbone.multiple_of, self.backbone.min_size
        scale = self.settings.size / max(rgb.shape[:2])
        height, width = (max(least, round(side * scale / multiple) * multiple) for side in rgb.shape[:2])
        resized = np.array(scaled(Image.fromarray(rgb), height, width, Image.Resampling.BICUBIC))
        return torch.from_numpy(resized).to(self.backbone.device).permute(2, 0, 1)[None].float() / 127.5 - 1

    def noise_like(self, clean: Tensor) -> Tensor:
        """The fixed ε of every trajectory from X_0; drawn on the CPU so that every device sees the same."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return torch.randn(clean[:1].shape, generator=generator).to(clean.device).expand_as(clean)

    def trajectory(self, clean: Tensor, noise: Tensor, timesteps: tuple[float, ...]) -> list[tuple[float, Tensor]]:
        """(t, X_t) for each timestep, from X_0 (`backbone.encode` of an image)."""
        return list(TRAJECTORIES[self.settings.trajectory](self.backbone, clean, timesteps, noise))

    def grid(self, x_t: Tensor) -> tuple[int, int]:
        """(H, W) of the finest self-attention for X_t [B, C, h, w], in tokens."""
        side = self.backbone.latent_side
        return self.backbone.token_grid((x_t.shape[-2] * side, x_t.shape[-1] * side))

    def attention(self, x_t: Tensor, t: float, rows: Tensor | None = None) -> Tensor:
        """log₂ SA(X_t), mean over heads and blocks: [B, N, N], or [B, R, N] of the rows asked for."""
        average = AttentionAverage(self.grid(x_t), self._blocks, rows)
        self.backbone(x_t, t, average.add)
        return average.log2_mean()

    def emergence(self, clean: Tensor, noise: Tensor) -> Emergence:
        """The KL curve of one X_0 [1, C, h, w] over the schedule, and t*; two maps a window are held at a time."""
        return self._curve(clean, noise).read()[0]

    def _curve(self, clean: Tensor, noise: Tensor) -> _Curve:
        count = len(clean)
        clean, noise = self._cut(clean), self._cut(noise)
        timesteps = schedule(self.settings.stride)
        inside = search_window(timesteps[1:], self.settings.window)
        grid = self.grid(clean)
        rows = row_sample(grid[0] * grid[1], self.settings.iep_rows, clean.device)
        kl: list[Tensor] = []
        previous: Tensor | None = None
        for t, x_t in TRAJECTORIES[self.settings.trajectory](self.backbone, clean, timesteps, noise):
            current = self.attention(x_t, t, rows)
            if previous is not None:
                kl.append(CRITERIA[self.settings.criterion](previous, current, grid).view(-1, count).mean(0))
            previous = current
        return _Curve(timesteps[1:], torch.stack(kl), inside)

    def _divergence_at(self, clean: Tensor, noise: Tensor, curve: _Curve) -> NDArray[np.float32]:
        """ABDiv [B, H, W] of each X_0 at its curve's t*, which the host need not know for it."""
        steps = self.trajectory(self._cut(clean), self._cut(noise), curve.candidates)
        x_steps = torch.stack([x_t for _, x_t in steps])  # [steps, windows · B, C, h, w]
        best = curve.best.repeat(x_steps.shape[1] // len(clean))
        x_star = x_steps[best, torch.arange(len(best), device=best.device)]
        t_star = clean.new_tensor(curve.candidates).index_select(0, best)
        return self._join(self._abdiv_at(x_star, t_star), clean)

    def divergence(self, clean: Tensor, noise: Tensor, timesteps: tuple[float, ...]) -> NDArray[np.float32]:
        """ABDiv of one X_0 [1, C, h, w]: float32 [H, W] over its tokens.

        In nats at one timestep; of several, the mean of their maps, each divided by its own mean.
        """
        one: NDArray[np.float32] = self._divergences(clean, noise, timesteps)[0]
        return one

    def _divergences(self, clean: Tensor, noise: Tensor, timesteps: tuple[float, ...]) -> NDArray[np.float32]:
        steps = self.trajectory(self._cut(clean), self._cut(noise), timesteps)
        maps = [self._join(self._abdiv_at(x_t, t), clean) for t, x_t in steps]
        if len(maps) == 1:
            return maps[0]
        scaled = [[m / max(float(m.mean()), 1e-12) for m in of_images] for of_images in maps]
        mean: NDArray[np.float32] = np.mean(scaled, axis=0, dtype=np.float32)
        return mean

    def _windows(self, clean: Tensor) -> tuple[list[Window], int]:
        """The windows of X_0 in its cells, and their overlap."""
        height, width = clean.shape[-2:]
        side, step = self.backbone.latent_side, self.backbone.multiple_of // self.backbone.latent_side
        tile = self.settings.tile // side if self.settings.tile else max(height, width)
        overlap = tile // 4 // step * step
        return tiles(height, width, tile, overlap, step), overlap

    def _cut(self, clean: Tensor) -> Tensor:
        """X_0 [B, C, h, w] as its windows: [windows · B, C, h, w], each window of all images in turn."""
        windows, _ = self._windows(clean)
        return torch.cat([clean[..., window.slices[0], window.slices[1]] for window in windows])

    def _join(self, maps: Tensor, clean: Tensor) -> NDArray[np.float32]:
        """Maps over the tokens of the windows that `_cut` gives as maps over those of the whole: [B, H, W]."""
        windows, overlap = self._windows(clean)
        step = self.backbone.token_side // self.backbone.latent_side
        tokens = [Window(*(side // step for side in window)) for window in windows]
        values, count = maps.detach().float().cpu().numpy(), len(clean)
        return np.stack(
            [
                blend(zip(tokens, values[i::count], strict=True), *self.grid(clean), overlap // step)
                for i in range(count)
            ]
        )

    def _abdiv_at(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        boundary: MeanBoundary | PerHeadBoundary
        if self.settings.form == "mean":
            boundary = MeanBoundary(self.grid(x_t), self._blocks, self.settings.neighbourhood)
        else:
            logs = self.settings.form == "log-per-head"
            boundary = PerHeadBoundary(self.grid(x_t), self._blocks, logs=logs)
        self.backbone(x_t, t, boundary.add)
        return boundary.abdiv()


@dataclass(frozen=True)
class _Curve:
    """KL curves [steps, B] on the device: which step is t* is decided there, so that no step waits for the host."""

    timesteps: tuple[float, ...]
    kl: Tensor
    inside: slice

    @property
    def candidates(self) -> tuple[float, ...]:
        """The timesteps that t* may be."""
        return self.timesteps[self.inside]

    @property
    def best(self) -> Tensor:
        """Which of the candidates is each image's t*: int64 [B]."""
        return self.kl[self.inside].argmax(0)

    def read(self) -> list[Emergence]:
        """Each image's curve as numbers."""
        stars = [self.candidates[best] for best in self.best.tolist()]
        return [Emergence(self.timesteps, tuple(curve), t) for curve, t in zip(self.kl.T.tolist(), stars, strict=True)]

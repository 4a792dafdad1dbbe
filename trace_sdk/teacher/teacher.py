"""The teacher: one image → IEP, ABDiv, ternary labels, with no annotation and no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.errors import ArgumentError
from trace_sdk.kernels import temporal_kl
from trace_sdk.kernels.divergence import NEIGHBOURHOODS
from trace_sdk.teacher.attention import AttentionAverage
from trace_sdk.teacher.boundary import MeanBoundary, PerHeadBoundary
from trace_sdk.teacher.emergence import TRAJECTORIES, Emergence, row_sample, schedule, search_window
from trace_sdk.teacher.pseudo_labels import ternary_labels
from trace_sdk.tiling import Window, blend, tiles

FORMS = ("mean", "per-head", "log-per-head")


@dataclass(frozen=True)
class TeacherSettings:
    """How the teacher reads a backbone.

    Attributes:
        size: longest side in pixels at which the image is shown, both scaled up and down; sides become
            multiples of 8, from 64.
        tile: side in pixels of square windows, overlapping by a quarter, in which a larger image is read; their
            ABDiv is blended, and the KL of the IEP is the mean over all of them. Finer tokens without attention
            over more of them than the backbone was trained on. None reads the image whole.
        timesteps: fixed timesteps in [0, 1) whose ABDiv maps are averaged, each divided by its mean;
            None finds t* by the Instance Emergence Point.
        stride: of the IEP schedule, in thousandths.
        window: (lowest, highest) t that t* may take.
        iep_rows: how many rows of the map the KL is taken on, a fixed sample: no N×N map is then held, and 256 rows
            move the KL by about 1 % (DESIGN section 6); None takes all of them.
        trajectory: "noising" (one fixed ε) or "inversion" (the model's own flow).
        form: "mean" for the paper's divergence of the head-averaged map; without any N×N map, "per-head" for the
            mean of each head's own divergence, "log-per-head" for the mean of its log1p, symmetric: the student's
            features averaged, less ruled by the few heads with the largest values.
        neighbourhood: 4 or 8; the per-head forms have 4 only.
        blocks: self-attention blocks to average, None for all.
        mirror: average with the mirrored image's map.
        precision: of the backbone's arithmetic, "fp32" or "bf16"; maps are taken in fp32 in both.
        seed: of the noise ε.
    """

    size: int = 512
    tile: int | None = None
    timesteps: tuple[float, ...] | None = None
    stride: int = 100
    window: tuple[float, float] = (0.1, 0.6)
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
        if self.size < PixelBackbone.min_size:
            raise ArgumentError(f"size must be at least {PixelBackbone.min_size} px, got {self.size}.")
        if self.tile is not None and (self.tile < PixelBackbone.min_size or self.tile % PixelBackbone.multiple_of):
            raise ArgumentError(f"tile must be a multiple of 8 px from 64, got {self.tile}.")
        if self.timesteps is not None and not (self.timesteps and all(0 <= t < 1 for t in self.timesteps)):
            raise ArgumentError(f"timesteps must lie in [0, 1), got {self.timesteps}.")
        if self.trajectory not in TRAJECTORIES:
            raise ArgumentError(f"trajectory must be one of {sorted(TRAJECTORIES)}, got {self.trajectory!r}.")
        if self.form not in FORMS:
            raise ArgumentError(f"form must be one of {', '.join(FORMS)}; got {self.form!r}.")
        if self.precision not in ("fp32", "bf16"):
            raise ArgumentError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}.")
        if self.blocks == ():
            raise ArgumentError("blocks must name at least one block, or be None for all.")
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

    def __init__(self, backbone: PixelBackbone, settings: TeacherSettings | None = None) -> None:
        self.backbone = backbone.eval()
        self.settings = settings or TeacherSettings()
        self.settings.check()
        last = self.backbone.self_attention_blocks - 1
        if self.settings.blocks is not None and not all(0 <= block <= last for block in self.settings.blocks):
            raise ArgumentError(f"blocks must lie in 0 … {last} for this backbone, got {self.settings.blocks}.")
        self._blocks = self.settings.blocks or tuple(range(last + 1))

    def annotate(self, rgb: NDArray[np.uint8]) -> Annotation:
        """Edges of one image, uint8 [H, W, 3] RGB. The same image and seed give the same answer."""
        return self.annotate_batch([self.prepare(rgb)])[0]

    @torch.inference_mode()
    def annotate_batch(self, prepared: Sequence[Tensor]) -> list[Annotation]:
        """Edges of several images of one shape, each as `prepare` gives it, in one pass a timestep.

        Each image has the same ε, its own curve and its own t*. Arithmetic on batches of another size may differ in
        the last bit, so equal bytes need equal batches.
        """
        images = torch.cat(list(prepared))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self._annotate(images)

    def _annotate(self, images: Tensor) -> list[Annotation]:
        noise = self.noise_like(images)
        views = [images, images.flip(-1)] if self.settings.mirror else [images]
        found: list[Emergence | None]
        if self.settings.timesteps is None:
            curve = self._curve(images, noise)
            maps = [self._divergence_at(view, noise, curve) for view in views]
            found = list(curve.read())
        else:
            maps = [self._divergences(view, noise, self.settings.timesteps) for view in views]
            found = [None] * len(images)
        annotations = []
        for index, emergence in enumerate(found):
            divergence = maps[0][index]
            if self.settings.mirror:
                divergence = ((divergence + maps[1][index][:, ::-1]) / 2).astype(np.float32)
            labels, rule = ternary_labels(divergence)
            timesteps = (emergence.t_star,) if emergence else self.settings.timesteps or ()
            annotations.append(Annotation(divergence, labels, rule, timesteps, emergence))
        return annotations

    def prepare(self, rgb: NDArray[np.uint8]) -> Tensor:
        """uint8 [H, W, 3] → float [1, 3, h, w] in [−1, 1] at the settings' size, sides multiples of 8."""
        multiple, least = self.backbone.multiple_of, self.backbone.min_size
        scale = self.settings.size / max(rgb.shape[:2])
        height, width = (max(least, round(side * scale / multiple) * multiple) for side in rgb.shape[:2])
        resized = np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
        device = next(self.backbone.parameters()).device
        return torch.from_numpy(resized).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1

    def noise_like(self, images: Tensor) -> Tensor:
        """The fixed ε of every image's trajectory; drawn on the CPU so that every device sees the same."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        return torch.randn(images[:1].shape, generator=generator).to(images.device).expand_as(images)

    def trajectory(self, images: Tensor, noise: Tensor, timesteps: tuple[float, ...]) -> list[tuple[float, Tensor]]:
        """(t, X_t) for each timestep."""
        return list(TRAJECTORIES[self.settings.trajectory](self.backbone, images, timesteps, noise))

    def attention(self, x_t: Tensor, t: float, rows: Tensor | None = None) -> Tensor:
        """log₂ SA(X_t), mean over heads and blocks: [B, N, N], or [B, R, N] of the rows asked for."""
        average = AttentionAverage(self.backbone.token_grid((x_t.shape[-2], x_t.shape[-1])), self._blocks, rows)
        self.backbone(x_t, t, average.add)
        return average.log2_mean()

    def emergence(self, images: Tensor, noise: Tensor) -> Emergence:
        """The KL curve of one image [1, 3, H, W] over the schedule, and t*; two maps a window are held at a time."""
        return self._curve(images, noise).read()[0]

    def _curve(self, images: Tensor, noise: Tensor) -> _Curve:
        count = len(images)
        images, noise = self._cut(images), self._cut(noise)
        timesteps = schedule(self.settings.stride)
        inside = search_window(timesteps[1:], self.settings.window)
        grid = self.backbone.token_grid((images.shape[-2], images.shape[-1]))
        rows = row_sample(grid[0] * grid[1], self.settings.iep_rows, images.device)
        kl: list[Tensor] = []
        previous: Tensor | None = None
        for t, x_t in TRAJECTORIES[self.settings.trajectory](self.backbone, images, timesteps, noise):
            current = self.attention(x_t, t, rows)
            if previous is not None:
                kl.append(temporal_kl(previous, current).view(-1, count).mean(0))
            previous = current
        return _Curve(timesteps[1:], torch.stack(kl), inside)

    def _divergence_at(self, images: Tensor, noise: Tensor, curve: _Curve) -> NDArray[np.float32]:
        """ABDiv [B, h, w] of images at their curves' t*, which the host need not know for it."""
        steps = self.trajectory(self._cut(images), self._cut(noise), curve.candidates)
        x_steps = torch.stack([x_t for _, x_t in steps])  # [steps, windows · B, 3, h, w]
        best = curve.best.repeat(x_steps.shape[1] // len(images))
        x_star = x_steps[best, torch.arange(len(best), device=best.device)]
        t_star = images.new_tensor(curve.candidates).index_select(0, best)
        return self._join(self._abdiv_at(x_star, t_star), images)

    def divergence(self, images: Tensor, noise: Tensor, timesteps: tuple[float, ...]) -> NDArray[np.float32]:
        """ABDiv of one image [1, 3, H, W]: float32 [h, w] over its tokens.

        In nats at one timestep; of several, the mean of their maps, each divided by its own mean.
        """
        one: NDArray[np.float32] = self._divergences(images, noise, timesteps)[0]
        return one

    def _divergences(self, images: Tensor, noise: Tensor, timesteps: tuple[float, ...]) -> NDArray[np.float32]:
        steps = self.trajectory(self._cut(images), self._cut(noise), timesteps)
        maps = [self._join(self._abdiv_at(x_t, t), images) for t, x_t in steps]
        if len(maps) == 1:
            return maps[0]
        scaled = [[m / max(float(m.mean()), 1e-12) for m in of_images] for of_images in maps]
        mean: NDArray[np.float32] = np.mean(scaled, axis=0, dtype=np.float32)
        return mean

    def _windows(self, images: Tensor) -> tuple[list[Window], int]:
        """The windows of an image in pixels, and their overlap."""
        height, width = images.shape[-2:]
        tile, step = self.settings.tile or max(height, width), self.backbone.multiple_of
        overlap = tile // 4 // step * step
        return tiles(height, width, tile, overlap, step), overlap

    def _cut(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] as their windows: [windows · B, 3, h, w], each window of all images in turn."""
        windows, _ = self._windows(images)
        return torch.cat([images[..., window.slices[0], window.slices[1]] for window in windows])

    def _join(self, maps: Tensor, images: Tensor) -> NDArray[np.float32]:
        """Maps over the tokens of the windows that `_cut` gives as maps over those of the images: [B, h, w]."""
        windows, overlap = self._windows(images)
        step = self.backbone.multiple_of
        tokens = [Window(*(side // step for side in window)) for window in windows]
        grid = self.backbone.token_grid((images.shape[-2], images.shape[-1]))
        values, count = maps.detach().float().cpu().numpy(), len(images)
        return np.stack(
            [blend(zip(tokens, values[i::count], strict=True), *grid, overlap // step) for i in range(count)]
        )

    def _abdiv_at(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        boundary: MeanBoundary | PerHeadBoundary
        if self.settings.form == "mean":
            grid = self.backbone.token_grid((x_t.shape[-2], x_t.shape[-1]))
            boundary = MeanBoundary(grid, self._blocks, self.settings.neighbourhood)
        else:
            boundary = PerHeadBoundary(self._blocks, logs=self.settings.form == "log-per-head")
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

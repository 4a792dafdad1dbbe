"""The graph that becomes an engine: uint8 RGB in, edge probability out, t = 0 and the null prompt as constants."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trace_sdk.student.folder import AnyStudent
from trace_sdk.student.model import Student
from trace_sdk.student.nano import NanoStudent

BATCH = 3  # images that a layer is watched with
ROUNDING = 1e-6  # of the largest value in an answer


class EngineGraph(nn.Module):
    """`image` uint8 [B, H, W, 3] RGB → `edge_probability` float32 [B, H, W] in [0, 1].

    The student passed in is not changed; weights that stay as they are, are shared with it. They may be rounded to fp16
    first, so that storing them in fp16 loses nothing more. `share_softmax` pays where there is no fused attention; see
    `SelfAttentionTap`.
    """

    def __init__(self, student: AnyStudent, *, half_weights: bool, share_softmax: bool = True) -> None:
        super().__init__()
        self.share_softmax = share_softmax
        shared = {id(value): value for value in [*student.parameters(), *student.buffers()]}
        self.student = copy.deepcopy(student, shared).eval()
        fold_normalisation(self.student)
        if half_weights:
            round_weights(self.student)
        for part in self.student.modules():
            if isinstance(part, Student):
                fold_constants(part)

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).float() / 127.5 - 1
        if isinstance(self.student, NanoStudent):
            return self.student.logits(pixels).sigmoid()
        return self.student.logits(pixels, share_softmax=self.share_softmax).sigmoid()


def without_python(graph: EngineGraph, image: Tensor) -> nn.Module:
    """The graph for inputs like this one as one program of tensor operations: no hook, tap or check runs any more.

    torch.compile makes one piece of it, and a CUDA graph can hold it.
    """
    backbone = getattr(graph.student, "backbone", None)
    with torch.no_grad(), warnings.catch_warnings(), backbone.as_graph() if backbone else nullcontext():
        warnings.simplefilter("ignore")
        return torch.export.export(graph, (image,), strict=False).module()


def round_weights(model: nn.Module) -> None:
    """Round each parameter to what fp16 holds; one that is rounded already is not copied."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            rounded = value.detach().half().float()
            if not torch.equal(rounded, value):
                setattr(module, name, nn.Parameter(rounded, requires_grad=False))


def fold_normalisation(model: nn.Module) -> None:
    """Make each convolution and the batch normalisation that follows it one convolution."""
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for index in range(len(layers) - 1):
            convolution, normalisation = layers[index], layers[index + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(normalisation, nn.BatchNorm2d):
                layers[index] = fuse_conv_bn_eval(convolution, normalisation)
                layers[index + 1] = nn.Identity()


class _Constant(nn.Module):
    """Stands where a layer was that answers the same to every image: `value` [1, …], for each image of a batch."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, first: Tensor, *_: Any, **__: Any) -> Tensor:
        value: Tensor = self.value  # type: ignore[assignment]
        return value.expand(first.shape[0], *value.shape[1:])


def fold_constants(student: Student) -> None:
    """Leave of the denoiser what the image decides.

    Each outermost layer that t = 0 and the null prompt alone decide becomes what it answers, which in adaptive norms
    drops a fifth of all weights. Such layers are found by looking: they answered all images alike but for rounding, in
    two batches of different sizes.
    """
    denoiser, side = student.backbone.denoiser, student.min_size
    one, two = (_answers(student, (side, width)) for width in (side, side + student.multiple_of))
    gone: tuple[str, ...] = ()
    for name, _ in list(denoiser.named_modules()):
        if not name or name.startswith(gone):
            continue
        value, again = one.get(name), two.get(name)
        if value is not None and again is not None and _alike(value, again):
            denoiser.set_submodule(name, _Constant(value))
            gone += (f"{name}.",)


def _alike(one: Tensor, other: Tensor) -> bool:
    """But for rounding: some processors add up the rows of a batch in several orders."""
    if one.shape[1:] != other.shape[1:]:
        return False
    return bool((one - other).abs().max() <= ROUNDING * other.abs().max())


@torch.no_grad()
def _answers(student: Student, size: tuple[int, int]) -> dict[str, Tensor | None]:
    """By the name of each layer of the denoiser that is asked: its answer [1, …], if all images of a batch get that.

    None for one that answers them differently, or is asked more than once.
    """
    found: dict[str, Tensor | None] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(_: nn.Module, inputs: tuple[Any, ...], answer: Any) -> None:
            known = name in found
            found[name] = None
            tensors = [x for x in (*inputs[:1], answer) if isinstance(x, Tensor) and x.ndim and len(x) == BATCH]
            if not known and len(tensors) == 2 and _alike(answer, answer[:1]):
                found[name] = answer[:1].clone()

        return look

    modules = student.backbone.denoiser.named_modules()
    hooks = [module.register_forward_hook(watch(name), always_call=True) for name, module in modules]
    random = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, *size, generator=random).to(student.backbone.device) * 2 - 1
    try:
        student.read(student.encode(images), lambda attention: None)
    finally:
        for hook in hooks:
            hook.remove()
    return found

"""A student's graph on a GPU: 16 bits where the answers allow it, and a CUDA graph for each known shape.

torch is imported when the functions are called, since engines without it must start without it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trace_sdk.export.graph import EngineGraph

LIMIT = 0.002  # mean change of the probability that 16 bits may make, as for engines with 16-bit products
LOOKED_AT = 512  # longest side of the picture it is measured on, pixels
RUNS_BEFORE = 2  # a CUDA graph is captured: libraries choose and allocate in the first ones


def lower(graph: EngineGraph) -> tuple[str, str]:
    """Put the denoiser and the VAE into fp16; in place, also for a student that shares the weights.

    Both are measured on a picture: what changes the answer by more than LIMIT, or overflows, goes back to float32,
    which loses nothing, since students are stored in fp16.

    Returns:
        The precision, "fp16" or "fp32", and a word on what it is of.
    """
    import torch

    from trace_sdk.backbones.latent import LatentBackbone
    from trace_sdk.export.pictures import blobs

    backbone = getattr(graph.student, "backbone", None)
    if not isinstance(backbone, LatentBackbone):
        return "fp32", ""
    side = min(graph.student.default_size, LOOKED_AT) // graph.student.multiple_of * graph.student.multiple_of
    picture = torch.from_numpy(blobs(max(side, graph.student.min_size))[0]).to(backbone.device)

    def answer() -> Tensor:
        with torch.no_grad():
            found: Tensor = graph(picture)
        return found

    exact = answer()
    lowered: list[str] = []
    for name in ("denoiser", "vae"):
        part: nn.Module = getattr(backbone, name)
        buffers = {place: value.clone() for place, value in part.named_buffers()}
        part.half()
        change = float((answer() - exact).abs().mean())
        if change <= LIMIT:  # NaN is not
            lowered.append(name)
            continue
        part.float()
        for place, value in part.named_buffers():  # constants that were folded are float32
            value.copy_(buffers[place])
    if not lowered:
        return "fp32", "fp16 changes its answers too much"
    return "fp16", "" if len(lowered) == 2 else f"{lowered[0]} alone in fp16"


def channels_last(graph: EngineGraph) -> None:
    """Hold the convolutions' weights as tensor cores read them, in place: then all between them comes in that order."""
    import torch

    for module in graph.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fuse_normalisation(program: nn.Module) -> nn.Module:
    """Group normalisations of an exported program, each with the SiLU that follows it, by our kernel; in place.

    Left as they are where Triton has no package.
    """
    import torch
    from torch.fx import GraphModule

    from trace_sdk.kernels.group_norm import OPERATOR

    aten = torch.ops.aten
    if not isinstance(program, GraphModule) or find_spec("triton") is None:
        return program
    for node in list(program.graph.find_nodes(op="call_function", target=aten.group_norm.default)):
        after = list(node.users)
        silu = len(after) == 1 and after[0].target in (aten.silu.default, aten.silu_.default)
        with program.graph.inserting_before(node):
            ours = program.graph.call_function(OPERATOR, (*node.args[:5], silu))
        node.replace_all_uses_with(ours)
        program.graph.erase_node(node)
        if silu:
            after[0].replace_all_uses_with(ours)
            program.graph.erase_node(after[0])
    program.recompile()
    return program


class Captured:
    """One program for one shape as a CUDA graph: launched as a whole, with nothing left to do for the CPU."""

    def __init__(self, program: Callable[[Tensor], Tensor], image: Tensor) -> None:
        """`image` [1, H, W, 3] uint8 on the GPU, which it keeps to read from."""
        import torch

        self._image = image
        stream = torch.cuda.Stream(image.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(image.device))
        with torch.cuda.stream(stream):
            for _ in range(RUNS_BEFORE):
                program(image)
        torch.cuda.current_stream(image.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use this GPU meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._answer = program(image)

    def __call__(self, image: Tensor) -> Tensor:
        """The answer to [1, H, W, 3], overwritten by the next one."""
        self._image.copy_(image)
        self._graph.replay()
        return self._answer

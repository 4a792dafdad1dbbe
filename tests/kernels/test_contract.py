"""What holds for every kernel: same bits twice, no gradient, visible to torch's compilers, clear errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.tap import SelfAttention
from trace_sdk.errors import ArgumentError, DeviceError, MissingExtraError
from trace_sdk.kernels import (
    abdiv,
    abdiv_from_qk,
    head_mean_attention,
    image_log_sum_exp,
    log_sum_exp,
    lse_of,
    per_head_divergence,
    temporal_kl,
    upsample_attention,
)
from trace_sdk.kernels import divergence as divergence_module
from trace_sdk.teacher import attention as attention_module
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

Kernel = Callable[[Tensor, Tensor], Tensor]


def block(query: Tensor, key: Tensor) -> SelfAttention:
    return SelfAttention(0, query, key, (3, 5), 0.25)


KERNELS: dict[str, Kernel] = {
    "head_mean_attention": lambda query, key: head_mean_attention(query, key),
    "log_sum_exp": lambda query, key: log_sum_exp(query, key),
    "image_log_sum_exp": lambda query, key: image_log_sum_exp(
        log_sum_exp(query, torch.cat([key, query], 2), scale=0.25), query, key, query, scale=0.25
    ),
    "upsample_attention": lambda query, key: upsample_attention(head_mean_attention(query, key), (3, 5), (4, 7)),
    "abdiv": lambda query, key: abdiv(head_mean_attention(query, key), (3, 5), 8),
    "abdiv_from_qk": lambda query, key: abdiv_from_qk([block(query, key)]),
    "temporal_kl": lambda query, key: temporal_kl(head_mean_attention(query, key), head_mean_attention(key, query)),
    "per_head_divergence": lambda query, key: per_head_divergence(block(query, key), symmetric=False),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def query_and_key(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    query, key = (2 * torch.randn(2, 1, 2, 15, 16)).to(dtype).to(device).unbind(0)
    return query, key


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_bits_twice(device: str, kernel: Kernel, dtype: torch.dtype) -> None:
    query, key = query_and_key(device, dtype)
    first = kernel(query, key)
    assert first.isfinite().all() and torch.equal(first, kernel(query, key))


@every_kernel
def test_batch_is_the_images_one_by_one(device: str, kernel: Kernel) -> None:
    query, key = query_and_key(device)
    query, key = torch.cat([query, key * 0.5]), torch.cat([key, query * 0.7])
    both = kernel(query, key)
    for image in (0, 1):
        alone = kernel(query[image : image + 1], key[image : image + 1])
        torch.testing.assert_close(both[image : image + 1], alone, rtol=1e-5, atol=1e-5)


@every_kernel
def test_no_gradient(device: str, kernel: Kernel) -> None:
    query, key = query_and_key(device)
    assert not kernel(query.requires_grad_(), key.requires_grad_()).requires_grad


@every_kernel
def test_compiled_without_a_break(kernel: Kernel) -> None:
    torch._dynamo.reset()
    query, key = query_and_key()
    torch.testing.assert_close(
        torch.compile(kernel, fullgraph=True, backend="aot_eager")(query, key), kernel(query, key)
    )


def test_exported_as_operators() -> None:
    class Divergence(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            log2_map = head_mean_attention(query, key)
            return abdiv(log2_map, (3, 5)) + temporal_kl(log2_map, log2_map)

    query, key = query_and_key()
    program = torch.export.export(Divergence(), (query, key))
    code = program.graph_module.print_readable(print_output=False)
    assert all(f"trace_sdk.{name}" in code for name in ("head_mean_attention", "abdiv_strip", "row_kl"))
    torch.testing.assert_close(program.module()(query, key), Divergence()(query, key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["head_mean_attention", "log_sum_exp", "per_head_divergence", "abdiv_strip", "row_kl"])
def test_operators_keep_torchs_rules(name: str, dtype: torch.dtype) -> None:
    """Schema, fake version and aliasing, as torch itself checks them."""
    query, key = (x.to(dtype) for x in query_and_key())
    log2_map = head_mean_attention(query, key)
    arguments = {
        "head_mean_attention": (query, key, None, 0.25, 1.0, True, log2_map.clone()),
        "log_sum_exp": (query, key, 0.25),
        "per_head_divergence": (query, key, [3, 5], 0.25, True),
        "abdiv_strip": (log2_map, [3, 5], 0, 1, 3, 4),
        "row_kl": (log2_map, log2_map),
    }
    torch.library.opcheck(
        getattr(torch.ops.trace_sdk, name).default,
        arguments[name],
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_the_models_own_log_sum_exp_is_taken(tiny_backbone: PixelBackbone) -> None:
    """Flux attends to text and image at once; what its call leaves is brought down to the image's keys."""
    seen: list[SelfAttention] = []
    images = torch.rand(1, 3, 64, 72) * 2 - 1
    with torch.no_grad():
        answer = tiny_backbone(images, 0.3, seen.append)
        assert torch.equal(answer, tiny_backbone(images, 0.3))  # the same bits with and without the tap
    assert len(seen) == 2
    for attention in seen:
        lse = lse_of(attention)
        assert lse is not None and attention.text_key is not None and attention.text_key.shape[2] == 1
        torch.testing.assert_close(lse, log_sum_exp(attention.query, attention.key), rtol=1e-5, atol=1e-5)


def test_no_log_sum_exp_where_the_model_needs_gradients(tiny_backbone: PixelBackbone) -> None:
    seen: list[SelfAttention] = []
    tiny_backbone(torch.rand(1, 3, 64, 64), 0.3, seen.append)
    assert lse_of(seen[0]) is None and seen[0].query.requires_grad


@pytest.mark.parametrize("form", ["mean", "per-head", "log-per-head"])
def test_the_teacher_is_the_same_on_both_paths(
    tiny_backbone: PixelBackbone, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference path against kernel path, from the photo to the labels, on a real backbone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    photo = np.random.default_rng(0).integers(0, 255, (64, 72, 3), np.uint8)
    settings = TeacherSettings(size=72, stride=400, window=(0.1, 0.9), form=form)
    reference = Teacher(tiny_backbone.cpu(), settings).annotate(photo)
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        got = Teacher(tiny_backbone.to(device), settings).annotate(photo)
    finally:
        tiny_backbone.cpu()
    assert reference.emergence is not None and got.emergence is not None
    np.testing.assert_allclose(got.emergence.kl, reference.emergence.kl, rtol=1e-3)
    assert got.timesteps == reference.timesteps
    np.testing.assert_allclose(got.abdiv, reference.abdiv, rtol=2e-3, atol=1e-4)
    assert (got.labels == reference.labels).mean() > 0.98


def test_the_teacher_asks_the_host_nothing_until_the_end(
    tiny_backbone: PixelBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each of these would wait for all work so far: none may come before the last pass of the backbone."""
    for module in (attention_module, divergence_module):
        monkeypatch.setattr(module, "lse_of", lambda attention: None)  # its CPU path, not its kernel, looks at values
    events: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
        original = getattr(torch.Tensor, name)

        def watched(self: Tensor, *args: object, name: str = name, call: Callable[..., object] = original) -> object:
            events.append(name)
            return call(self, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)
    handle = tiny_backbone.register_forward_pre_hook(lambda *_: events.append("pass"))
    Teacher(tiny_backbone, TeacherSettings(size=64, stride=400)).annotate(np.zeros((64, 64, 3), np.uint8))
    handle.remove()
    passes = [number for number, event in enumerate(events) if event == "pass"]
    assert len(passes) == 4  # three timesteps and t*
    assert set(events[: passes[-1]]) == {"pass"}, events
    assert "cpu" in events[passes[-1] :]  # the watch sees something


def test_sixteen_thousand_tokens_fit_in_a_few_hundred_mebibytes() -> None:
    """SD 1.5 at 1024 px has 128×128 tokens, whose map alone is a gibibyte in float32."""
    code = """if True:
        import torch
        from trace_sdk.backbones.tap import SelfAttention
        from trace_sdk.kernels import abdiv_from_qk, head_mean_attention
        from trace_sdk.machine import peak_memory

        query, key = torch.randn(2, 1, 1, 128 * 128, 16).unbind(0)
        abdiv_from_qk([SelfAttention(0, query[:, :, :64], key[:, :, :64], (8, 8), 0.25)])
        before = peak_memory()
        edges = abdiv_from_qk([SelfAttention(0, query, key, (128, 128), 0.25)])
        rows = head_mean_attention(query[:, :, :64], torch.randn(1, 1, 65_536, 16))
        assert edges.isfinite().all() and rows.shape == (1, 64, 65_536)
        print((peak_memory() - before) / 2**20)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(run.stdout) < 300


q, k = torch.zeros(1, 2, 6, 16), torch.zeros(1, 2, 6, 16)
log2_map = torch.zeros(1, 6, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_mean_attention(q[0], k[0]), r"must be \[B, heads, N, d\]"),
        (lambda: head_mean_attention(q, k[:, :1]), r"must be \[B, heads, N, d\]"),
        (lambda: head_mean_attention(q[..., :8], k[..., :8]), "from 16 to 256, got 8"),
        (lambda: head_mean_attention(q, k.half()), "share one dtype"),
        (lambda: head_mean_attention(q.int(), k.int()), "share one dtype"),
        (lambda: head_mean_attention(q, k, lse=torch.zeros(1, 2, 5)), "lse must be"),
        (lambda: head_mean_attention(q, k, torch.zeros(1, 6, 5)), "out must be"),
        (lambda: head_mean_attention(q, k, torch.zeros(1, 6, 6, dtype=torch.int32)), "out must be"),
        (lambda: abdiv(log2_map, (2, 2)), "has 4 rows"),
        (lambda: abdiv(log2_map, (2, 3), 6), "4 or 8, got 6"),
        (lambda: abdiv_from_qk([]), "No self-attention block"),
        (lambda: abdiv_from_qk([SelfAttention(0, q, k, (2, 3), 1)], neighbourhood=5), "4 or 8, got 5"),
        (lambda: temporal_kl(log2_map, log2_map[:, :3]), "of one dtype"),
        (lambda: temporal_kl(log2_map, log2_map.half()), "of one dtype"),
        (lambda: upsample_attention(log2_map, (2, 2), (4, 4)), r"is \[B, 4, 4\]"),
        (lambda: upsample_attention(log2_map, (2, 3), (4, 6), torch.zeros(1, 24, 23)), "out must be"),
    ],
)
def test_bad_arguments(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_no_silent_way_round_on_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnDevice:
        def __init__(self, kind: str) -> None:
            self.device = torch.device(kind)

    from trace_sdk.kernels import device

    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "trace-sdk\[kernels\]"'):
        device.check_device(OnDevice("cuda"))  # type: ignore[arg-type]
    with pytest.raises(DeviceError, match="not for mps"):
        device.check_device(OnDevice("mps"))  # type: ignore[arg-type]


def test_our_folder_does_not_stand_before_the_package_named_kernels() -> None:
    """diffusers looks for a PyPI package `kernels`; ours is installed as trace_sdk.kernels."""
    spec = find_spec("kernels")
    assert spec is None or "trace" not in str(spec.origin)

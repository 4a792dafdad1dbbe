"""Opening a backbone: how it may lie on disk, and every way in which it can be wrong, each one line that helps."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from trace_sdk.backbones import families as family_files
from trace_sdk.backbones import hub
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.registry import open_backbone
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, CheckpointError, DownloadError, OutOfMemoryError, TraceError
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.teacher import Teacher, TeacherSettings


@pytest.fixture
def copy(open_tiny: Any, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(open_tiny(name).folder, tmp_path / "model"))

    return make


def test_fp16_variant_and_shards_are_read(open_tiny: Any, tmp_path: Path) -> None:
    """The same weights, in a variant of several files, as large models come."""
    model = open_tiny("sd3")
    shutil.copytree(model.folder, tmp_path / "model")
    part = tmp_path / "model" / "transformer"
    (part / "diffusion_pytorch_model.safetensors").unlink()
    half = open_backbone(model.folder, precision="fp16")
    half.denoiser.save_pretrained(part, variant="fp16", max_shard_size="20KB")
    assert len(list(part.glob("*fp16*.safetensors"))) > 1
    opened = open_backbone(tmp_path / "model")
    x_t = torch.randn(1, 16, 16, 16)
    with torch.inference_mode():
        assert opened.dtype == torch.float32
        half.denoiser.float()  # the same rounded weights
        assert torch.equal(opened(x_t, 0.5), half(x_t, 0.5))


def test_offloaded_weights_give_the_same_answer(open_tiny: Any) -> None:
    """On one device nothing moves, but every hook runs."""
    model = open_tiny("sd3")
    offloaded = open_backbone(model.folder, offload=True)
    x_t = torch.randn(1, 16, 16, 16)
    seen: list[Any] = []
    with torch.inference_mode():
        assert torch.equal(offloaded(x_t, 0.5, seen.append), model.backbone(x_t, 0.5))
    assert len(seen) == 3


def test_pixel_backbone_is_chosen_by_its_config(tiny_backbone: PixelBackbone, tmp_path: Path) -> None:
    tiny_backbone.save(tmp_path)
    opened = open_backbone(tmp_path)
    assert isinstance(opened, PixelBackbone) and opened.identity == PixelBackbone.sha256(tmp_path)


def spoil(folder: Path, how: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if how == "no vae folder":
        shutil.rmtree(folder / "vae")
    elif how == "foreign vae":
        config = json.loads((folder / "vae" / "config.json").read_text())
        (folder / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    elif how == "pickled":
        torch.save({}, weights)
    elif how == "pickle alone":
        weights.unlink()
        torch.save({}, weights.with_suffix(".bin"))
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no scheduler":
        shutil.rmtree(folder / "scheduler")
    elif how == "foreign scheduler":
        (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "EDMEulerScheduler"}')
    elif how == "timesteps of log sigma":
        about = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear", "timestep_type": "continuous"}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(about))
    elif how == "empty config":
        (folder / "transformer" / "config.json").write_text("{}")
    elif how == "index is text":
        (folder / "model_index.json").write_text("hello")
    elif how == "no index":
        (folder / "model_index.json").unlink()
    elif how == "one file":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "v1-5.safetensors").write_bytes(b"")
    elif how == "other family":
        index |= {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    elif how == "inpainting":
        config = json.loads((folder / "vae" / "config.json").read_text())
        (folder / "vae" / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
        shutil.rmtree(folder / "vae")
        from diffusers import AutoencoderKL

        AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=8).save_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("how", "fragment"),
    [
        ("no vae folder", "has no vae/"),
        ("foreign vae", "is a AutoencoderTiny; sd3 takes AutoencoderKL"),
        ("pickled", "is a pickle"),
        ("pickle alone", "is a pickle"),
        ("cut", "Cannot read the weights in"),
        ("no weights", "Cannot read the weights in"),
        ("no scheduler", "has no scheduler/scheduler_config.json"),
        ("foreign scheduler", "no known noising rule; known are flow matching"),
        ("timesteps of log sigma", "no known noising rule"),
        ("empty config", "transformer/config.json does not say how wide the text's embeddings are"),
        ("index is text", "is not JSON"),
        ("no index", "neither model_index.json"),
        ("one file", r"v1-5\.safetensors is a checkpoint of one file.*from_single_file\(.*\)\.save_pretrained"),
        ("other family", r"SanaPipeline on SanaTransformer2DModel.*aura-flow, flux, .*pixel.*sdxl.*docs/backbones\.md"),
        ("inpainting", "takes 16 channels, its VAE gives 8"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(copy: Callable[[str], Path], how: str, fragment: str) -> None:
    folder = copy("sd3")
    spoil(folder, how)
    with pytest.raises(CheckpointError, match=fragment):
        open_backbone(folder)
    if how == "one file":
        with pytest.raises(CheckpointError, match=fragment):
            open_backbone(folder / "v1-5.safetensors")


def replace_unet(folder: Path, **settings: Any) -> None:
    """Another UNet in the place of the tiny one's."""
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, attention_head_dim=2,
        norm_num_groups=4, **plain | settings,
    ).save_pretrained(folder / "unet")  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "grids"),
    [
        ({"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}, {(24, 32), (12, 16)}),
        ({"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, {(24, 32), (12, 16)}),
        ({}, {(12, 16)}),  # the middle alone
    ],
)
def test_the_finest_grid_is_that_of_any_block(
    copy: Callable[[str], Path], blocks: dict[str, Any], grids: set[tuple[int, int]]
) -> None:
    """Only the way down was looked at: a finer grid on the way up was averaged away, and without any none was found."""
    folder = copy("sd")
    replace_unet(folder, **blocks)
    backbone = open_backbone(folder)
    seen: list[Any] = []
    with torch.inference_mode():
        backbone(backbone.encode(torch.zeros(1, 3, 96, 128)), 0.3, seen.append)
    assert {attention.grid for attention in seen} == grids
    assert backbone.token_grid((96, 128)) == max(grids)


def test_a_unet_that_cannot_be_read_is_refused(copy: Callable[[str], Path]) -> None:
    """They ended in diffusers' own errors at the first image."""
    folder = copy("sd")
    replace_unet(folder, class_embed_type="timestep")
    with pytest.raises(CheckpointError, match="StableDiffusionPipeline on UNet2DConditionModel, which is not support"):
        open_backbone(folder)
    replace_unet(folder, mid_block_type=None)
    with pytest.raises(CheckpointError, match="no self-attention that is read here"):
        open_backbone(folder)


def test_latents_that_are_normalised_by_channel(open_tiny: Any, copy: Callable[[str], Path]) -> None:
    """As Playground 2.5 has them: only the one factor was taken."""
    folder = copy("sd")
    config = json.loads((folder / "vae" / "config.json").read_text())
    by_channel = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
    (folder / "vae" / "config.json").write_text(json.dumps(config | by_channel))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    factor = config["scaling_factor"]
    with torch.inference_mode():
        plain = open_tiny("sd").backbone.encode(image) / factor
        found = open_backbone(folder).encode(image)
    mean, deviation = (torch.tensor(x).view(1, 4, 1, 1) for x in by_channel.values())
    torch.testing.assert_close(found, (plain - mean) * factor / deviation)


def test_a_pixel_backbone_that_is_not_whole(tiny_backbone: PixelBackbone, tmp_path: Path) -> None:
    """A weight that was missing was random, and diffusers' remark on it all that told."""
    tiny_backbone.save(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if name != "x_embedder.weight"}, file)
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, x_embedder\.weight among them\. Download it again"):
        open_backbone(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"^Cannot read the weights in .+ Copy or download the folder again\.$"):
        open_backbone(tmp_path)


def test_a_part_is_not_taken_for_the_model(open_tiny: Any) -> None:
    with pytest.raises(CheckpointError, match=r"transformer is one part of a pipeline\."):
        open_backbone(open_tiny("sd3").folder / "transformer")
    with pytest.raises(CheckpointError, match="is no folder, and no hub id"):
        open_backbone("no/such/folder")


def test_too_little_memory_for_the_weights(open_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(OutOfMemoryError, match=r"--precision bf16, or --offload"):
        open_backbone(open_tiny("sd3").folder)


def test_too_little_memory_for_an_image(open_tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to lower, and the next image is annotated."""
    teacher = Teacher(open_tiny("sd3").backbone, TeacherSettings(size=64, timesteps=(0.2,)))
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_abdiv_at", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA full")))
        with pytest.raises(OutOfMemoryError, match=r"CUDA full \(sd3 at 64 px\)\. Lower --batch or --size"):
            teacher.annotate(photo)
    assert teacher.annotate(photo).labels.shape == (8, 8)


@pytest.mark.parametrize(("device", "precision"), [("cuda:7", "fp32"), ("cpu", "fp8"), ("tpu", "fp32")])
def test_device_and_precision_are_checked_before_weights(open_tiny: Any, device: str, precision: str) -> None:
    if device == "cuda:7" and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(TraceError, match=r"CUDA|precision must be|device must be"):
        open_backbone(open_tiny("sd3").folder, device=device, precision=precision)


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for a gated, an unknown and an empty repository, and for a tiny model."""

    root: Path
    asked: list[str]

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "/gated/" in self.path:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        if "/nobody/" in self.path:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
        if self.path.startswith("/api/models/"):
            files = [str(f.relative_to(self.root)) for f in self.root.rglob("*") if f.is_file()]
            about: Any = {"id": "owner/tiny", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
            if "/tree/" in self.path:
                about = [{"type": "file", "path": name, "size": 1, "oid": "b" * 40} for name in files]
            return self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        file = self.root / self.path.partition("/resolve/")[2].partition("/")[2]
        if "/owner/tiny/" in self.path and file.is_file():
            return self.answer(200, file.read_bytes(), {"ETag": f'"{abs(hash(file))}"', "X-Repo-Commit": "a" * 40})
        return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str | None, Path], list[str]]]:
    """`hub_at(address or None, root)`: point the hub's client at an address, or at a server of the files in root."""
    servers = []

    def point(address: str | None, root: Path) -> list[str]:
        handler = type("Handler", (Hub,), {"root": root, "asked": []})
        if address is None:
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            servers.append(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
        for module in ("constants", "file_download", "hf_api"):
            space = getattr(__import__(f"huggingface_hub.{module}"), module)
            for name, value in {
                "ENDPOINT": address,
                "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_CACHE": str(tmp_path / "hub"),
            }.items():
                if hasattr(space, name):
                    monkeypatch.setattr(space, name, value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        return handler.asked

    yield point
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("gated/model", r"gated/model is gated\. Accept its licence at https://huggingface\.co/gated/model"),
        ("nobody/model", "no model nobody/model, or it is private"),
        ("owner/empty", "no diffusers pipeline: it has no model_index.json"),
    ],
)
def test_what_the_hub_refuses_is_said(hub_at: Any, tmp_path: Path, source: str, fragment: str) -> None:
    hub_at(None, tmp_path)
    with pytest.raises(DownloadError, match=fragment):
        open_backbone(source)


def test_no_network_is_said(hub_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_at("http://127.0.0.1:9", tmp_path)
    with pytest.raises(DownloadError, match=r"owner/model is not on this machine, and the hub cannot be reached"):
        open_backbone("owner/model")


def test_what_was_downloaded_is_opened_without_the_hub(
    open_tiny: Any, hub_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_at(None, open_tiny("sd").folder)
    online = open_backbone("owner/tiny")
    hub_at("http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_backbone("owner/tiny").identity == online.identity


def test_only_what_is_read_is_downloaded(open_tiny: Any, hub_at: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    for extra in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/x.json"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"{}")
    asked = hub_at(None, folder)
    opened = open_backbone("owner/tiny")
    assert opened.identity == open_tiny("sd").backbone.identity
    assert not [path for path in asked if "pruned" in path or "fp16" in path or "safety" in path]


def test_wanted_files_take_a_variant_where_there_is_no_other() -> None:
    files = [
        "unet/a.fp16.safetensors",
        "unet/config.json",
        "unet/a.safetensors.index.fp16.json",
        "vae/a.safetensors",
        "vae/a.fp16.safetensors",
        "vae/a.bin",
    ]
    assert hub.wanted_files(files, "unet") == [
        "model_index.json",
        "unet/config.json",
        "unet/a.fp16.safetensors",
        "unet/a.safetensors.index.fp16.json",
        "vae/a.safetensors",
    ]


NEW_FAMILY = """
import torch
from trace_sdk.backbones.families.flux import Flux
from trace_sdk.backbones.latent import pack, unpack
from trace_sdk.backbones.pixel import position_ids

class Chroma(Flux):
    family = "chroma"
    architecture = "ChromaTransformer2DModel"

    @classmethod
    def zero_prompt(cls, config):
        return {"tokens": torch.zeros(1, 16, config["joint_attention_dim"])}

    def denoise(self, x_t, t, prompt):
        height, width = x_t.shape[-2:]
        answer = self.denoiser(
            pack(x_t), prompt["tokens"], t, position_ids((height // 2, width // 2), t), t.new_zeros(16, 3)
        )
        return unpack(answer.sample, (height, width))
"""


def test_a_family_is_one_file(copy: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import ChromaTransformer2DModel

    folder = copy("flux")
    shutil.rmtree(folder / "transformer")
    ChromaTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "ChromaPipeline", "transformer": ["diffusers", "ChromaTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ChromaPipeline on ChromaTransformer2DModel, which is not supported"):
        open_backbone(folder)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "chroma.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(family_files, "__path__", [*family_files.__path__, str(tmp_path / "new")])
    opened = open_backbone(folder)
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    annotation = Teacher(opened, TeacherSettings(size=64, timesteps=(0.3,))).annotate(photo)
    assert opened.family == "chroma" and annotation.labels.shape == (8, 8) and annotation.abdiv.std() > 0


def test_label_command_takes_any_family(open_tiny: Any, photos: Path, tmp_path: Path) -> None:
    command = ["label", str(photos / "a.png"), "--backbone", str(open_tiny("flux").folder), "-o", str(tmp_path / "out")]
    options = ["--size", "96", "--stride", "300", "--plot", "--precision", "bf16"]
    result = CliRunner().invoke(main, [*command, *options])
    assert result.exit_code == 0, result.output
    label = load_label(tmp_path / "out" / "a.png.npz")
    assert label.labels.shape == (10, 12) and label.about["timesteps"]
    assert Image.open(tmp_path / "out" / "a.png.png").width > 800
    refused = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "more"), "--tile", "100"])
    assert refused.exit_code == 2 and "tile must be a multiple of 8 px from 64 for this backbone" in refused.output


@pytest.mark.parametrize("name", ["sd3", "pixel"])
def test_images_that_overflow_in_fp16_are_read_in_fp32(
    open_tiny: Any, tiny_backbone: PixelBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """One of a batch of two: it gets the label of fp32, the other keeps fp16's, and the weights are as before."""
    if name == "pixel":
        tiny_backbone.save(tmp_path)
    folder = tmp_path if name == "pixel" else open_tiny(name).folder
    half, exact = open_backbone(folder, precision="fp16"), open_backbone(folder)
    settings = {"size": 64, "timesteps": (0.2,)}
    teacher = Teacher(half, TeacherSettings(**settings, precision="fp16"))
    rng = np.random.default_rng(0)
    prepared = [teacher.prepare(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(2)]
    before = teacher.annotate_batch(prepared)
    assert not [record for record in caplog.records if "overflows" in record.message]
    caplog.clear()
    weights = {key: value.clone() for key, value in half.state_dict().items()}
    divergence = teacher._abdiv_at

    def overflow(x_t: torch.Tensor, t: float) -> torch.Tensor:
        found = divergence(x_t, t)
        if half.dtype == torch.float16 or torch.is_autocast_enabled("cpu"):
            found[1, 0, 0] = torch.inf
        return found

    teacher._abdiv_at = overflow
    for _ in range(2):
        first, second = teacher.annotate_batch(prepared)
        np.testing.assert_array_equal(first.abdiv, before[0].abdiv)
        (expected,) = Teacher(exact, TeacherSettings(**settings)).annotate_batch(prepared[1:])
        np.testing.assert_allclose(second.abdiv, expected.abdiv, rtol=0.05 if name == "sd3" else 1e-4, atol=1e-3)
        assert not np.array_equal(second.abdiv, before[1].abdiv)
    assert all(torch.equal(value, weights[key]) for key, value in half.state_dict().items())
    assert [record.message.partition(":")[0] for record in caplog.records] == [f"{half.family} overflows in fp16"]
    teacher._abdiv_at = lambda x_t, t: divergence(x_t, t) * torch.nan
    with pytest.raises(ArgumentError, match="not finite, in fp32 either"):
        teacher.annotate_batch(prepared)
    if name == "sd3":
        offloaded = Teacher(open_backbone(folder, precision="fp16", offload=True), teacher.settings)
        offloaded._abdiv_at = teacher._abdiv_at
        with pytest.raises(ArgumentError, match="Take --precision bf16, or fp32"):
            offloaded.annotate_batch(prepared)

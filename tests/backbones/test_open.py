"""Opening a backbone: how it may lie on disk, and every way in which it can be wrong, each one line that helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.registry import open_backbone
from trace_sdk.cli import main
from trace_sdk.errors import CheckpointError, TraceError
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.teacher import Teacher, TeacherSettings


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


@pytest.mark.parametrize(("device", "precision"), [("cuda:7", "fp32"), ("cpu", "fp8"), ("tpu", "fp32")])
def test_device_and_precision_are_checked_before_weights(open_tiny: Any, device: str, precision: str) -> None:
    if device == "cuda:7" and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(TraceError, match=r"CUDA|precision must be|device must be"):
        open_backbone(open_tiny("sd3").folder, device=device, precision=precision)


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

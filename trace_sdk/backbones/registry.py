"""The backbone that a folder or a hub id holds, by what its own configuration says."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import torch

from trace_sdk.backbones import families as family_files
from trace_sdk.backbones.backbone import Backbone
from trace_sdk.backbones.device import torch_device, torch_dtype
from trace_sdk.backbones.hub import fetch, is_hub_id
from trace_sdk.backbones.latent import LatentBackbone, read_config
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.backbones.vision_transformer import MODEL_TYPES, VisionTransformer
from trace_sdk.backbones.words import WordedPrompt, read_words
from trace_sdk.errors import ArgumentError, CheckpointError
from trace_sdk.student.record import is_student


def families() -> dict[str, type[LatentBackbone]]:
    """Every family of latent models by name: the classes in the files of `families/`."""
    found: dict[str, type[LatentBackbone]] = {}
    for file in pkgutil.iter_modules(family_files.__path__, f"{family_files.__name__}."):
        module = importlib.import_module(file.name)
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, LatentBackbone) and kind.__module__ == file.name:
                found[kind.family] = kind
    return found


def open_backbone(
    source: str | Path, *, device: torch.device | str = "cpu", precision: str = "fp32", offload: bool = False
) -> Backbone:
    """Read a backbone, ready for the teacher.

    Args:
        source: a folder of diffusers, of `trace-sdk pretrain` or of DINOv2 (the control), or a hub id "owner/name".
        device: "cpu", "cuda" or "cuda:N".
        precision: "fp32", "bf16" or "fp16" weights of a latent model's denoiser. A pixel backbone keeps fp32 weights;
            the teacher's settings say how it computes.
        offload: keep a latent model's denoiser in the computer's memory and bring it to the GPU layer by layer.

    Raises:
        CheckpointError: no backbone, one of an unsupported family, or a part that is missing, corrupt or pickled.
        DownloadError: the hub does not give it.
        DeviceError: the device is not there, or too small.
    """
    device = torch_device(str(device))
    torch_dtype(precision)  # a wrong name is said before gigabytes are read
    folder = folder_of(source)
    if not (folder / "model_index.json").is_file():
        if (folder.absolute().parent / "model_index.json").is_file():
            raise CheckpointError(f"{folder} is one part of a pipeline. Give the folder that it lies in.")
        if not (folder / "config.json").is_file():
            raise CheckpointError(no_folder(folder))
        if read_config(folder, ".").get("model_type") in MODEL_TYPES:
            return VisionTransformer.load(folder).to(device)
        return PixelBackbone.load(folder).to(device)
    index = read_config(folder, ".", "model_index.json")
    family = family_of(index, lambda part: read_config(folder, part), str(folder))
    if "vae" not in index or not (folder / "vae").is_dir():
        raise CheckpointError(f"{folder} has no vae/, without which no image becomes latents. Add the model's own VAE.")
    return family.load(folder, device=device, precision=precision, offload=offload)


def open_prompt(
    source: str | Path,
    text: str,
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    offload: bool = False,
) -> WordedPrompt:
    """Embed a prompt by the text encoders of a diffusers folder or hub id, which leave the memory again.

    Open it before the backbone: on a GPU the two then need not fit side by side.

    Args:
        text: the prompt; runs of white space count as one space.
        device, precision, offload: as for `open_backbone`; with `offload` the text encoders run on the CPU.

    Raises:
        ArgumentError: the prompt is empty, or the model takes no text.
        CheckpointError: the folder has no text encoder or tokenizer, or they cannot be run.
        DownloadError, DeviceError: as `open_backbone`.
    """
    device, dtype = torch_device(str(device)), torch_dtype(precision)
    folder = folder_of(source)
    if not (folder / "model_index.json").is_file():
        raise ArgumentError(f"{source} takes no text, so there are no words to read (--prompt).")
    index = read_config(folder, ".", "model_index.json")
    family = family_of(index, lambda part: read_config(folder, part), str(folder))
    return read_words(family, folder, index, text, torch.device("cpu") if offload else device, dtype)


def folder_of(source: str | Path) -> Path:
    """A model's folder, downloaded first if it is a hub id. Raises CheckpointError or DownloadError."""
    folder = Path(source)
    if not folder.exists() and is_hub_id(str(source)):
        folder = fetch(str(source), lambda index, config: family_of(index, config, str(source)).part)
    if not folder.is_dir():
        raise CheckpointError(no_folder(folder))
    return folder


def no_folder(source: Path) -> str:
    """Why this is no model's folder, and what to do."""
    if is_student(source):
        return f"{source} is a student, not a backbone. Give the backbone that it was distilled from."
    files = [source] if source.is_file() else sorted(source.glob("*"))
    checkpoint = next((file for file in files if file.suffix in (".safetensors", ".ckpt")), None)
    if checkpoint:
        return (
            f"{checkpoint} is a checkpoint of one file, not a diffusers folder. Turn it into one: in Python, "
            f"diffusers.StableDiffusionPipeline.from_single_file({str(checkpoint)!r}).save_pretrained('FOLDER'), or "
            "its own model's pipeline."
        )
    if not source.is_dir():
        return f"{source} is no folder, and no hub id like owner/name either."
    return (
        f"{source} is no diffusers folder: it has neither model_index.json (a pipeline) nor config.json (a pixel "
        "backbone, as `trace-sdk pretrain` writes it, or DINOv2)."
    )


def family_of(index: dict[str, Any], config: Any, source: str) -> type[LatentBackbone]:
    """The family of a model_index.json; `config(part)` reads a part's config.json.

    Raises CheckpointError with the families there are.
    """
    known = families()
    for family in known.values():
        kind = index.get(family.part)
        if isinstance(kind, list) and kind[-1] == family.architecture and family.matches(config(family.part)):
            return family
    kinds = [kind[-1] for kind in map(index.get, ("transformer", "unet", "prior")) if isinstance(kind, list)]
    raise CheckpointError(
        f"{source} is a {index.get('_class_name', 'pipeline without a name')}"
        f"{f' on {kinds[0]}' if kinds and kinds[0] else ''}, which is not supported. Supported families: "
        f"{', '.join(sorted([*known, 'pixel']))}. docs/backbones.md says how to add one."
    )

"""The null prompt's embeddings: made once by the model's own text encoders, which then leave the memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from trace_sdk.backbones.checkpoint import refuse_pickle, write_tensors
from trace_sdk.backbones.quiet import quiet
from trace_sdk.errors import CheckpointError, OutOfMemoryError, OutputError
from trace_sdk.machine import cache_folder

if TYPE_CHECKING:
    from trace_sdk.backbones.latent import LatentBackbone

Prompt = dict[str, Tensor]
PRECOMPUTED = "null_prompt.safetensors"
log = logging.getLogger("trace_sdk")


def null_prompt(
    family: type[LatentBackbone], folder: Path, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Prompt:
    """What the model was trained with for "no text", on the CPU.

    From `null_prompt.safetensors` in the folder; else from the cache; else by the folder's text encoders; else zeros,
    which is said once.

    Raises:
        CheckpointError: a file is corrupt or pickled, or the text encoders cannot be run.
        OutOfMemoryError: the text encoders don't fit.
        OutputError: there is no cache; see `cache_folder`.
    """
    precomputed = folder / PRECOMPUTED
    if precomputed.is_file():
        return _read(precomputed)
    index = json.loads((folder / "model_index.json").read_text())
    if missing := missing_text_parts(folder, index):
        log.warning("%s has no %s: zeros take the place of the null prompt's embeddings.", folder, missing)
        return family.zero_prompt(config)
    cached = cache_folder() / "null-prompts" / f"{_key(folder, index, dtype)}.safetensors"
    if cached.is_file():
        return _read(cached)
    prompt = encode(family, folder, index, "", device, dtype)
    try:
        write_tensors(cached, prompt)
    except OutputError as error:
        log.warning("The null prompt is not kept for the next time: %s", error)
    return prompt


def encode(
    family: type[LatentBackbone],
    folder: Path,
    index: dict[str, Any],
    prompt: str,
    device: torch.device,
    dtype: torch.dtype,
    prepare: Callable[[Any], None] = lambda pipeline: None,
) -> Prompt:
    """Embeddings of a prompt, on the CPU. T5 overflows in fp16, so half precision is bf16 here.

    Args:
        prepare: is shown the pipeline, which holds text encoders and tokenizers only, before they are run.

    Raises:
        CheckpointError: a text encoder is pickled or cannot be run.
        OutOfMemoryError: the text encoders don't fit.
    """
    import diffusers

    names = text_parts(index)
    for name in names:
        if "encoder" in name:
            refuse_pickle(folder / name)
    absent = {name: None for name, kind in index.items() if isinstance(kind, list) and name not in names}
    dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
    full = False
    try:
        with quiet():
            pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, **absent
            )
        pipeline.to(device)
        prepare(pipeline)
        with torch.inference_mode():
            found = family.encode_prompt(pipeline, prompt)
    except torch.OutOfMemoryError:
        full = True
    except Exception as error:  # transformers raises many kinds, one meaning
        raise CheckpointError(
            f"The text encoders in {folder} cannot be run: {error}. Mend them, or put the null prompt's embeddings "
            f"into {PRECOMPUTED} there."
        ) from error
    if full:
        raise OutOfMemoryError(
            f"The text encoders in {folder} need more than {device} has free. Give --offload, which runs them on the "
            f"CPU, or --precision bf16, or put the null prompt's embeddings into {PRECOMPUTED} there."
        )
    return {name: value.detach().clone().contiguous().cpu() for name, value in found.items()}


def text_parts(index: dict[str, Any]) -> list[str]:
    """Text encoders and tokenizers that a model_index.json names."""
    return [
        name
        for name, kind in index.items()
        if name.startswith(("text_encoder", "tokenizer")) and isinstance(kind, list) and kind[0] is not None
    ]


def missing_text_parts(folder: Path, index: dict[str, Any]) -> str:
    """What a folder lacks to embed a prompt, for a message; "" if nothing."""
    parts = text_parts(index)
    return " and no ".join(name for name in parts if not (folder / name).is_dir()) if parts else "text encoder"


def _key(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> str:
    """Another folder, or other files in it, is another prompt. Size and time stand for gigabytes of weights."""
    files = [file for name in text_parts(index) for file in sorted((folder / name).rglob("*")) if file.is_file()]
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([index["_class_name"], str(dtype), facts]).encode()).hexdigest()


def _read(file: Path) -> Prompt:
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is not a null prompt ({error}). Remove it.") from error

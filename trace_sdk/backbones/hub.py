"""A model from the Hugging Face hub: only the files that the teacher reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trace_sdk.errors import CheckpointError, DownloadError

ReadConfig = Callable[[str], dict[str, Any]]


def is_hub_id(source: str) -> bool:
    """Whether this may be a hub id: "owner/name", and not a path."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def fetch(repository: str, denoiser_of: Callable[[dict[str, Any], ReadConfig], str]) -> Path:
    """Download what is missing of a pipeline into the hub's own cache; the folder there.

    Where the hub does not answer, what was downloaded before is taken.

    Args:
        denoiser_of: the folder of the denoiser, from model_index.json and a reader of parts' config.json. What it
            raises for a model that is not supported comes before the weights are fetched.

    Raises:
        DownloadError: gated, unknown, no diffusers pipeline, or no network.
        CheckpointError: not supported, or without safetensors.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    try:
        pipeline = Path(hf_hub_download(repository, "model_index.json"))
        part = denoiser_of(
            json.loads(pipeline.read_bytes()),
            lambda name: json.loads(Path(hf_hub_download(repository, f"{name}/config.json")).read_bytes()),
        )
        try:
            files = HfApi().list_repo_files(repository)
        except Exception:
            if any((pipeline.parent / part).glob("*.safetensors")):
                return pipeline.parent
            raise
        return Path(snapshot_download(repository, allow_patterns=wanted_files(files, part)))
    except CheckpointError:
        raise
    except Exception as error:
        raise DownloadError(explain(repository, error)) from error


def wanted_files(files: list[str], part: str) -> list[str]:
    """Of a repository's files: all configurations and tokenizers, and one variant of each part's safetensors."""
    wanted = ["model_index.json"]
    parts = sorted({file.partition("/")[0] for file in files if "/" in file})
    for name in parts:
        if name not in (part, "vae", "scheduler") and not name.startswith(("text_encoder", "tokenizer")):
            continue
        inside = [file for file in files if file.startswith(f"{name}/")]
        weights = [file for file in inside if file.endswith(".safetensors") or ".safetensors.index." in file]
        plain = [file for file in weights if not _variant(file)]
        wanted += [
            file for file in inside if file.endswith((".json", ".txt", ".model", ".jinja")) and file not in weights
        ]
        wanted += plain or [file for file in weights if _variant(file) == _variant(weights[0])]
    return wanted


def _variant(file: str) -> str | None:
    found = re.search(r"\.(fp16|bf16|non_ema|ema)\b", file)
    return found[1] if found else None


def explain(repository: str, error: Exception) -> str:
    """What went wrong with a download, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} is gated. Accept its licence at https://huggingface.co/{repository}, run `hf auth login`, "
            "and try again."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"The hub has no model {repository}, or it is private: check the name, or run `hf auth login`."
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{repository} is no diffusers pipeline: it has no model_index.json. Look for its diffusers version."
    return (
        f"{repository} is not on this machine, and the hub cannot be reached ({str(error).partition(chr(10))[0]}). "
        "Download it where there is a network (`hf download`), and give the folder."
    )

"""Weights on disk: safetensors only, pickles refused by what is in the file rather than by its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trace_sdk.atomic import whole_file
from trace_sdk.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

PICKLE_NAMES = {".pt", ".pth", ".ckpt", ".bin", ".pkl"}


def is_pickle(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a pickle, or a zip as `torch.save` writes it."""
    return head.startswith(b"PK\x03\x04") or (len(head) > 1 and head[0] == 0x80 and head[1] <= 5)


def refuse_pickle(folder: str | Path) -> None:
    """Raise CheckpointError if `folder` is missing or its weights are pickled."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder of weights. Give the folder that holds config.json.")
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in {*PICKLE_NAMES, ".safetensors"}:
            continue
        with file.open("rb") as stream:
            head = stream.read(4)
        if is_pickle(head) and (file.suffix == ".safetensors" or not any(folder.glob("*.safetensors"))):
            raise CheckpointError(
                f"{file} is a pickle, which can run any code when loaded. Convert it to safetensors "
                "(diffusers: save_pretrained(..., safe_serialization=True)) and give that folder."
            )


def unreadable(folder: str | Path, error: Exception) -> CheckpointError:
    """What to raise where diffusers or transformers cannot read weights: of their many lines the first."""
    reason = str(error).strip().partition("\n")[0].rstrip(". ")
    return CheckpointError(f"Cannot read the weights in {folder}: {reason}. Copy or download the folder again.")


def sha256_of_folder(folder: str | Path) -> str:
    """sha256 over the safetensors files of a folder, in order of name."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_tensors(file: str | Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write safetensors, whole or not at all, with `about` in the header. Raises OutputError if that cannot be done."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with whole_file(file) as unfinished:
        try:
            save_file(stored, unfinished, about)
        except SafetensorError as error:
            raise OutputError(f"Cannot write {file}: {error}. Choose a folder that has room (-o).") from error


def write_weights(file: str | Path, weights: Mapping[str, Tensor]) -> None:
    """As `write_tensors`; floats as fp16, except a tensor that fp16 cannot hold."""
    stored = {}
    for name, value in weights.items():
        value = value.detach().cpu()
        half = value.half() if value.is_floating_point() else value
        stored[name] = half if half.isfinite().all() else value
    write_tensors(file, stored, {"format": "pt"})

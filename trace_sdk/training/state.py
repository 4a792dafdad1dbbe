"""Training state on disk: named tensors in one safetensors file, with the step and the run's settings in its header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from trace_sdk.backbones.checkpoint import is_pickle, write_tensors
from trace_sdk.errors import ArgumentError, CheckpointError

STATE = "state.safetensors"


def save_state(file: Path, tensors: dict[str, Tensor], step: int, settings: dict[str, Any]) -> None:
    """Write whole or not at all; a run that is killed goes on from the last file."""
    write_tensors(file, tensors, {"step": str(step), "settings": json.dumps(settings)})


def load_state(file: Path) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """(tensors, step, settings) of a file that `save_state` wrote.

    Raises:
        CheckpointError: the file is a pickle, cut short, or not ours, or cannot be read.
    """
    try:
        with file.open("rb") as stream:
            if is_pickle(stream.read(4)):
                raise CheckpointError(f"{file} is a pickle, which can run any code when loaded; it was not opened.")
        with safe_open(file, framework="pt") as stored:
            header = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return tensors, int(header["step"]), json.loads(header["settings"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole training state ({error}). Remove it to start again, or give another folder."
        ) from error


def check_same_run(file: Path, before: dict[str, Any], now: dict[str, Any], fixed: tuple[str, ...]) -> None:
    """Raise ArgumentError if a setting that a resumed run must keep differs from the stored one."""
    if not set(fixed) <= before.keys():
        raise ArgumentError(
            f"{file} is of another kind of training, or of an earlier trace-sdk. Give another folder (-o)."
        )
    for name in fixed:
        if before[name] != json.loads(json.dumps(now[name])):
            raise ArgumentError(
                f"{file} is of a run with {name}={before[name]}, now {now[name]} was asked for. "
                "Give the same value to go on, or another folder (-o) to start anew."
            )


def misfit(file: Path) -> CheckpointError:
    """What to raise where the tensors of a state are not those of the model that is trained."""
    return CheckpointError(f"{file} is of another model than this run's. Give another folder (-o) to start anew.")


def optimizer_tensors(optimizer: Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimizer's running averages as named tensors."""
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }


def restore_optimizer(optimizer: Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; learning rates stay as they are now."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def steps_done(folder: Path) -> int:
    """Steps of the run in `folder`, 0 if there is none. Raises CheckpointError like `load_state`."""
    file = folder / STATE
    return load_state(file)[1] if file.is_file() else 0

"""What the benchmarks of kernels and teacher share: the device's name, and memory that a run takes."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trace_sdk.machine import hardware, peak_memory

RESULTS = Path(__file__).parent / "results"
NO_GPU = "There is no CUDA device here. Run this on a machine that has one, or take --device cpu."


def options_of(about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    return parser


def name_of(device: str) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{hardware()['cpu']}, threads: {torch.get_num_threads()}"


def peak_on_cuda(run: Callable[[], object]) -> float:
    """MiB that one run allocates at its peak beyond what is there already."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_on_cpu(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """MiB by which the run that `prepare(*arguments)` gives raises the resident set, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_raise_resident_set, args=(prepare, arguments, torch.get_num_threads(), sender))
    process.start()
    sender.close()  # so that a process that fails ends the wait
    mebibytes = float(receiver.recv())
    process.join()
    return mebibytes


def _raise_resident_set(
    prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], threads: int, sender: Any
) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    run = prepare(*arguments)
    before = peak_memory()
    run()
    sender.send((peak_memory() - before) / 2**20)

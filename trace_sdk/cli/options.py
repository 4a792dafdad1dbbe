"""Options that several commands have: one spelling, one default and one help text for each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


def results_option(command: Command) -> Command:
    """`out`, a folder."""
    return click.option(
        "-o",
        "--out",
        required=True,
        type=click.Path(path_type=Path),
        help="Folder for the results; made if missing.",
    )(command)


def engine_options(command: Command) -> Command:
    """`engine`, `device` and `size`, as EdgeDetector takes them."""
    for option in (
        click.option(
            "--size",
            type=click.IntRange(16, 8192),
            help="Longest side that the network sees, in pixels. Larger finds smaller things and takes longer.  "
            "[default: the engine's own]",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N (GPU number N)."),
        click.option(
            "--engine",
            help="An .onnx engine, or the name of a bundled one.  [default: trace-nano on a CPU, trace-small on a GPU]",
        ),
    ):
        command = option(command)
    return command


def cut_options(command: Command) -> Command:
    """`threshold` and `min_area`, as EdgeMap.instances takes them."""
    for option in (
        click.option(
            "--min-area",
            type=click.IntRange(min=0),
            help="Smaller regions, in pixels, join a neighbour.  [default: 3 in 10,000 of the picture]",
        ),
        click.option(
            "--threshold",
            type=click.FloatRange(0, 1),
            help="From fine (0) to coarse (1): how strong a border must be on average.  [default: the engine's own]",
        ),
    ):
        command = option(command)
    return command


def torch_device_option(command: Command) -> Command:
    """`device`, as `torch_device` takes it."""
    return click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")(command)


def steps_option(steps: int) -> Callable[[Command], Command]:
    """`steps` of a training."""
    return click.option(
        "--steps", default=steps, show_default=True, help="Optimizer steps in all; may be raised when going on."
    )


def learning_options(rate: float, what: str | None = None) -> Callable[[Command], Command]:
    """`learning_rate`, by default `rate`, and `seed` of a training; `what` the rate is of."""

    def add(command: Command) -> Command:
        command = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)(command)
        return click.option(
            "--learning-rate",
            type=click.FloatRange(0, min_open=True),
            default=rate,
            show_default=True,
            help=what,
        )(command)

    return add


def workers_option(command: Command) -> Command:
    """`workers`, processes that prepare batches."""
    return click.option(
        "--workers",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Processes that prepare batches; 0 is one thread. For a GPU, about one a core.",
    )(command)


def block_option(what: str) -> Callable[[Command], Command]:
    """`blocks`, numbers of self-attention blocks; `what` they are for."""
    return click.option("--block", "blocks", multiple=True, type=int, help=what)


def crop_options(tokens: int, sizes: tuple[int, ...]) -> Callable[[Command], Command]:
    """`tokens` and `sizes` of a training step, with their defaults."""

    def add(command: Command) -> Command:
        command = click.option(
            "--size",
            "sizes",
            multiple=True,
            default=sizes,
            show_default=True,
            help="Crop side in px; give several to mix.",
        )(command)
        return click.option(
            "--tokens", default=tokens, show_default=True, help="8×8 px tokens a step (1,024 in a 256 px crop)."
        )(command)

    return add

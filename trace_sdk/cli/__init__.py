"""The `trace-sdk` command. Each verb lives in its own module and is imported only when it is run."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from trace_sdk import __version__
from trace_sdk.cli.console import report_errors, write_what_can_be

# One line a verb, kept here so that `trace-sdk --help` imports none of them.
_VERBS = {
    "detect": "Find the instance edges of photos with an engine; no torch needed.",
    "instances": "Cut photos into instances along their edges: pictures and one COCO file.",
    "refine": "Make masks of other methods (COCO results) agree with the edges.",
    "panoptic": "Turn semantic label pictures into panoptic ones: things split by edges.",
    "prompts": "Write points and boxes of instances for SAM, SAM 2, ultralytics.",
    "gallery": "Make a web page of photos, edges, instances and refined masks, with a slider.",
    "info": "Show what an engine says about itself, and the device it would run on.",
    "doctor": "Try what is installed here, and say what each missing part would add.",
    "pretrain": "Train a pixel-space diffusion backbone of your own on a folder of photos.",
    "label": "Teacher: pseudo-labels (t*, ABDiv, ternary edges) for a folder of photos.",
    "distill": "Train the one-step student on a backbone and the teacher's labels.",
    "distill-nano": "Train a small convolutional student, for CPUs, on the same labels.",
    "cutouts": "Cut the things in photos out along their edges, as RGBA pictures.",
    "self-train": "Make a student better by scenes composed of its own cut-outs.",
    "combine": "Make one student of two: with a backbone, and convolutional.",
    "export": "Turn a student into one engine file and check its answers against torch.",
    "benchmark": "Measure latency, throughput and memory of engines on this machine.",
    "serve": "Answer photos with their edges over HTTP.",
    "deploy": "Write the folder that an inference server loads (Triton).",
    "evaluate": "Measure engines and baselines against human annotations, in one table.",
    "tables": "Make the paper's tables (1, 3, 6, figure 10) from the results of evaluate.",
}


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command = import_module(f"trace_sdk.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))

    def main(self, *args: Any, **options: Any) -> Any:
        write_what_can_be()
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> object:
        with report_errors():
            return super().invoke(ctx)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trace-sdk")
def main() -> None:
    """Instance edges without annotations, from the self-attention of diffusion models.

    \b
    Edges for your own photos, with the engine that comes with the package:
      trace-sdk detect street.jpg -o edges/
    \b
    An engine of your own, stage by stage (pip install "trace-sdk[train]"):
      pretrain → label → distill → export → evaluate

    Each command explains itself: trace-sdk detect --help
    """

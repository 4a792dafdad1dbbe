"""`trace-sdk tables`: the paper's tables from a folder of results."""

from __future__ import annotations

from pathlib import Path

import click

from trace_sdk.atomic import write_bytes, write_text
from trace_sdk.cli.console import errors, output
from trace_sdk.errors import ArgumentError


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="A Markdown file.  [default: only shown]")
@click.option("--plot", is_flag=True, help="Also draw figure 10, beside the Markdown file as NAME.figure10.png.")
@click.option("--ours", default="trace", show_default=True, help="Name of our edges in BASE+EDGES.")
@click.option("--ablation", default="", metavar="A,B,...", help="Names of the edges of each step, for table 3.")
def command(results: tuple[Path, ...], out: Path | None, plot: bool, ours: str, ablation: str) -> None:
    """Make the paper's tables from the results of trace-sdk evaluate.

    RESULTS are folders; every quality.json in them is read. Name masks BASE and BASE+EDGES when you evaluate them:

    \b
      trace-sdk refine --masks cutler.json --images val/ -o cutler+trace.json
      trace-sdk refine --masks cutler.json --images val/ --edges hed/ --threshold 0.5 -o cutler+hed.json
      trace-sdk evaluate coco_val/ --engine trace-small --edges hed=hed/ -o results/edges/
      trace-sdk evaluate coco_val/ --masks cutler=cutler.json --masks cutler+trace=cutler+trace.json \\
          --masks cutler+hed=cutler+hed.json -o results/masks/
      trace-sdk tables results/ -o tables.md --plot

    \b
    Tables:
      1          AP, AP50, AP75 and AR100 of each BASE, and of BASE+OURS
      3          AP with the edges of each step of an ablation (--ablation abdiv,iep,distilled)
      6          ODS, OIS and clDice of every edge detector
      figure 10  AP of each BASE with every kind of edges in place of ours

    What a folder lacks is "not measured".

    \b
    Exit code:
      0    done
      1    no result, or one that is malformed or contradicts another
      2    wrong usage
    """
    from trace_sdk.evaluation.tables import figure_10, paper_tables, read_results

    if plot and out is None:
        raise ArgumentError("--plot draws beside the Markdown file. Name it with -o.")

    edges, masks = read_results(results)
    text = paper_tables(edges, masks, ours, [step for step in ablation.split(",") if step])
    output.print(text, markup=False, soft_wrap=True)
    if out is not None:
        write_text(out, text)
        if plot and (picture := figure_10(masks, ours)) is not None:
            write_bytes(out.with_suffix(".figure10.png"), picture)
        elif plot:
            errors.print("Figure 10 is not drawn: no masks BASE+EDGES were measured.", markup=False, soft_wrap=True)

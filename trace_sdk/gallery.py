"""A static web page of photos and what was found in them, two pictures at a time under a slider. No server needed."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_sdk.atomic import write_text


@dataclass(frozen=True)
class Exhibit:
    """One photo. pictures: (caption, file relative to the page), at least two, all of one size. note: under it."""

    title: str
    width: int
    height: int
    pictures: tuple[tuple[str, str], ...]
    note: str = ""


def write_page(path: Path, title: str, exhibits: Sequence[Exhibit]) -> None:
    """Write the page; the pictures are to lie beside it. Raises OutputError."""
    figures = "\n".join(_figure(number, exhibit) for number, exhibit in enumerate(exhibits))
    heading = html.escape(title)
    write_text(path, _PAGE.replace("{title}", heading).replace("{figures}", figures))


def _figure(number: int, exhibit: Exhibit) -> str:
    def choice(side: str, chosen: int) -> str:
        options = "".join(
            f'<option value="{html.escape(file)}"{" selected" if i == chosen else ""}>{html.escape(caption)}</option>'
            for i, (caption, file) in enumerate(exhibit.pictures)
        )
        label = html.escape(f"{side} picture of {exhibit.title}")
        return f'<select class="{side}" aria-label="{label}">{options}</select>'

    (_, left), *_, (_, right) = exhibit.pictures
    title, note = html.escape(exhibit.title), html.escape(exhibit.note)
    size = f'width="{exhibit.width}" height="{exhibit.height}" loading="lazy"'
    return f"""<figure id="photo-{number}">
<div class="pair">
<img class="right" src="{html.escape(right)}" alt="{title}, right" {size}>
<img class="left" src="{html.escape(left)}" alt="{title}, left" {size}>
<span class="line"></span>
<input type="range" min="0" max="100" value="50" aria-label="{title}: how much of the left picture is shown, percent">
</div>
<figcaption>{choice("left", 0)}<span>{title}{f" · {note}" if note else ""}</span>{
        choice("right", len(exhibit.pictures) - 1)
    }</figcaption>
</figure>"""


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: #222; background: #fafafa; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #161616; } }
figure { margin: 0 0 2.5rem; }
.pair { position: relative; line-height: 0; }
.pair img { width: 100%; height: auto; }
.pair .left { position: absolute; inset: 0; clip-path: inset(0 50% 0 0); }
.pair .line { position: absolute; top: 0; bottom: 0; left: 50%; width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 3px #000; pointer-events: none; }
.pair input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.pair:focus-within { outline: 3px solid #2a7de1; outline-offset: 2px; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; margin-top: .5rem; }
select { font: inherit; }
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
<script>
for (const figure of document.querySelectorAll("figure")) {
  const slider = figure.querySelector("input");
  slider.addEventListener("input", () => {
    figure.querySelector("img.left").style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`;
    figure.querySelector(".line").style.left = `${slider.value}%`;
  });
  for (const side of ["left", "right"]) {
    const choice = figure.querySelector(`select.${side}`);
    choice.addEventListener("change", () => { figure.querySelector(`img.${side}`).src = choice.value; });
  }
}
</script>
</html>
"""

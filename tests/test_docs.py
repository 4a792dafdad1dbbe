"""What the documentation names exists: files, pictures, commands, options, functions, Python that compiles."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "recipes/trace-small/CREDITS.md",
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^|\n\n)((?:    [^\n]*\n)+)")
COMMAND = re.compile(r"(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(trace-sdk\s.*)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    if not page.is_file():
        pytest.fail(f"{page} does not exist")
    return page.read_text(encoding="utf-8")


def relative_links(text: str) -> set[tuple[str, str]]:
    """File, "" for the page itself, and anchor, "" without, of links and pictures outside of code blocks."""
    found = {first or second for first, second in LINK.findall(FENCE.sub("", text))}
    parts = (link.partition("#") for link in found if not re.match(r"[a-z]+:", link))
    return {(file, anchor) for file, _, anchor in parts}


def links(text: str) -> set[str]:
    """The files that a page links to."""
    return {file for file, _ in relative_links(text) if file}


def headings(text: str) -> set[str]:
    """The anchors that a page offers: its headings as GitHub writes them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_anchors(page: Path, text: str) -> set[str]:
    """Links to a heading, of this page or another, that is not there."""
    return {
        f"{file}#{anchor}"
        for file, anchor in relative_links(text)
        if anchor and anchor not in headings(read(page.parent / file) if file else text)
    }


def command_lines(text: str) -> list[str]:
    """Each `trace-sdk …` line of the code blocks, continued lines joined, comments and pipes off."""
    blocks = [code for language, code in FENCE.findall(text) if language != "python"]
    blocks += INDENTED.findall(FENCE.sub("\n", text))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|\|\||[#|;&>]", line)]
    return [match[1] for part in parts if (match := COMMAND.match(part))]


def check_command(line: str) -> None:
    """Raise click's error if the command or one of its options is not there."""
    words = [word for word in shlex.split(line)[1:] if word != "…"]
    if words[0].startswith("-"):
        command: click.Command = main
    else:
        found = main.get_command(click.Context(main), words.pop(0))
        assert found is not None, f"no such command: {line}"
        command = found
    context = click.Context(command, info_name="trace-sdk")
    command.make_parser(context).parse_args(words)


@each_page
def test_links_and_pictures_exist(page: Path) -> None:
    missing = {file for link in links(read(page)) if not (file := (page.parent / link).resolve()).exists()}
    assert not missing


@each_page
def test_headings_that_are_linked_to_exist(page: Path) -> None:
    assert not broken_anchors(page, read(page))


def test_every_page_is_reached_from_the_first_one() -> None:
    first = ROOT / "docs/index.md"
    reached = {(first.parent / file).resolve() for file in links(read(first))}
    assert {page for page in PAGES if page != first} <= reached


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    for line in command_lines(read(page)):
        check_command(line)


@each_page
def test_python_compiles(page: Path) -> None:
    for language, code in FENCE.findall(read(page)):
        if language in ("python", "py"):
            compile(code, str(page), "exec")


@each_page
def test_named_modules_and_functions_exist(page: Path) -> None:
    """`trace_sdk.a.b.name`; in a table, `trace_sdk.a.b` and beside it the functions of that module."""
    for line in FENCE.sub("", read(page)).splitlines():
        names = re.findall(r"`([A-Za-z_][\w.]*)`", line)
        module = None
        for name in names:
            if name.startswith("trace_sdk."):
                module = resolve(name)
            elif module is not None and line.startswith("|"):
                assert hasattr(module, name), f"{module} has no {name}"


def resolve(name: str) -> object:
    """The module, or the attribute of one, that a dotted name stands for."""
    if name.endswith(".py"):
        raise AssertionError(f"write {name} as a path")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(resolve(parent), attribute)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```sh\ntrace-sdk info x.onnx --json  # what is it\n```\n", ["trace-sdk info x.onnx --json"]),
        ("Run:\n\n    pip install trace-sdk && trace-sdk detect a.jpg\n", ["trace-sdk detect a.jpg"]),
        ("```sh\ntrace-sdk detect a.jpg \\\n  -o out\n```\n", ["trace-sdk detect a.jpg    -o out"]),
        (
            "    $ trace-sdk export s -o e.onnx && trace-sdk info e.onnx\n",
            ["trace-sdk export s -o e.onnx", "trace-sdk info e.onnx"],
        ),
        ("say `trace-sdk nothing`\n", []),
    ],
)
def test_command_lines_are_found(text: str, found: list[str]) -> None:
    assert command_lines(text) == found


@pytest.mark.parametrize(
    "line", ["trace-sdk detect a.jpg -o out --colour", "trace-sdk info --device", "trace-sdk dtect x"]
)
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        check_command(line)


def test_a_broken_link_is_noticed() -> None:
    assert links('[a](gone.md#x) ![b](p/b.png "t") <img src="c.png"> [d](https://e.org) [f](#g)') == {
        "gone.md",
        "p/b.png",
        "c.png",
    }


def test_a_broken_anchor_is_noticed() -> None:
    text = "# The 2nd: what (and why)\n[a](#the-2nd-what-and-why) [b](#the-second)\n"
    text += "[c](docs/method.md#notation) [d](docs/method.md#no)"
    assert broken_anchors(ROOT / "README.md", text) == {"#the-second", "docs/method.md#no"}


def test_pictures_are_small() -> None:
    sizes = [file.stat().st_size for file in (ROOT / "docs/pictures").iterdir()]
    assert max(sizes) < 150_000 and sum(sizes) < 1_000_000


def test_pictures_can_be_made(tiny_backbone: PixelBackbone, tiny_engine: Path, photos: Path, tmp_path: Path) -> None:
    tiny_backbone.save(tmp_path / "backbone")
    command = [sys.executable, f"{ROOT}/docs/make_pictures.py", f"{photos}/b.jpg", "--size", "64"]
    command += ["--backbone", f"{tmp_path}/backbone", "--engine", f"{tiny_engine}", "-o", f"{tmp_path}/pictures"]
    subprocess.run(command, check=True, timeout=120)
    made = {file.name for file in (tmp_path / "pictures").iterdir()}
    pages = (ROOT / "README.md", ROOT / "docs/walkthrough.md")
    shown = {Path(link).name for page in pages for link in links(read(page)) if "pictures/" in link}
    assert made == shown
    about = json.loads((tmp_path / "pictures/made-with.json").read_text())
    assert about["teacher"]["size"] == 64 and about["student"]["engine"] == "tiny"


def test_pictures_of_self_training_can_be_made(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "pictures"
    for folder in (photos, out):
        folder.mkdir()
    shutil.copy(ROOT / "examples/photos/eggs.jpg", photos)
    subprocess.run([sys.executable, f"{ROOT}/docs/draw_own_scenes.py", photos, "-o", out], check=True, timeout=120)
    assert {file.name for file in out.iterdir()} == {"cutouts.png", "own-scenes.jpg"}
    cutouts, scenes = (np.asarray(Image.open(out / name).convert("L")) for name in ("cutouts.png", "own-scenes.jpg"))
    assert cutouts.shape == (92, 11 * 92) and (cutouts < 200).mean() > 0.1
    asked = scenes[scenes.shape[0] // 4 : scenes.shape[0] // 2]  # the second of four strips
    assert 0.01 < (asked < 100).mean() < 0.2 and (asked > 240).mean() > 0.7

"""What lies below a folder that somebody gave, wherever its links lead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, hidden names (with a dot first) left out, in no order that means anything.

    Links to folders elsewhere are followed, as data sets are put together by them; those to what lies below `folder`
    anyway, or to what holds it, are not: nothing is met twice, and no ring of links is without end.
    """
    return _below(folder, {folder.resolve()}, folder.resolve())


def _below(folder: Path, known: set[Path], top: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in names if not name.startswith("."))
        for link in (Path(place, name) for name in folders):
            if link.is_symlink():
                target = link.resolve()
                if target not in top.parents and known.isdisjoint((target, *target.parents)):
                    known.add(target)
                    yield from _below(link, known, top)

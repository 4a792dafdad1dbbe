"""Files of Debian packages, downloaded and unpacked, nothing installed; and those inside Qt's resource files."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trace_sdk.atomic import make_folder
from trace_sdk.errors import DatasetError

FOLDER, PACKED, ZSTD = 2, 1, 4  # flags of an entry of a Qt resource file


@contextmanager
def unpacked(packages: Iterable[str], debs: Path) -> Iterator[Path]:
    """A temporary folder with each package's files below PACKAGE/; `apt-get download` fetches what `debs` lacks."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise SystemExit("error: this needs apt-get and dpkg; run it on Debian, or in a debian:bookworm container.")
    make_folder(debs)
    with tempfile.TemporaryDirectory() as folder:
        for package in packages:
            if (
                not list(debs.glob(f"{package}_*.deb"))
                and subprocess.run(["apt-get", "download", package], cwd=debs).returncode
            ):
                raise SystemExit(f"error: apt-get does not find {package}. Run `apt-get update` first, or give --debs.")
            deb = next(debs.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", deb, Path(folder, package)], check=True)
        yield Path(folder)


def check_listed(root: Path, names: Sequence[str], listed: Path, packages: Mapping[str, str]) -> None:
    """End the script if a file that `listed` names is not below `root`."""
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise SystemExit(
            f"error: {len(missing)} files of {listed} are not in the packages, the first {missing[0]}. "
            f"The list was made from Debian 12: {packages}. Put those .deb files into a folder, give it as --debs."
        )


def open_resources(file: Path) -> None:
    """Put the files of NAME.rcc into a folder `NAME.rcc:` beside it."""
    for path, content in qt_resources(file).items():
        inside = Path(f"{file}:{path}")
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.write_bytes(content)


def qt_resources(file: Path) -> dict[str, bytes]:
    """Name → content of all files in a Qt resource file (.rcc, any version that is not zstd), as Qt documents it.

    Raises:
        DatasetError: it is no such file.
    """
    data = file.read_bytes()
    found: dict[str, bytes] = {}

    def part(at: int, length: int) -> bytes:
        if at + length > len(data):
            raise ValueError("it ends too early")
        return data[at : at + length]

    def numbers(layout: str, at: int) -> tuple[int, ...]:
        return struct.unpack(f">{layout}", part(at, struct.calcsize(f">{layout}")))

    def walk(number: int, above: str) -> None:
        entry = tree + number * size
        name, flags = numbers("IH", entry)
        length, _ = numbers("HI", names + name)
        path = f"{above}/{part(names + name + 6, 2 * length).decode('utf-16-be')}" if number else ""
        if flags & FOLDER:
            count, first = numbers("II", entry + 6)
            for child in range(first, first + count):
                walk(child, path)
            return
        if flags & ZSTD:
            raise ValueError("packed by zstd")
        at = contents + numbers("I", entry + 10)[0]
        content = part(at + 4, *numbers("I", at))
        found[path] = zlib.decompress(content[4:]) if flags & PACKED else content

    try:
        if part(0, 4) != b"qres":
            raise ValueError("it begins otherwise")
        version, tree, contents, names = numbers("4I", 4)
        size = 22 if version >= 2 else 14
        walk(0, "")
    except (ValueError, zlib.error) as error:
        raise DatasetError(f"{file} is not a Qt resource file that can be read: {error}. Take Debian 12's.") from error
    return found

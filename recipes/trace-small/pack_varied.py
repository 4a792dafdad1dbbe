"""Make the folder of varied, sharp photos that trace-nano last learnt from, from Debian packages.

    python recipes/trace-small/pack_varied.py WORK/varied [--debs DIR]

Fetches the packages below into DIR with `apt-get download` (run `apt-get update` first; no root, nothing is installed)
and writes the photos that VARIED.txt beside this script lists, of animals, tools, buildings, food, landscapes and
textures, with the longest side of 1024 px at most. That list is a selection by eye: photos, none with an outline of its
own, none of those that the held-out scenes show. Licences: CREDITS.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from debian_packages import check_listed, open_resources, unpacked
from PIL import Image

from trace_sdk.atomic import make_folder
from trace_sdk.cli.console import run_script
from trace_sdk.pictures import save_png

# As in Debian 12 (bookworm), from which the list was made.
PACKAGES = {
    "gcompris-qt-data": "3.1-2",
    "lomiri-wallpapers-16.04": "20.04.0-2",
    "mate-backgrounds": "1.26.0-1",
    "palapeli-data": "4:22.12.3-1",
    "plasma-workspace-wallpapers": "4:5.27.5-2",
    "tuxpaint-data": "1:0.9.28-sdl2-1",
}
VARIED = Path(__file__).with_name("VARIED.txt")
LONGEST = 1024  # pixels


def pack(root: Path, out: Path, varied: Path = VARIED) -> int:
    """Write each file of the list, found below `root`, as `out`/NUMBER-NAME.png; the number of photos.

    A line is PACKAGE/PATH, or PACKAGE/PATH.rcc:/PATH for what lies in a Qt resource file.
    """
    names = varied.read_text("utf-8").split()
    for archive in {name.partition(":")[0] for name in names if ":" in name}:
        if (root / archive).is_file():
            open_resources(root / archive)
    check_listed(root, names, varied, PACKAGES)
    make_folder(out)
    for number, name in enumerate(names):
        with Image.open(root / name) as photo:
            small = photo.convert("RGB")
        small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        save_png(small, out / f"{number:03d}-{Path(name).stem}.png")
    return len(names)


def main() -> None:
    """Fetch, unpack into a temporary folder, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the photos")
    parser.add_argument("--debs", type=Path, help="folder of .deb files  [default: debs/ beside the photos' folder]")
    options = parser.parse_args()
    with unpacked(PACKAGES, options.debs or options.out.parent / "debs") as root:
        print(f"{options.out}: {pack(root, options.out)} photos")


if __name__ == "__main__":
    run_script(main)

"""Make the folder of real photos that the backbone is trained on, from local copies of four public sets.

    python recipes/trace-small/pack_photos.py SETS WORK/photos

SETS holds these folders (a shallow clone will do, of codec-corpus the folder CID22):

    cid  https://github.com/imazen/codec-corpus           CID22-512, CC BY-SA 4.0
    cq   https://github.com/IanManske/quantette           CQ100, CC BY-SA 4.0
    gro  https://github.com/marcusklasson/GroceryStoreDataset    MIT
    flo  flower_photos, the archive of TensorFlow's tutorials or a copy of it, unpacked; CC BY 2.0

FILES.tsv beside this script lists the 5,609 photos: the name written here, and the file it is made of. Folders
differ between copies of a set, so files are found by name wherever they lie in it; groceries, whose names repeat,
by path. Groceries and flowers are scaled down to 256 px on the short side where they are larger. Photos that are
there already are left alone. Credits: CREDITS.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from trace_sdk.atomic import write_whole
from trace_sdk.cli.console import run_script

FILES = Path(__file__).with_name("FILES.tsv")
SHORT_SIDE = {"gro": 256, "flo": 256}  # the other sets as they are
BY_NAME = ("cid", "cq", "flo")
QUALITY = 80


def shrink(photo: Image.Image, short_side: int | None) -> Image.Image:
    """RGB with the short side at most `short_side` pixels; never enlarged."""
    photo = photo.convert("RGB")
    if short_side is None or min(photo.size) <= short_side:
        return photo
    scale = short_side / min(photo.size)
    size = (round(photo.width * scale), round(photo.height * scale))
    return photo.resize(size, Image.Resampling.LANCZOS)


def find_originals(sets: Path, files: Path) -> dict[str, Path]:
    """NAME → original, for each line of the list."""
    by_name = {name: {file.name: file for file in sorted((sets / name).rglob("*.*"))} for name in BY_NAME}
    originals = {}
    for line in files.read_text("utf-8").splitlines():
        name, original = line.split("\t")
        known = by_name.get(original.partition("/")[0], {})
        originals[name] = known.get(Path(original).name, sets / original)
    return originals


def pack(sets: Path, out: Path, files: Path = FILES) -> int:
    """Write each photo of the list as `out`/NAME.webp; the number of photos written now.

    Nothing is written if an original is missing.
    """
    originals = find_originals(sets, files)
    missing = [file for file in originals.values() if not file.is_file()]
    if missing:
        raise SystemExit(
            f"error: {len(missing)} of {len(originals)} photos are missing, the first {missing[0]}. "
            "See --help for where the sets come from."
        )
    written = 0
    for name, original in originals.items():
        target = out / f"{name}.webp"
        if not target.is_file():
            short_side = SHORT_SIDE.get(original.relative_to(sets).parts[0])
            with Image.open(original) as photo, write_whole(target) as file:
                shrink(photo, short_side).save(file, "WEBP", quality=QUALITY)
            written += 1
    return written


def main() -> None:
    """Check that all originals are there, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path, help="folder with cid/, cq/, gro/ and flo/")
    parser.add_argument("out", type=Path, help="folder for the photos")
    options = parser.parse_args()
    print(f"{options.out}: {pack(options.sets, options.out)} photos written")


if __name__ == "__main__":
    run_script(main)

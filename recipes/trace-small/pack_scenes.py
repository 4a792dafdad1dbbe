"""Make scenes256.npz, the cut-outs and backgrounds that scenes are composed of, from Debian packages.

    python recipes/trace-small/pack_scenes.py WORK/scenes256.npz [--debs DIR]

Fetches the packages below into DIR with `apt-get download` (run `apt-get update` first; no root, nothing is
installed), unpacks them with `dpkg -x`, and packs the files that SOURCES.txt beside this script lists, in its
order. That list is the selection: which stamps are photographic was judged by eye. A copy is written beside the
archive. Licences: CREDITS.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from debian_packages import check_listed, unpacked
from numpy.typing import NDArray
from PIL import Image

from trace_sdk.atomic import write_bytes, write_whole
from trace_sdk.cli.console import run_script

# As in Debian 12 (bookworm), from which the list was made.
PACKAGES = {
    "tuxpaint-stamps-default": "2022.06.04-1",
    "gnome-backgrounds": "43.1-1",
    "mate-backgrounds": "1.26.0-1",
    "plasma-workspace-wallpapers": "4:5.27.5-2",
    "ukui-wallpapers": "20.04.3-1.1",
    "lomiri-wallpapers": "20.04.0-2",
}
SOURCES = Path(__file__).with_name("SOURCES.txt")
CANVAS, LONGEST = 160, 150  # of a cut-out, pixels
CLEAR = 16  # alpha up to this counts as clear where a cut-out is cropped
SIDE, SHARES = 256, (1.0, 0.7, 0.5)  # of a background: pixels, and parts of the photo's short side

Image.MAX_IMAGE_PIXELS = None  # the files are listed by name


def pack_cutout(image: Image.Image) -> NDArray[np.uint8]:
    """Crop to alpha, scale the longest side to 150, centre: premultiplied RGBA, uint8 [4, 160, 160]."""
    rgba = image.convert("RGBA")
    rgba = rgba.crop(rgba.getchannel("A").point(lambda alpha: 255 * (alpha > CLEAR)).getbbox())
    scale = LONGEST / max(rgba.size)
    width, height = (max(1, round(side * scale)) for side in rgba.size)
    pixels = np.asarray(rgba.resize((width, height), Image.Resampling.LANCZOS), np.float32)
    colour = np.rint(pixels[..., :3] * pixels[..., 3:] / 255)
    canvas = np.zeros((4, CANVAS, CANVAS), np.uint8)
    top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
    canvas[:3, top : top + height, left : left + width] = colour.transpose(2, 0, 1)
    canvas[3, top : top + height, left : left + width] = pixels[..., 3]
    return canvas


def pack_background(rng: np.random.Generator, image: Image.Image) -> NDArray[np.uint8]:
    """Square crops of 100, 70 and 50 % of the short side at random places: uint8 [3, 3, 256, 256]."""
    photo = image.convert("RGB")
    crops = []
    for share in SHARES:
        side = int(min(photo.size) * share)
        left = int(rng.integers(0, photo.width - side + 1))
        top = int(rng.integers(0, photo.height - side + 1))
        crop = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        crops.append(np.asarray(crop).transpose(2, 0, 1))
    return np.stack(crops)


def read_sources(file: Path) -> tuple[list[str], list[str]]:
    """The cut-outs and the backgrounds of a list, each as PACKAGE/PATH."""
    lines = file.read_text("utf-8").split()
    middle = lines.index("backgrounds")
    return lines[lines.index("sprites") + 1 : middle], lines[middle + 1 :]


def pack(root: Path, out: Path, sources: Path = SOURCES) -> None:
    """Pack the files of the list, found below `root`, into `out`; copy the list beside it."""
    cutouts, backgrounds = read_sources(sources)
    check_listed(root, [*cutouts, *backgrounds], sources, PACKAGES)
    rng = np.random.default_rng(0)
    sprites = np.stack([pack_cutout(Image.open(root / name)) for name in cutouts])
    backs = np.concatenate([pack_background(rng, Image.open(root / name)) for name in backgrounds])
    with write_whole(out) as file:
        np.savez_compressed(file, sprites=sprites, backs=backs)
    write_bytes(out.with_name("SOURCES.txt"), sources.read_bytes())
    print(f"{out}: {len(sprites)} cut-outs, {len(backs)} crops of {len(backgrounds)} backgrounds")


def main() -> None:
    """Fetch, unpack into a temporary folder, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the archive to write, .npz")
    parser.add_argument("--debs", type=Path, help="folder of .deb files  [default: debs/ beside the archive]")
    options = parser.parse_args()
    with unpacked(PACKAGES, options.debs or options.out.parent / "debs") as root:
        pack(root, options.out)


if __name__ == "__main__":
    run_script(main)

"""Make onnxruntime-gpu small enough to carry to a GPU machine that no registry reaches: code of one architecture alone.

    pip download --no-deps onnxruntime-gpu
    python benchmarks/gpu/pack_onnxruntime.py onnxruntime_gpu-*.whl OUT --capability 90 --part-mib 8

The CUDA provider holds machine code for six architectures; what is not of the one asked for becomes zeros, which
compress to nothing. The TensorRT provider is left out. Writes OUT/part-00, part-01, … of one tar.xz, which `run.sh`
unpacks.
"""

from __future__ import annotations

import argparse
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

CONTAINER = 0xBA55ED50  # first word of a container of machine code
MACHINE_CODE = 2  # kind of an entry; 1 is PTX
ENTRY_HEAD = 64  # bytes at least


def strip(library: bytearray, capability: int) -> dict[int, int]:
    """Zero the code of other architectures, in place; bytes that were there by architecture.

    An entry keeps its head, so that the driver still finds its way, and passes by what is not the GPU's.
    """
    found: dict[int, int] = {}
    for start, end in sections(library):
        place = start
        while place < end - 16:
            magic, _, head, size = struct.unpack_from("<IHHQ", library, place)
            if magic != CONTAINER:
                place += 4
                continue
            entry, stop = place + head, place + head + size
            while entry < stop:
                kind, _, own_head, payload = struct.unpack_from("<HHIQ", library, entry)
                architecture = struct.unpack_from("<I", library, entry + 28)[0]
                body = entry + own_head
                if own_head < ENTRY_HEAD or body + payload > stop:
                    raise SystemExit(f"error: the entry at byte {entry} is not of the form this script knows.")
                found[architecture] = found.get(architecture, 0) + payload
                if (kind, architecture) != (MACHINE_CODE, capability):
                    library[body : body + payload] = bytes(payload)
                entry = body + payload
            place = stop
    return found


def sections(library: bytearray) -> Iterator[tuple[int, int]]:
    """Where the sections of a 64-bit ELF file lie that hold containers: (first byte, end)."""
    table = struct.unpack_from("<Q", library, 0x28)[0]
    size, count, names_at = struct.unpack_from("<HHH", library, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", library, table + number * size) for number in range(count)]
    names = heads[names_at][4]
    for head in heads:
        name = bytes(library[names + head[0] : library.index(b"\0", names + head[0])]).lower()
        if b"fatbin" in name and b"segment" not in name:
            yield head[4], head[4] + head[5]


def pack(wheel: Path, capability: int) -> bytes:
    """The wheel's files as a tar.xz, the CUDA provider stripped."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(wheel) as files,
        lzma.open(stream, "wb", preset=9) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w|") as tar,
    ):
        for name in files.namelist():
            if name.endswith("/") or "providers_tensorrt" in name:
                continue
            content = bytearray(files.read(name))
            if "providers_cuda" in name:
                sizes = strip(content, capability)
                if capability not in sizes:
                    raise SystemExit(f"error: {name} has code for {sorted(sizes)}, not for {capability}.")
                print({arch: f"{size / 2**20:.0f} MiB" for arch, size in sorted(sizes.items())})
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(bytes(content)))
    return stream.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--capability", type=int, default=90, help="Of the GPU, without the point: 90 for an H100 or H200."
    )
    parser.add_argument("--part-mib", type=int, default=8)
    options = parser.parse_args()
    packed, step = pack(options.wheel, options.capability), options.part_mib << 20
    options.out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(packed), step)):
        (options.out / f"part-{number:02}").write_bytes(packed[start : start + step])
    print(f"{len(packed) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

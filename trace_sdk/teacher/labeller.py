"""Labels for a whole folder of photos, resumable: what is written is whole, and is not made twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trace_sdk.errors import TraceError
from trace_sdk.images import read_image
from trace_sdk.teacher.labels import claim_folder, save_label
from trace_sdk.teacher.plot import plot
from trace_sdk.teacher.teacher import Teacher


@dataclass
class LabelSummary:
    """What became of a folder: counts, and the reason for each photo that failed."""

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    t_star: list[float] = field(default_factory=list)


def label_folder(
    teacher: Teacher,
    photos: list[Path],
    root: Path,
    out: Path,
    backbone_sha256: str,
    *,
    plots: bool = False,
    report: Callable[[Path], None] = lambda photo: None,
) -> LabelSummary:
    """Annotate each photo into `out`, at its path below `root` with `.npz` added.

    Photos that have a label file are skipped, so a run that was cut goes on; a photo that cannot be read is
    recorded with its reason and the others are still done.

    Args:
        plots: write a picture beside each label, `.png` in place of `.npz`.

    Raises:
        ArgumentError: `out` holds labels made in another way.
        OutputError: a label cannot be written.
    """
    claim_folder(out, teacher.settings, backbone_sha256)
    summary = LabelSummary()
    for photo in photos:
        file = label_file(photo, root, out)
        if file.is_file():
            summary.skipped += 1
        else:
            try:
                image = read_image(photo)
            except TraceError as error:
                summary.failed[str(photo)] = str(error)
            else:
                annotation = teacher.annotate(image.rgb)
                if plots:
                    plot(teacher, image.rgb, annotation, file.with_suffix(".png"))
                save_label(file, annotation)
                summary.done += 1
                summary.t_star += [annotation.emergence.t_star] if annotation.emergence else []
        report(photo)
    return summary


def label_file(photo: Path, root: Path, out: Path) -> Path:
    """Where the label of a photo lies: photos/a/b.jpg → out/a/b.jpg.npz."""
    relative = photo.relative_to(root)
    return out / relative.with_name(relative.name + ".npz")

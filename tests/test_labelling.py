"""Labels for whole data sets: every layout, several processes on one folder, kill -9, and failures with reasons."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main
from trace_sdk.errors import ArgumentError, DatasetError, DeviceError
from trace_sdk.labelling.claims import Claims
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import CLAIMS, LabelJob
from trace_sdk.labelling.states import label_file
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.teacher.labels import load_label
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

SMALL = TeacherSettings(size=96, stride=300)


def picture(size: tuple[int, int] = (20, 16), colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (colour, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def make_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the claims, by name."""
    files = [file for file in folder.rglob("*") if file.is_file() and CLAIMS not in file.parts]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def states(labels: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (labels / "manifest.jsonl").read_text().splitlines()]
    return {line["image"]: line["state"] for line in lines}


COCO = json.dumps({"images": [{"file_name": "b.png"}, {"file_name": "more/a.png"}], "annotations": "unread"}).encode()


@pytest.mark.parametrize(
    ("files", "given", "names"),
    [
        (["b.jpg", "a.PNG", "more/c.webp", "notes.md", ".a.jpg", ".git/x.png"], ".", ["a.PNG", "b.jpg", "more/c.webp"]),
        (["a.jpg"], "a.jpg", ["a.jpg"]),
        (["in/a.jpg", "in/b/a.jpg", "in/b.png"], "in/**/*.jpg", ["a.jpg", "b/a.jpg"]),
        (["x1/a.jpg", "x2/a.jpg"], "x?", ["x1/a.jpg", "x2/a.jpg"]),
        (["JPEGImages/1.jpg", "SegmentationClass/1.png", "Annotations/1.xml"], ".", ["1.jpg"]),
        (["train/1.jpg", "annotations/panoptic/1.png"], ".", ["train/1.jpg"]),
    ],
)  # fmt: skip
def test_names_are_relative_to_what_was_given(files: list[str], given: str, names: list[str], tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(files, b"x"))
    found = find_images(tmp_path / given)
    assert [image.name for image in found] == names
    assert all(image.read() == b"x" for image in found)


def test_lists_name_paths_and_voc_ids(tmp_path: Path) -> None:
    write(tmp_path / "voc/JPEGImages", {"2007_1.jpg": b"1", "2007_2.jpg": b"2"})
    write(tmp_path / "voc/ImageSets/Main", {"cat_train.txt": b"2007_2  1\n2007_1 -1\n"})
    voc = find_images(tmp_path / "voc/ImageSets/Main/cat_train.txt")
    assert [(image.name, image.read()) for image in voc] == [("2007_2.jpg", b"2"), ("2007_1.jpg", b"1")]
    write(tmp_path / "lists", {"in/a.png": b"a"})
    (tmp_path / "lists/all.txt").write_text(f"in/a.png\n\n../voc/JPEGImages/2007_1.jpg\n{tmp_path}/gone.jpg\n")
    found = find_images(tmp_path / "lists/all.txt")
    inside = str(tmp_path).lstrip("/")
    assert [image.name for image in found] == [
        "in/a.png", f"{inside}/voc/JPEGImages/2007_1.jpg", f"{inside}/gone.jpg",
    ]  # fmt: skip
    assert found[1].read() == b"1"


@pytest.mark.parametrize("folder", ["images", "val2017", "images/val2017", "annotations"])
def test_coco_names_images_wherever_they_lie(folder: str, tmp_path: Path) -> None:
    write(tmp_path, {f"{folder}/b.png": b"b", f"{folder}/more/a.png": b"a", f"{folder}/unlisted.png": b""})
    write(tmp_path, {"annotations/instances_val2017.json": COCO})
    found = find_images(tmp_path / "annotations/instances_val2017.json")
    assert [(image.name, image.read()) for image in found] == [("b.png", b"b"), ("more/a.png", b"a")]


def test_one_image_for_each_key_of_a_tar(tmp_path: Path) -> None:
    members = {"./s/1.png": b"mask", "./s/1.jpg": b"one", "s/1.json": b"{}", "s/2.seg.png": b"mask", "s/2.webp": b"two",
               "._s.jpg": b"", "../out.jpg": b"three"}  # fmt: skip
    make_tar(tmp_path / "train-0.tar", members)
    make_tar(tmp_path / "train-1.tar", {"1.jpg": b"four"})
    found = {image.name: image.read() for image in find_images(tmp_path / "*.tar")}
    assert sorted(name for name in found if "out" not in name) == [
        "train-0.tar/s/1.jpg", "train-0.tar/s/2.webp", "train-1.tar/1.jpg",
    ]  # fmt: skip
    assert sorted(found.values()) == [b"four", b"one", b"three", b"two"]
    assert not any(".." in name for name in found), "a label would lie outside of its folder"
    assert found == {image.name: image.read() for image in find_images(tmp_path)}


@pytest.mark.parametrize(
    ("name", "data", "fragment"),
    [
        ("empty/readme.md", b"", "No photos in"),
        ("a.tar.gz", b"\x1f\x8b", "Unpack it"),
        ("a.tar", b"no tar at all", "not a whole, uncompressed tar"),
        ("a.json", b"[]", "not a COCO file"),
        ("a.json", b'{"images": [{"file_name": "gone.jpg"}]}', "in none of"),
        ("a.txt", b"\xff\xfe\xff", "list of paths"),
    ],
)
def test_malformed_sources(name: str, data: bytes, fragment: str, tmp_path: Path) -> None:
    write(tmp_path, {name: data})
    with pytest.raises(DatasetError, match=fragment):
        find_images(tmp_path / name if "empty" not in name else tmp_path / "empty")


def test_a_tar_that_was_cut_short(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"1.png": picture(), "2.png": bytes(5000)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 512 * 2 + 512 + 2000])
    with pytest.raises(DatasetError, match=r"a\.tar"):
        find_images(tmp_path / "a.tar")


def test_two_images_of_one_name_are_refused_and_one_image_twice_is_not(tmp_path: Path) -> None:
    write(tmp_path, {"one/a.png": b"1", "two/a.png": b"2"})
    with pytest.raises(DatasetError, match=r"both be called a\.png"):
        find_images([tmp_path / "one", tmp_path / "two"])
    assert len(find_images([tmp_path / "one", str(tmp_path / "one/*.png")])) == 1


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-one photos of two shapes in a folder and a tar, and one that is none."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)

    def noisy(number: int) -> bytes:
        buffer = io.BytesIO()
        shape = (72, 96, 3) if number % 3 else (96, 72, 3)
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    write(folder, {f"p{number:02}.png": noisy(number) for number in range(15)} | {"p03b.png": b"not a picture"})
    make_tar(folder / "t.tar", {f"{number}.png": noisy(number) for number in range(6)})
    return folder


def job(backbone: PixelBackbone, images: Path, labels: Path, **more) -> LabelJob:
    return LabelJob(Teacher(backbone, SMALL), find_images(images), labels, "sha", batch=2, **more)


@pytest.fixture(scope="module")
def whole(tiny_backbone: PixelBackbone, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of a run that nothing cut."""
    labels = tmp_path_factory.mktemp("whole")
    summary = job(tiny_backbone, many, labels).run()
    assert (summary.done, summary.before, summary.elsewhere) == (21, 0, 0) and len(summary.t_star) == 21
    assert "p03b.png: is text" in summary.failed["p03b.png"]
    return labels


def test_every_image_has_its_state_and_labels_are_those_of_one_image(
    tiny_backbone: PixelBackbone, many: Path, whole: Path
) -> None:
    expected = {image.name: "failed" if image.name == "p03b.png" else "done" for image in find_images(many)}
    assert states(whole) == expected and len(expected) == 22
    assert json.loads((whole / "labels.json").read_text())["backbone_sha256"] == "sha"
    for name in ("p00.png", "t.tar/1.png"):
        image = next(image for image in find_images(many) if image.name == name)
        alone = Teacher(tiny_backbone, SMALL).annotate(np.asarray(Image.open(io.BytesIO(image.read()))))
        label = load_label(label_file(whole, name))
        np.testing.assert_allclose(label.abdiv, alone.abdiv, rtol=1e-3, atol=1e-4)
        assert (label.labels != alone.labels).mean() < 0.02
        assert label.about["emergence"]["t_star"] == alone.emergence.t_star


@pytest.mark.parametrize(
    "settings",
    [
        TeacherSettings(size=96, tile=64, stride=300),
        TeacherSettings(size=96, timesteps=(0.1, 0.4), mirror=True),
        TeacherSettings(size=96, tile=64, form="per-head", mirror=True, stride=300),
    ],
)
def test_a_batch_answers_as_each_of_its_images(tiny_backbone: PixelBackbone, settings: TeacherSettings) -> None:
    """Windows, mirrors and each image's own t* are put back to the image they belong to."""
    teacher = Teacher(tiny_backbone, settings)
    rng = np.random.default_rng(1)
    prepared = [teacher.prepare(rng.integers(0, 255, (64, 96, 3), np.uint8)) for _ in range(3)]
    together = teacher.annotate_batch(prepared)
    for image, found in zip(prepared, together, strict=True):
        (alone,) = teacher.annotate_batch([image])
        np.testing.assert_allclose(found.abdiv, alone.abdiv, rtol=1e-3, atol=1e-5)
        assert found.timesteps == alone.timesteps and (found.emergence is None) == (alone.emergence is None)
    assert np.abs(together[0].abdiv - together[1].abdiv).max() > 0.01, "it would not see images mixed up"


@pytest.mark.parametrize("images_done", [1, 2, 9])
def test_a_cut_run_ends_with_the_same_bytes(
    tiny_backbone: PixelBackbone, many: Path, whole: Path, tmp_path: Path, images_done: int
) -> None:
    seen = []

    def cut(name: str, reason: str | None) -> None:
        seen.append(name)
        if len(seen) == images_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(tiny_backbone, many, tmp_path).run(cut)
    assert not list((tmp_path / CLAIMS).iterdir()), "a claim was left behind"
    rest = job(tiny_backbone, many, tmp_path)
    assert 0 < rest.before < 22
    summary = rest.run()
    assert summary.done + summary.before + 1 >= 22 and contents(tmp_path) == contents(whole)
    assert job(tiny_backbone, many, tmp_path).run().done == 0


def test_half_a_batch_is_done_again_with_its_whole_batch(
    tiny_backbone: PixelBackbone, many: Path, whole: Path, tmp_path: Path
) -> None:
    """One image of a batch of two has its label: the other must not go through the model alone."""
    job(tiny_backbone, many, tmp_path).run()
    label_file(tmp_path, "p01.png").unlink()
    sizes: list[int] = []
    again = job(tiny_backbone, many, tmp_path)
    annotate = again._teacher.annotate_batch
    again._teacher.annotate_batch = lambda prepared: (sizes.append(len(prepared)), annotate(prepared))[1]
    assert again.run().done == 1 and sizes == [2]
    assert contents(tmp_path) == contents(whole)


def test_failures_stay_until_they_are_retried(tiny_backbone: PixelBackbone, tmp_path: Path) -> None:
    write(tmp_path / "in", {"a.png": b"cut short", "b.png": picture()})
    first = job(tiny_backbone, tmp_path / "in", tmp_path / "out").run()
    assert first.done == 1 and list(first.failed) == ["a.png"]
    write(tmp_path / "in", {"a.png": picture()})
    second = job(tiny_backbone, tmp_path / "in", tmp_path / "out").run()
    assert (second.done, second.before) == (0, 2) and list(second.failed) == ["a.png"]
    third = job(tiny_backbone, tmp_path / "in", tmp_path / "out", retry_failed=True).run()
    assert (third.done, third.failed) == (1, {}) and states(tmp_path / "out") == {"a.png": "done", "b.png": "done"}


def test_labels_of_two_makings_are_not_mixed(tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path) -> None:
    job(tiny_backbone, photos, tmp_path)
    with pytest.raises(ArgumentError, match="another backbone or other settings"):
        LabelJob(Teacher(tiny_backbone, SMALL), find_images(photos), tmp_path, "other sha")
    with pytest.raises(ArgumentError, match="batch must be"):
        LabelJob(Teacher(tiny_backbone, SMALL), find_images(photos), tmp_path, "sha", batch=0)


@pytest.mark.parametrize(("room", "fits"), [(2, True), (1, True), (0, False)])
def test_without_gpu_memory_the_batch_is_halved_once(
    tiny_backbone: PixelBackbone, photos: Path, tmp_path: Path, room: int, fits: bool
) -> None:
    teacher = Teacher(tiny_backbone, SMALL)
    annotate, sizes = teacher.annotate_batch, []

    def on_a_small_gpu(prepared: list[torch.Tensor]) -> list:
        sizes.append(len(prepared))
        if len(prepared) > room:
            raise torch.OutOfMemoryError
        return annotate(prepared)

    teacher.annotate_batch = on_a_small_gpu
    work = LabelJob(teacher, find_images(photos), tmp_path, "sha", batch=2)
    if fits:
        assert work.run().done == 4 and sizes == ([2, 2] if room == 2 else [2, 1, 1] * 2)
    else:
        with pytest.raises(DeviceError, match="Lower --batch"):
            work.run()
        assert sizes == [2, 1]


WORKERS = """
import os, sys
from pathlib import Path
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

os.fork()
backbone, images, labels = sys.argv[1:]
teacher = Teacher(PixelBackbone.load(backbone), TeacherSettings(size=96, stride=300))
summary = LabelJob(teacher, find_images(images), Path(labels), "sha", batch=2).run()
print(summary.done, summary.before + summary.elsewhere, len(summary.failed), flush=True)
"""


def test_two_processes_share_the_work(tiny_backbone: PixelBackbone, many: Path, tmp_path: Path) -> None:
    """One process that becomes two before either has done anything, so that imports are paid once."""
    tiny_backbone.save(tmp_path / "backbone")
    run = [sys.executable, "-c", WORKERS, str(tmp_path / "backbone"), str(many), str(tmp_path / "out")]
    said = subprocess.run(run, stdout=subprocess.PIPE, check=True, timeout=120, text=True).stdout
    counts = [tuple(map(int, line.split())) for line in said.splitlines()]
    assert len(counts) == 2 and sum(done for done, _, _ in counts) == 21, "labelled twice, or by nobody"
    assert all(done and done + others in (21, 22) and failed == 1 for done, others, failed in counts)
    alone = job(PixelBackbone.load(tmp_path / "backbone"), many, tmp_path / "alone")
    alone.run()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


LABEL = ["label", "--size", "96", "--stride", "300", "--batch", "2"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from trace_sdk.cli import main; main()", *map(str, arguments)]


def test_kill_9_loses_a_batch_and_no_byte(tiny_backbone: PixelBackbone, many: Path, tmp_path: Path) -> None:
    """Two real processes on one folder, one killed: what it held is taken over, what it wrote stays as it was."""
    tiny_backbone.save(tmp_path / "backbone")
    arguments = [*LABEL, many, "--backbone", tmp_path / "backbone"]
    out, expected = tmp_path / "out", tmp_path / "expected"
    slow = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(command(*arguments, "-o", out), env=slow, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.rglob("*.npz"))) < 3:
        assert time.monotonic() < deadline and victim.poll() is None
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("*.npz")}
    assert 3 <= len(kept) < 21 and not (out / "manifest.jsonl").exists()
    assert list((out / CLAIMS).glob("*.claim")), "killed between two shards; it should hold one"
    (out / ".p14.png.npz.k3j9x2aa.tmp").write_bytes(b"half")  # as a kill in the middle of a write leaves it

    survivor = CliRunner().invoke(main, [str(a) for a in (*arguments, "-o", out)])
    assert survivor.exit_code == 1, survivor.output  # p03b.png is no picture
    assert f"{21 - len(kept)} labelled" in survivor.output and "1 failed" in survivor.output
    assert re.search(r"label: 22/22 [\d.]+ images/s", survivor.output)
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())
    assert CliRunner().invoke(main, [str(a) for a in (*arguments, "-o", expected)]).exit_code == 1
    assert contents(out) == contents(expected)


def test_claims_exclude_each_other_and_outlive_nobody(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with Claims(tmp_path) as mine, Claims(tmp_path) as other:
        other._mark = json.dumps({"host": "another machine", "pid": 1})
        assert mine.take("a") and not mine.take("a") and not other.take("a")
        mine.release("a")
        assert other.take("a") and not mine.take("a")
        (tmp_path / "b.claim").write_text(json.dumps({"host": os.uname().nodename, "pid": gone.pid}))
        assert mine.take("b")
        (tmp_path / "c.claim").write_text("")
        assert not mine.take("c"), "it may be in the middle of its first write"
        (tmp_path / "d.claim").write_text(json.dumps({"host": "another machine", "pid": 1}))
        assert not mine.take("d")
        os.utime(tmp_path / "d.claim", (time.time() - 1000,) * 2)
        assert mine.take("d") and not other.take("d")
    assert [file.name for file in tmp_path.iterdir()] == ["c.claim"]


def test_a_claim_is_touched_while_its_holder_lives(tmp_path: Path) -> None:
    with Claims(tmp_path, stale_seconds=0.4) as mine, Claims(tmp_path, stale_seconds=0.4) as other:
        other._mark = json.dumps({"host": "another machine", "pid": 1})
        assert mine.take("a")
        time.sleep(1)
        assert not other.take("a")


def test_student_crops_lie_as_the_teacher_saw_them(tiny_backbone: PixelBackbone, tmp_path: Path) -> None:
    """A photo that EXIF turns by 90° was read as stored, so that labels lay across it."""
    turned = np.zeros((64, 96, 3), np.uint8)
    turned[:, 48:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(tmp_path / "phone.png", exif=exif)
    job(tiny_backbone, tmp_path, tmp_path / "labels").run()
    images, _, _ = LabelledImages(tmp_path, tmp_path / "labels", 0).batch(0, 8, 64)
    rows, columns = images.mean((1, 3)), images.mean((1, 2))
    assert rows.std(1).max() > 0.5 and columns.std(1).max() < 0.05


def test_ray_fills_the_same_folder(tiny_backbone: PixelBackbone, many: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'trace-sdk[ray]'")
    from trace_sdk.labelling.ray import RayLabeller, image_rows

    tiny_backbone.save(tmp_path / "backbone")
    few = [many / f"p0{number}.png" for number in range(3)] + [many / "p03b.png", many / "t.tar"]
    weights = {"backbone": str(tmp_path / "backbone"), "settings": SMALL}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        rows = ray.data.from_items(image_rows(few)).map_batches(
            RayLabeller, fn_constructor_kwargs=weights | {"labels": str(tmp_path / "ray")}, batch_size=1, concurrency=1
        )
        said = {row["name"]: (row["state"], row["reason"]) for row in rows.take_all()}
    finally:
        ray.shutdown()
    teacher = Teacher(PixelBackbone.load(tmp_path / "backbone"), SMALL)
    here = LabelJob(teacher, find_images(few), tmp_path / "here", PixelBackbone.sha256(tmp_path / "backbone"))
    failed = here.run().failed
    assert said == {name: ("failed", failed[name]) if name in failed else ("done", "") for name in here._names}
    made = contents(tmp_path / "ray")
    assert len(made) == 9 + 1 + 1 and made == {k: v for k, v in contents(tmp_path / "here").items() if k in made}
    assert set(contents(tmp_path / "here")) - set(made) == {"manifest.jsonl"}

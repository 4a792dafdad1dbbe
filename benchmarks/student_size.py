"""How small a student may be: which blocks feed the decoder, where the backbone stops, how wide the decoder is.

    python benchmarks/student_size.py IMAGES --labels LABELS --held-out SCENES

IMAGES and LABELS as for `trace-sdk distill`; SCENES are pictures with NAME.ids.png, as `recipes/trace-small/
compose_scenes.py --ids` writes them. Every choice gets a decoder of its own from the same seed, batches, steps and
frozen backbone, so one pass of the backbone serves them all. Edges are scored on SCENES as they are, unscaled. What a
choice costs is measured on its exported engine, in turns with the others, as CPU time of one thread. A run that was cut
goes on. Writes student-size.json and .md into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from on_device import RESULTS, keep, measured_on
from torch import Tensor, nn

from trace_sdk.atomic import write_text
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.evaluation.datasets import Dataset, Sample, open_dataset
from trace_sdk.evaluation.evaluate import evaluate
from trace_sdk.evaluation.methods import BASELINES, Method
from trace_sdk.export.onnx import export_onnx
from trace_sdk.student.calibrate import best_threshold
from trace_sdk.student.decoder import EdgeDecoder
from trace_sdk.student.labelled_images import LabelledImages
from trace_sdk.student.losses import dice_loss, graded_loss
from trace_sdk.student.model import Student
from trace_sdk.teacher.pseudo_labels import EDGE

WIDTH = 48  # of the decoder's layers on tokens
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Choice:
    """Blocks whose attention the decoder reads, and its width."""

    blocks: tuple[int, ...]
    width: int = WIDTH

    @property
    def name(self) -> str:
        """As the table says it."""
        if not self.blocks:
            return "no attention"
        first, last = self.blocks[0], self.blocks[-1]
        blocks = f"block {first}" if first == last else f"blocks {first}–{last}"
        return blocks if self.width == WIDTH else f"{blocks}, width {self.width}"


def choices(blocks: int) -> list[Choice]:
    """What is compared, for a backbone of so many blocks; the first is what `distill` makes."""
    quarter = max(1, blocks // 4)
    whole = tuple(range(blocks))
    parts = [whole[:quarter], whole[: 2 * quarter], whole[: 3 * quarter], whole[quarter : 3 * quarter + 1]]
    parts += [whole[2 * quarter :], whole[-1:], ()]
    wanted = [Choice(whole), *map(Choice, parts), Choice(whole, WIDTH // 2), Choice(whole, 2 * WIDTH)]
    return list(dict.fromkeys(wanted))


class SizedStudent(Student):
    """A student of one of the choices; without blocks the decoder's own look at the photo is all there is."""

    def __init__(self, backbone: PixelBackbone, choice: Choice) -> None:
        blocks = choice.blocks or (0,)
        channels = 2 * len(blocks) * (backbone.total_heads // backbone.self_attention_blocks)
        super().__init__(backbone, EdgeDecoder(channels, choice.width), blocks=blocks)
        self.choice = choice

    def logits(self, images: Tensor, *, share_softmax: bool = False) -> Tensor:
        if self.choice.blocks:
            return super().logits(images, share_softmax=share_softmax)
        nothing = nn.functional.avg_pool2d(images[:, :1], self.backbone.token_side).mul(0)
        logits: Tensor = self.decoder([nothing.expand(-1, self.decoder.standardise.num_features, -1, -1)], images)
        return logits

    def used(self) -> list[nn.Parameter]:
        """The parameters that an answer needs: of the decoder, and of the backbone up to the last block read."""
        last = max(self.choice.blocks, default=-1)
        named = self.backbone.denoiser.named_parameters() if self.choice.blocks else ()
        numbers = ((value, re.search(r"blocks\.(\d+)\.", name)) for name, value in named)
        return [*self.decoder.parameters(), *(value for value, found in numbers if not found or int(found[1]) <= last)]


def chosen(features: list[Tensor], choice: Choice) -> list[Tensor]:
    """Of the features of all blocks, those of the choice; zeros for none."""
    return [features[block] for block in choice.blocks] or [torch.zeros_like(features[0])]


@dataclass(frozen=True)
class Read:
    """Crops, their labels and graded edges, and the features of all blocks."""

    images: Tensor
    labels: Tensor
    graded: Tensor
    features: list[Tensor]


@torch.no_grad()
def read(student: Student, images: LabelledImages, numbers: range, count: int, size: int) -> list[Read]:
    """Batches of `count` crops, one a number."""
    batches = []
    for number in numbers:
        pixels, labels, graded = images.batch(number, count, size)
        batches.append(Read(pixels, labels, graded, student.features(student.encode(pixels))[0]))
    return batches


def train(student: SizedStudent, batches: list[Read], steps: int) -> None:
    """The decoder alone, by `distill`'s loss and schedule."""
    optimizer = torch.optim.AdamW(student.decoder.parameters(), weight_decay=1e-2)
    student.decoder.train()
    for step in range(steps):
        batch = batches[step % len(batches)]
        logits = student.decoder(chosen(batch.features, student.choice), batch.images)
        loss = dice_loss(logits, batch.labels) + 4 * graded_loss(logits, batch.graded)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(student.decoder.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps)) * min(1.0, (step + 1) / 50)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    student.decoder.eval()


@torch.no_grad()
def label_score(student: SizedStudent, batches: list[Read]) -> float:
    """Best F-measure against the held-out images' snapped labels, as `distill --held-out` scores."""
    answers = [student.decoder(chosen(b.features, student.choice), b.images).sigmoid().flatten() for b in batches]
    return best_threshold(torch.cat(answers), torch.cat([(b.labels == EDGE).flatten() for b in batches]))[1]


class Decoded:
    """A choice's edges of scenes whose features were read once."""

    timed = False

    def __init__(self, student: SizedStudent, scenes: dict[str, tuple[Tensor, list[Tensor]]]) -> None:
        self.name, self._student, self._scenes = student.choice.name, student, scenes

    def fingerprint(self, dataset: Dataset, sample: Sample) -> str:
        return self.name

    @torch.no_grad()
    def edges(self, dataset: Dataset, sample: Sample) -> NDArray[np.float32]:
        images, features = self._scenes[sample.name]
        logits = self._student.decoder(chosen(features, self._student.choice), images)
        return logits[0].sigmoid().numpy()


@torch.no_grad()
def read_scenes(student: Student, dataset: Dataset) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Each scene as the student takes it, and its features; sides must be multiples of 8."""
    scenes = {}
    for sample in dataset:
        images = torch.from_numpy(sample.rgb.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        scenes[sample.name] = images, student.features(student.encode(images))[0]
    return scenes


def scores(method: Method, dataset: Dataset, thresholds: int) -> dict[str, float]:
    """ODS and AP on the scenes."""
    found = evaluate(dataset, method, thresholds=thresholds)
    return {"ods": found.ods, "ap": found.ap}


def engines(backbone: PixelBackbone, folder: Path) -> dict[str, Path]:
    """Each choice as an engine file, made where it is not there yet; what it learnt does not change its cost."""
    files = {}
    for number, choice in enumerate(choices(backbone.self_attention_blocks)):
        files[choice.name] = file = folder / f"{number}.onnx"
        if not file.is_file():
            export_onnx(SizedStudent(backbone, choice), file, name=str(number))
    return files


def cpu_milliseconds(files: dict[str, Path], size: int, rounds: int) -> dict[str, float]:
    """Median CPU time of one answer at `size`² px, one thread, the engines in turns."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    times: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds + 1):  # the first does not count
        for name, session in sessions.items():
            start = time.process_time()
            session.run(None, {"image": image})
            times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def to_markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = [
        f"Decoders of {result['steps']} steps on {result['images']} labelled images, mean of {len(result['seeds'])} "
        f"seeds (± half their range); {result['scenes']} held-out scenes at {result['thresholds']} thresholds; CPU "
        f"time at {result['size']}² px of one thread, {result['hardware']['cpu']}.",
        "",
        "| decoder reads | label score | scenes, ODS | AP | parameters, M | engine, MB | CPU ms | × |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    slowest = result["rows"][0]["cpu_ms"]
    for row in result["rows"]:
        cells = [f"{row[key]['mean']:.3f} ± {row[key]['spread']:.3f}" for key in ("label_score", "ods", "ap")]
        cells += [f"{row['parameters'] / 1e6:.2f}", f"{row['engine_bytes'] / 1e6:.1f}", f"{row['cpu_ms']:.0f}"]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {slowest / row['cpu_ms']:.2f} |")
    lines += [
        f"| {name} | | {found['ods']:.3f} | {found['ap']:.3f} | | | | |" for name, found in result["baselines"].items()
    ]
    return "\n".join(lines) + "\n"


class Known:
    """Scores by seed and choice, kept in a file, so that a run that was cut goes on."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._file, self._settings = file, settings
        kept = json.loads(file.read_bytes()) if file.is_file() else {"settings": settings, "scores": {}}
        if kept["settings"] != settings:
            raise SystemExit(f"error: {file} is of a run with other settings. Remove it, or give another --work.")
        self._scores: dict[str, dict[str, float]] = kept["scores"]

    def __contains__(self, key: tuple[int, str]) -> bool:
        return self._key(*key) in self._scores

    def __getitem__(self, key: tuple[int, str]) -> dict[str, float]:
        return self._scores[self._key(*key)]

    def add(self, seed: int, name: str, found: dict[str, float]) -> None:
        """Keep one more."""
        self._scores[self._key(seed, name)] = found
        write_text(self._file, json.dumps({"settings": self._settings, "scores": self._scores}, indent=2) + "\n")

    @staticmethod
    def _key(seed: int, name: str) -> str:
        return f"{name}, seed {seed}"


def summary(values: list[float]) -> dict[str, Any]:
    """Mean and half the range over seeds."""
    return {"mean": statistics.fmean(values), "spread": (max(values) - min(values)) / 2, "seeds": values}


def main() -> int:
    """Train, score, export, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+")
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="scenes with NAME.ids.png")
    parser.add_argument("--backbone", type=Path, default=ROOT / "recipes/trace-small/weights/backbone")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batches", type=int, default=60, help="different ones, taken in turn")
    parser.add_argument("--crops", type=int, default=2, help="a step")
    parser.add_argument("--crop", type=int, default=192, help="side in px")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--thresholds", type=int, default=33)
    parser.add_argument("--size", type=int, default=448, help="side in px at which engines are timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/student-size"), help="what a cut run goes on from")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = PixelBackbone.load(options.backbone)
    learnt, held_out = LabelledImages(options.images, options.labels, 0).split(0.15)
    dataset = open_dataset(options.held_out)
    settings = {name: vars(options)[name] for name in ("steps", "batches", "crops", "crop", "thresholds")}
    settings |= {"images": len(learnt.pairs), "scenes": len(dataset)}
    known = Known(options.work / "scores.json", settings)
    wanted = choices(backbone.self_attention_blocks)
    whole, judged, scenes = Student(backbone), None, {}
    for seed in range(options.seeds):
        missing = [choice for choice in wanted if (seed, choice.name) not in known]
        if missing:
            judged = judged or read(whole, held_out, range(1 << 30, (1 << 30) + 12), 2, options.crop)
            scenes = scenes or read_scenes(whole, dataset)
            numbers = range(seed * options.batches, (seed + 1) * options.batches)
            batches = read(whole, learnt, numbers, options.crops, options.crop)
        for choice in missing:
            torch.manual_seed(seed)
            student = SizedStudent(backbone, choice)
            train(student, batches, options.steps)
            found = scores(Decoded(student, scenes), dataset, options.thresholds)
            known.add(seed, choice.name, {"label_score": label_score(student, judged), **found})
            print(seed, choice.name, known[seed, choice.name], flush=True)
    files = engines(backbone, options.work)
    times = cpu_milliseconds(files, options.size, options.rounds)
    result = {
        "command": " ".join(["benchmarks/student_size.py", *sys.argv[1:]]),
        **measured_on("cpu", ["torch", "onnxruntime", "diffusers"]),
        **settings,
        "size": options.size,
        "seeds": list(range(options.seeds)),
        "rows": [
            {
                "name": choice.name,
                "blocks": choice.blocks,
                "width": choice.width,
                **{
                    key: summary([known[seed, choice.name][key] for seed in range(options.seeds)])
                    for key in ("label_score", "ods", "ap")
                },
                "parameters": sum(value.numel() for value in SizedStudent(backbone, choice).used()),
                "engine_bytes": files[choice.name].stat().st_size,
                "cpu_ms": times[choice.name],
            }
            for choice in wanted
        ],
        "baselines": {method.name: scores(method, dataset, options.thresholds) for method in BASELINES},
    }
    keep(result, to_markdown(result), options.out, "student-size")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Video: edges of every frame, and instances that keep their number from frame to frame."""

from __future__ import annotations

import colorsys
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from trace_sdk.atomic import write_whole
from trace_sdk.detector import EdgeDetector
from trace_sdk.edge_map import EdgeMap
from trace_sdk.errors import ImageError, MissingExtraError

if TYPE_CHECKING:
    from trace_sdk.instances.result import Instances

MIN_OVERLAP = 0.3  # IoU of boxes from which two frames may show one instance
FORGET = 1.0  # seconds after which an instance that is not seen loses its number
_FILL = 0.45  # opacity of the colours over the picture
_FALLBACK_RATE = Fraction(25)


@dataclass(frozen=True)
class VideoResult:
    """frames: done. rate: of the video, frames/s. seconds: that it took. numbers: of instances followed."""

    frames: int
    rate: float
    seconds: float
    numbers: int

    @property
    def speed(self) -> float:
        """Frames done in a second, decoding and writing among them."""
        return self.frames / max(self.seconds, 1e-9)


def detect_video(
    detector: EdgeDetector, video: Path, stem: Path, *, overlay: bool, on_frame: Callable[[int, float], None]
) -> VideoResult:
    """Edges and tracked instances of a video.

    Writes STEM.edges.mp4 (grey, white is edge), with `overlay` also STEM.overlay.mp4 (instances in the colour of their
    number, edges over them), and STEM.frames.jsonl: a line for each frame, {"frame", "time" in seconds, "instances":
    [{"id", "bbox" as x, y, width, height, "area", "score", "segmentation" as COCO RLE}]}. An instance keeps its id
    while the tracker (ByteTrack, Zhang et al., ECCV 2022, on boxes) follows it; null in the first frame that shows it.

    Args:
        on_frame: called with the number of frames done and the frames a second so far.

    Raises:
        ImageError: the video cannot be read, or has no frame.
        MissingExtraError: the extra `video` is not installed.
        OutputError: a file cannot be written.
    """
    with _needs_extra():
        import av
        from trackers import ByteTrackTracker

        import trace_sdk.instances.result  # noqa: F401
    start = time.perf_counter()
    done = 0
    numbers: set[int] = set()
    with _opened(av, video) as (container, stream):
        rate = stream.average_rate or _FALLBACK_RATE
        tracker = ByteTrackTracker(
            frame_rate=float(rate),
            lost_track_buffer=round(FORGET * 30),  # counted for 30 frames/s
            minimum_consecutive_frames=1,
            minimum_iou_threshold=MIN_OVERLAP,
        )
        names = [f"{stem}.edges.mp4", *([f"{stem}.overlay.mp4"] if overlay else [])]
        with write_whole(f"{stem}.frames.jsonl") as lines, _writers(av, names, rate) as writers:
            for edges in detector.stream(_frames(av, container, stream, video)):
                found = edges.instances()
                ids = follow(tracker, found)
                numbers.update(number for number in ids if number is not None)
                line = {"frame": done, "time": round(done / float(rate), 4), "instances": _described(found, ids)}
                lines.write(json.dumps(line).encode() + b"\n")
                grey = np.rint(edges.probability * 255).astype(np.uint8)
                pictures = [np.repeat(grey[..., None], 3, axis=2), *([_drawn(edges, found, ids)] if overlay else [])]
                for write, picture in zip(writers, pictures, strict=True):
                    write(picture)
                done += 1
                on_frame(done, done / (time.perf_counter() - start))
            if not done:
                raise ImageError(f"{video} has no frame. Give a video that plays.")
    return VideoResult(done, float(rate), time.perf_counter() - start, len(numbers))


def frame_count(video: Path) -> int:
    """Frames as the file says, or as its length and rate say; 0 if it tells neither. Raises as `detect_video`."""
    with _needs_extra():
        import av
    with _opened(av, video) as (container, stream):
        if stream.frames:
            return int(stream.frames)
        return round((container.duration or 0) / av.time_base * float(stream.average_rate or 0))


def follow(tracker: Any, found: Instances) -> list[int | None]:
    """The number of each instance of the next frame; None where the tracker follows none."""
    from supervision import Detections

    seen = Detections(
        xyxy=found.boxes.astype(np.float64),
        confidence=np.ones(len(found)),  # each is surely there; its score tells how clean its outline is
        class_id=np.zeros(len(found), np.int64),
        data={"place": np.arange(len(found))},
    )
    told = tracker.update(seen)
    ids: list[int | None] = [None] * len(found)
    if told.tracker_id is not None:
        for place, number in zip(told.data["place"], told.tracker_id, strict=True):
            ids[int(place)] = int(number) if number >= 0 else None
    return ids


def _described(found: Instances, ids: list[int | None]) -> list[dict[str, Any]]:
    return [
        {
            "id": number,
            "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
            "area": int(area),
            "score": round(float(score), 6),
            "segmentation": rle,
        }
        for number, box, area, score, rle in zip(ids, found.boxes, found.areas, found.scores, found.rle, strict=True)
    ]


def _drawn(edges: EdgeMap, found: Instances, ids: list[int | None]) -> NDArray[np.uint8]:
    """Each instance in the colour of its number, those without one bare, edges over them."""
    opacity = np.array([0.0, *(0.0 if number is None else _FILL for number in ids)])[found.labels][..., None]
    hues = [colorsys.hsv_to_rgb((number or 0) * 0.618034 % 1, 0.85, 1.0) for number in ids]
    painted = np.array([(0.0, 0.0, 0.0), *hues])[found.labels] * 255
    mixed = np.rint(edges.rgb + opacity * (painted - edges.rgb)).astype(np.uint8)
    return np.asarray(edges.overlay(PIL.Image.fromarray(mixed)))


@contextmanager
def _needs_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"Video needs {error.name}, which is not installed. Run: pip install 'trace-sdk[video]'"
        ) from error


@contextmanager
def _opened(av: Any, video: Path) -> Iterator[tuple[Any, Any]]:
    try:
        container = av.open(str(video))
    except (OSError, ValueError) as error:
        raise ImageError(f"{video} cannot be read as a video ({error}). Give a whole file.") from error
    with container:
        if not container.streams.video:
            raise ImageError(f"{video} has no picture track. Give a video.")
        yield container, container.streams.video[0]


def _frames(av: Any, container: Any, stream: Any, video: Path) -> Iterator[NDArray[np.uint8]]:
    try:
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")
    except (OSError, ValueError) as error:
        raise ImageError(f"{video} is damaged ({error}). Give a whole file.") from error


@contextmanager
def _writers(av: Any, names: list[str], rate: Fraction) -> Iterator[list[Callable[[NDArray[np.uint8]], None]]]:
    """Functions that append a picture, uint8 [H, W, 3], to each file; the files appear when the block ends well."""
    if not names:
        yield []
        return
    first, *others = names
    with write_whole(first) as file, _writer(av, file, rate) as write, _writers(av, others, rate) as more:
        yield [write, *more]


@contextmanager
def _writer(av: Any, file: IO[bytes], rate: Fraction) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.pix_fmt = "yuv420p"

        def write(picture: NDArray[np.uint8]) -> None:
            # Colour is stored for squares of four pixels, so both sides are even.
            height, width = picture.shape[:2]
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = even.shape[:2]
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")):
                container.mux(packet)

        yield write
        for packet in stream.encode():
            container.mux(packet)

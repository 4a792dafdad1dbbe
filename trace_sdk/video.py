"""Video, from a file or a camera: edges of every frame, and instances that keep their number from frame to frame."""

from __future__ import annotations

import json
import time
from collections import deque
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
from trace_sdk.errors import DeviceError, ImageError, needs_extra

if TYPE_CHECKING:
    from trace_sdk.instances.result import Instances

MIN_OVERLAP = 0.3  # IoU of boxes from which two frames may show one instance
FORGET = 1.0  # seconds after which an instance that is not seen loses its number
_FILL = 0.45  # opacity of the colours over the picture
_FALLBACK_RATE = Fraction(25)


@dataclass(frozen=True, eq=False)
class Clip:
    """Moving pictures, open for reading.

    Attributes:
        name: for messages.
        rate: frames a second, as the file or camera says.
        frames: seconds from the start and uint8 [H, W, 3] RGB of each, upright.
        clock: seconds, the unit of these times.
        count: frames as the file says, or as its length and rate say; 0 if unknown.
        live: from a camera, whose frames come when they are there, and which ends when it is interrupted.
    """

    name: str
    rate: Fraction
    frames: Iterator[tuple[float, NDArray[np.uint8]]]
    clock: Fraction = Fraction(1, 1000)
    count: int = 0
    live: bool = False


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
    detector: EdgeDetector, clip: Clip, stem: Path, *, overlay: bool, on_frame: Callable[[int, float], None]
) -> VideoResult:
    """Edges and tracked instances of a video.

    Writes STEM.edges.mp4 (grey, white is edge), with `overlay` also STEM.overlay.mp4 (instances in the colour of their
    number, edges over them), and STEM.frames.jsonl: a line for each frame, {"frame", "time" in seconds, "instances":
    [{"id", "bbox" as x, y, width, height, "area", "score", "segmentation" as COCO RLE}]}. An instance keeps its id
    while the tracker (ByteTrack, Zhang et al., ECCV 2022, on boxes) follows it; null in the first frame that shows it.
    The files of a live clip are kept when it is interrupted.

    Args:
        on_frame: called with the number of frames done and the frames a second so far.

    Raises:
        ImageError: the video is damaged, or has no frame.
        DeviceError: the camera stopped before its first frame.
        MissingExtraError: the extra `video` is not installed.
        OutputError: a file cannot be written.
    """
    with needs_extra("video", "Video needs"):
        import av
        from trackers import ByteTrackTracker

        import trace_sdk.instances.result  # noqa: F401
    start = time.perf_counter()
    done = 0
    numbers: set[int] = set()
    times: deque[float] = deque()

    def pictures() -> Iterator[NDArray[np.uint8]]:
        for seconds, rgb in clip.frames:
            times.append(seconds)
            yield rgb

    tracker = ByteTrackTracker(
        frame_rate=float(clip.rate),
        lost_track_buffer=round(FORGET * 30),  # counted for 30 frames/s
        minimum_consecutive_frames=1,
        minimum_iou_threshold=MIN_OVERLAP,
    )
    names = [f"{stem}.edges.mp4", *([f"{stem}.overlay.mp4"] if overlay else [])]
    with write_whole(f"{stem}.frames.jsonl") as lines, _writers(av, names, clip) as writers:
        try:
            for edges in detector.stream(pictures()):
                found = edges.instances()
                ids = follow(tracker, found)
                numbers.update(number for number in ids if number is not None)
                seconds = times.popleft()
                line = {"frame": done, "time": round(seconds, 4), "instances": _described(found, ids)}
                grey = np.rint(edges.probability * 255).astype(np.uint8)
                images = [np.repeat(grey[..., None], 3, axis=2), *([_drawn(edges, found, ids)] if overlay else [])]
                lines.write(json.dumps(line).encode() + b"\n")
                for write, picture in zip(writers, images, strict=True):
                    write(picture, seconds)
                done += 1
                on_frame(done, done / (time.perf_counter() - start))
        except KeyboardInterrupt:
            # This is how a camera ends; what is there is whole.
            if not (clip.live and done):
                raise
        if not done:
            raise ImageError(f"{clip.name} has no frame. Give a video that plays.")
    return VideoResult(done, float(clip.rate), time.perf_counter() - start, len(numbers))


@contextmanager
def open_video(video: Path) -> Iterator[Clip]:
    """A video file.

    Raises:
        ImageError: the file cannot be read as a video.
        MissingExtraError: the extra `video` is not installed.
    """
    with needs_extra("video", "Video needs"):
        import av
    try:
        container = av.open(str(video))
    except (OSError, ValueError) as error:
        raise ImageError(f"{video} cannot be read as a video ({error}). Give a whole file.") from error
    with container:
        if not container.streams.video:
            raise ImageError(f"{video} has no picture track. Give a video.")
        stream = container.streams.video[0]
        rate = stream.average_rate or _FALLBACK_RATE
        count = stream.frames or round((container.duration or 0) / av.time_base * float(stream.average_rate or 0))

        def frames() -> Iterator[tuple[float, NDArray[np.uint8]]]:
            start: float | None = None
            try:
                for number, frame in enumerate(container.decode(stream)):
                    # Phones keep no fixed rate, and store pictures as their sensor lies, with the turn beside them.
                    seconds = float(number / rate) if frame.time is None else frame.time
                    start = seconds if start is None else start
                    picture = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
                    turns = round(frame.rotation / 90)
                    yield seconds - start, np.rot90(picture, turns)
            except (OSError, ValueError) as error:
                raise ImageError(f"{video} is damaged ({error}). Give a whole file.") from error

        yield Clip(str(video), rate, frames(), stream.time_base or 1 / rate, count)


@contextmanager
def open_camera(number: int) -> Iterator[Clip]:
    """Camera `number` of this machine, from 0.

    Raises:
        DeviceError: there is none, or another program has it.
        MissingExtraError: the extra `video` is not installed.
    """
    with needs_extra("video", "Video needs"):
        import cv2
    camera = cv2.VideoCapture(number)
    try:
        if not camera.isOpened():
            raise DeviceError(
                f"Camera {number} cannot be opened. See that it is connected, that no other program has it and that "
                "you may use it; another one has another number."
            )
        told = camera.get(cv2.CAP_PROP_FPS)
        rate = Fraction(round(told)) if 1 <= told <= 1000 else _FALLBACK_RATE

        def frames() -> Iterator[tuple[float, NDArray[np.uint8]]]:
            start: float | None = None
            while True:
                there, picture = camera.read()
                if not there:
                    return  # unplugged
                now = time.perf_counter()
                start = now if start is None else start
                yield now - start, np.ascontiguousarray(picture[..., ::-1])

        yield Clip(f"camera {number}", rate, frames(), live=True)
    finally:
        camera.release()


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
    from trace_sdk.instances.painting import colour

    opacity = np.array([0.0, *(0.0 if number is None else _FILL for number in ids)])[found.labels][..., None]
    hues = [colour(number or 0) for number in ids]
    painted = np.array([(0.0, 0.0, 0.0), *hues])[found.labels] * 255
    mixed = np.rint(edges.rgb + opacity * (painted - edges.rgb)).astype(np.uint8)
    return np.asarray(edges.overlay(PIL.Image.fromarray(mixed)))


Write = Callable[[NDArray[np.uint8], float], None]


@contextmanager
def _writers(av: Any, names: list[str], clip: Clip) -> Iterator[list[Write]]:
    """Functions that append a picture, uint8 [H, W, 3], of a second to each file; these appear when the block ends."""
    if not names:
        yield []
        return
    first, *others = names
    with write_whole(first) as file, _writer(av, file, clip) as write, _writers(av, others, clip) as more:
        yield [write, *more]


@contextmanager
def _writer(av: Any, file: IO[bytes], clip: Clip) -> Iterator[Write]:
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=clip.rate)
        stream.pix_fmt = "yuv420p"
        # Each frame keeps its time; of a camera however fast the engine is.
        stream.codec_context.time_base = clip.clock
        last = -1

        def write(picture: NDArray[np.uint8], seconds: float) -> None:
            nonlocal last
            # Colour is stored for squares of four pixels, so both sides are even.
            height, width = picture.shape[:2]
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not stream.codec_context.is_open:
                stream.height, stream.width = even.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            last = max(last + 1, round(seconds / clip.clock))
            frame.pts, frame.time_base = last, clip.clock
            for packet in stream.encode(frame):
                container.mux(packet)

        yield write
        for packet in stream.encode():
            container.mux(packet)

"""Model repositories in the real Triton Inference Server that nvidia-pytriton ships, asked over HTTP.

It has no onnxruntime backend; `triton_engine_stand_in.py` is in its place.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from trace_sdk import EdgeDetector
from trace_sdk.serving.triton import write_repository

HOME = Path(os.environ.get("TRACE_TRITON", "no-such-folder"))
PACKAGES = HOME / "lib/python{}.{}/site-packages".format(*sys.version_info[:2])
SERVER = PACKAGES / "pytriton/tritonserver"
BUCKETS = [64, 96, 128]
DTYPES = {"FP32": np.float32, "UINT8": np.uint8}

pytestmark = pytest.mark.skipif(
    not SERVER.is_dir(),
    reason="needs a server: python -m venv V; V/bin/pip install -e . 'numpy<2' 'tritonclient[http]'; "
    "V/bin/pip install --no-deps nvidia-pytriton; TRACE_TRITON=V",
)


class Server:
    """A server on free ports of this machine; `wait` until it is ready, `stop` it."""

    def __init__(self, repository: Path, backends: Path, log: Path) -> None:
        ports = {kind: free_port() for kind in ("http", "grpc", "metrics")}
        self.address = f"127.0.0.1:{ports['http']}"
        command = [
            SERVER / "bin/tritonserver",
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--exit-on-error=true",
            "--allow-gpu-metrics=false",
            *(f"--{kind}-address=127.0.0.1" for kind in ports),
            *(f"--{kind}-port={port}" for kind, port in ports.items()),
        ]
        # The server's Python takes its packages from where the first python on PATH does, and not from PYTHONPATH.
        environment = os.environ | {
            "PATH": f"{HOME / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{PACKAGES / 'nvidia_pytriton.libs'}",
        }
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def wait(self) -> None:
        for _ in range(600):
            assert self._process.poll() is None, self._log.read_text()
            try:
                urllib.request.urlopen(f"http://{self.address}/v2/health/ready").close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"not ready: {self._log.read_text()}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=40)
        finally:
            self._process.kill()

    def send(self, model: str, file: bytes) -> NDArray[Any]:
        """What the model answers to a body that is its one input."""
        return self._ask(model, file, 0)

    def send_arrays(self, model: str, name: str, datatype: str, shape: list[int], data: bytes) -> NDArray[Any]:
        tensor = {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": len(data)}}
        header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        return self._ask(model, header + data, len(header))

    def _ask(self, model: str, body: bytes, header: int) -> NDArray[Any]:
        request = urllib.request.Request(f"http://{self.address}/v2/models/{model}/infer", body)
        request.add_header("Inference-Header-Content-Length", str(header))
        with urllib.request.urlopen(request, timeout=60) as response:
            told = response.read()
            header = int(response.headers["Inference-Header-Content-Length"])
        output = json.loads(told[:header])["outputs"][0]
        return np.frombuffer(told[header:], DTYPES[output["datatype"]]).reshape(output["shape"])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def engines(make_engine: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("engines")
    paths = {name: folder / f"{name}.onnx" for name in ("scales", "padded")}
    for name, path in paths.items():
        path.write_bytes(make_engine(name=name))
    return paths


@pytest.fixture(scope="module")
def repository(engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_repository(engines["scales"], folder, output="uint8", encoded=True)
    write_repository(engines["padded"], folder, buckets=BUCKETS, encoded=True)
    write_repository("trace-nano", folder, encoded=True)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    backends = tmp_path_factory.mktemp("server") / "backends"
    shutil.copytree(SERVER / "backends/python", backends / "python")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(SERVER / f"python_backend_stubs/{python}/triton_python_backend_stub", backends / "python")
    (backends / "onnxruntime").mkdir()
    shutil.copy(Path(__file__).with_name("triton_engine_stand_in.py"), backends / "onnxruntime/model.py")
    server = Server(repository, backends, backends.with_name("log"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def detectors(engines: dict[str, Path]) -> dict[str, EdgeDetector]:
    return {"scales": EdgeDetector(engines["scales"]), "padded": EdgeDetector(engines["padded"], buckets=BUCKETS)}


def encoded(pixels: NDArray[Any], form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rough = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return np.asarray(PIL.Image.fromarray(rough).resize((width, height)))


def turned() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(90, 140), "JPEG", exif=exif)


def deep() -> bytes:
    return encoded(picture(90, 140)[..., 0].astype(np.uint16) * 257, "PNG")


def palette() -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(picture(200, 150)).quantize(9).save(file, "PNG", transparency=0)
    return file.getvalue()


def bomb() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("make", [turned, deep, palette])
@pytest.mark.parametrize("model", ["scales", "padded"])
def test_a_file_gets_the_edges_of_edge_detector(
    server: Server, detectors: dict[str, EdgeDetector], model: str, make: Callable[[], bytes]
) -> None:
    file = make()
    answer = server.send(f"{model}-photo", file)
    expected = detectors[model].run(file).probability
    assert answer.shape == (1, *expected.shape) and expected.max() > 0.1
    if model == "scales":
        assert np.abs(answer[0] / 255 - expected).max() <= 0.5 / 255 + 1e-3, "but for rounding to 8 bits"
    else:
        np.testing.assert_array_equal(answer[0], expected)


def test_an_engine_of_the_package_answers_a_photo(server: Server) -> None:
    photo = (Path(__file__).parents[1] / "examples/photos/cars.jpg").read_bytes()
    expected = EdgeDetector("trace-nano", device="cpu").run(photo).probability
    np.testing.assert_allclose(server.send("trace-nano-photo", photo)[0], expected, atol=1e-3)


def test_pixels_may_be_sent_instead(server: Server, detectors: dict[str, EdgeDetector]) -> None:
    photo = picture(70, 101)
    answer = server.send_arrays("scales", "image", "UINT8", [1, 70, 101, 3], photo.tobytes())
    expected = detectors["scales"].run(photo).probability
    assert np.abs(answer[0] / 255 - expected).max() <= 0.5 / 255 + 1e-3


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"hello", "is text, not a picture. Readable formats: JPEG"),
        (b"", "is empty"),
        (encoded(picture(90, 140), "JPEG")[:900], "is damaged or incomplete"),
        (bomb(), "more than 80,000,000 pixels"),
    ],
)
def test_what_is_no_photo_is_refused_and_others_are_not(server: Server, file: bytes, message: str) -> None:
    good = encoded(picture(64, 64), "PNG")
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(server.send, "scales-photo", sent) for sent in [good, file, good, good]]
    with pytest.raises(urllib.error.HTTPError) as refused:
        answers.pop(1).result()
    assert refused.value.code == 400 and message in json.loads(refused.value.read())["error"]
    assert all(answer.result().shape == (1, 64, 64) for answer in answers)


def photo_batch(*files: bytes) -> tuple[str, str, list[int], bytes]:
    return "photo", "BYTES", [len(files), 1], b"".join(struct.pack("<I", len(file)) + file for file in files)


@pytest.mark.parametrize("model", ["scales", "padded"])
def test_photos_of_one_size_may_share_a_request(server: Server, model: str) -> None:
    files = [encoded(picture(80, 120, seed), "PNG") for seed in range(3)]
    together = server.send_arrays(f"{model}-photo", *photo_batch(*files))
    alone = [server.send(f"{model}-photo", file)[0] for file in files]
    np.testing.assert_array_equal(together, np.stack(alone))
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.send_arrays(f"{model}-photo", *photo_batch(files[0], encoded(picture(80, 121), "PNG")))
    assert "several sizes: 120x80, 121x80" in refused.value.read().decode()


def test_photos_of_several_sizes_go_through_the_engine_together(server: Server, repository: Path) -> None:
    files = [encoded(picture(90 + at, 128), "PNG") for at in range(6)]  # all are padded to 96x128
    batches = repository / "padded/1/batches"
    for _ in range(20):
        batches.write_text("")
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda file: server.send("padded-photo", file), files))
        assert [answer.shape for answer in answers] == [(1, 90 + at, 128) for at in range(6)]
        if max(map(int, batches.read_text().split())) > 1:
            return
    raise AssertionError("requests that came together were never batched")


@pytest.mark.parametrize("model", ["scales", "scales-photo"])
def test_the_example_client(server: Server, detectors: dict[str, EdgeDetector], model: str, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(encoded(picture(70, 101), "PNG"))
    client = Path(__file__).parents[1] / "examples/triton/client.py"
    command = [HOME / "bin/python", client, server.address, model, "photo.png", "edges.png"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    seen = np.asarray(PIL.Image.open(tmp_path / "edges.png")) / 255
    expected = detectors["scales"].run(tmp_path / "photo.png").probability
    assert np.abs(seen - expected).max() <= 0.5 / 255 + 1e-3

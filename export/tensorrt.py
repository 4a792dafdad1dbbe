"""An ONNX engine as a TensorRT or TensorRT-RTX plan. TensorRT-RTX builds without a GPU, TensorRT for the GPU it has."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any

from trace_sdk.atomic import remove_unfinished, write_bytes
from trace_sdk.engines.cuda import gpu_name
from trace_sdk.engines.manifest import ANY_SIZE, Manifest, check_one_file, verify_seal
from trace_sdk.engines.plan import ANY_GPU, Built, pack, unpack
from trace_sdk.engines.tensorrt import PACKAGES, check_built, load_package
from trace_sdk.errors import ArgumentError, EngineError
from trace_sdk.export.any_size import need_onnx
from trace_sdk.machine import cache_folder
from trace_sdk.network_input import padded_length

if TYPE_CHECKING:
    import onnx

MAX_BATCH = 8
ABANDONED = 3600  # seconds after which no process can still be writing a file


def build(
    engine: bytes,
    source: str,
    runtime: str,
    *,
    max_batch: int = MAX_BATCH,
    device: int = 0,
    note: Callable[[str], None] = lambda text: None,
) -> bytes:
    """An engine file with a plan for every size of the engine and batches up to `max_batch`.

    Args:
        engine: bytes of an ONNX engine file. source: its name for messages.
        runtime: "tensorrt-rtx", or "tensorrt", which needs the GPU that the plan is for.
        device: number of that GPU.
        note: told what is being done, for progress.

    Raises:
        ArgumentError: an unknown runtime, or `max_batch` below 1.
        EngineError: not whole, one that scales inside its graph, or one that TensorRT refuses; says why.
        MissingExtraError: the runtime or the onnx package is not installed.
    """
    if runtime not in PACKAGES:
        raise ArgumentError(f"runtime={runtime!r} is not one of {', '.join(PACKAGES)}.")
    if max_batch < 1:
        raise ArgumentError(f"max_batch={max_batch} must be at least 1.")
    need_onnx(f"Building for {runtime}")
    import onnx

    sha256 = verify_seal(engine, source)
    model = onnx.load_from_string(engine)
    manifest = Manifest.from_metadata({entry.key: entry.value for entry in model.metadata_props}, source)
    if manifest.input == ANY_SIZE:
        raise EngineError(
            f"{source}: scales inside its graph with integers that TensorRT does not have. Give the engine that it "
            "was made of; EdgeDetector scales."
        )
    check_one_file(manifest, source, runtime)
    package = load_package(runtime)
    gpu = gpu_name(device) if runtime == "tensorrt" else ANY_GPU
    best = padded_length(manifest.default_size, manifest.multiple_of, manifest.min_size)
    profile = {
        name: [batch, side, side, 3]
        for name, batch, side in (
            ("min", 1, manifest.min_size), ("opt", 1, best), ("max", max_batch, manifest.max_size),
        )
    }  # fmt: skip
    note(f"building for {runtime} {package.__version__}")
    plan = _plan(package, _without_bytes_inside(model), profile, source)
    return pack(manifest, Built(runtime, package.__version__, gpu, manifest.precision, profile, sha256), plan)


def build_once(engine: bytes, source: str, runtime: str, *, device: int = 0) -> tuple[bytes, str]:
    """The engine file from the cache, or built into it; and a word on which.

    The cache is `trace_sdk.machine.cache_folder`. A file in it that is damaged, or for another version or GPU, is
    built again.

    Raises: as `build`, and OutputError if the cache cannot be written.
    """
    sha256 = verify_seal(engine, source)
    file = cache_folder() / f"{sha256[:16]}-{runtime}-{device}.engine"
    why = "built"
    if file.exists():
        try:
            data = file.read_bytes()
            _, built, _, _ = unpack(data, str(file))
            gpu = gpu_name(device) if built.gpu != ANY_GPU else ""
            check_built(built, load_package(runtime).__version__, gpu, str(file))
            return data, "from the cache"
        except (OSError, EngineError) as error:
            why = f"built again ({error})"
    data = build(engine, source, runtime, device=device)
    remove_unfinished([file], ABANDONED)
    write_bytes(file, data)
    return data, why


def _without_bytes_inside(model: onnx.ModelProto) -> bytes:
    """TensorRT takes uint8 as an input and then only casts it: the cast moves to the very front."""
    from onnx import TensorProto, helper

    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "image":
                node.input[place] = "image/float"
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["image/float"], to=TensorProto.FLOAT))
    del model.graph.value_info[:]  # said uint8 where float is now
    return bytes(model.SerializeToString())


def _plan(package: Any, model: bytes, profile: dict[str, list[int]], source: str) -> bytes:
    logger = package.Logger(package.Logger.ERROR)
    builder = package.Builder(logger)
    flags = package.NetworkDefinitionCreationFlag
    # TensorRT 10 has to be told to keep the precision of the file; later ones and TensorRT-RTX always do.
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0)
    parser = package.OnnxParser(network, logger)
    with redirect_stderr(io.StringIO()):
        parsed = parser.parse(model)
    if not parsed:
        reasons = "; ".join(parser.get_error(i).desc().splitlines()[-1] for i in range(parser.num_errors))
        raise EngineError(f"{source}: {package.__name__} {package.__version__} cannot parse its graph ({reasons}).")
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    shapes.set_shape("image", *(tuple(profile[name]) for name in ("min", "opt", "max")))
    config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(
            f"{source}: {package.__name__} {package.__version__} could not build it; its own words are on stderr."
        )
    return bytes(plan)

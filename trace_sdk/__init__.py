"""trace-sdk: instance edges without annotations, from the self-attention of diffusion models.

    from trace_sdk import detect
    detect("street.jpg").save("edges.png")

Importing this package loads neither torch nor onnxruntime; they come with the first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trace_sdk.errors import TraceError

if TYPE_CHECKING:
    from trace_sdk.detector import EdgeDetector, detect
    from trace_sdk.edge_map import EdgeMap
    from trace_sdk.engines.mock import MockEngine

__version__ = "0.1.0"
__all__ = ["EdgeDetector", "EdgeMap", "MockEngine", "TraceError", "__version__", "detect"]

_HOME = {
    "EdgeDetector": "trace_sdk.detector",
    "EdgeMap": "trace_sdk.edge_map",
    "MockEngine": "trace_sdk.engines.mock",
    "detect": "trace_sdk.detector",
}


def __getattr__(name: str) -> Any:
    # PEP 562: keeps `import trace_sdk` under 60 ms.
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'trace_sdk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

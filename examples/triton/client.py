"""Ask a Triton Inference Server for the edges of a photo; `trace-sdk deploy triton` wrote what it serves.

pip install "tritonclient[http]" pillow; python client.py localhost:8000 trace-small photo.jpg edges.png

A model whose name ends in -photo (`--encoded`) gets the file itself, any other its RGB pixels.
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from PIL import Image

server, model, photo, out = sys.argv[1:]
if model.endswith("-photo"):
    file = np.array([[Path(photo).read_bytes()]], dtype=object)
    request = triton.InferInput("photo", [1, 1], "BYTES")
    request.set_data_from_numpy(file)
else:
    with Image.open(photo) as opened:
        image = np.asarray(opened.convert("RGB"))[None]
    request = triton.InferInput("image", list(image.shape), "UINT8")
    request.set_data_from_numpy(image)
edges = triton.InferenceServerClient(server).infer(model, [request]).as_numpy("edge_probability")[0]
grey = edges if edges.dtype == np.uint8 else np.rint(np.clip(edges, 0, 1) * 255).astype(np.uint8)
Image.fromarray(grey).save(out)

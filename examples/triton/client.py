"""Ask a Triton Inference Server for the edges of a photo.

pip install 'tritonclient[http]' pillow; python client.py localhost:8000 trace-small photo.jpg edges.png
"""

import sys

import numpy as np
import tritonclient.http as triton
from PIL import Image

server, model, photo, out = sys.argv[1:]
client = triton.InferenceServerClient(server)
said = {name: one["string_value"] for name, one in client.get_model_config(model)["parameters"].items()}
step, smallest, size = (int(said[name]) for name in ("multiple_of", "min_size", "default_size"))
buckets = [int(side) for side in said["buckets"].split(",") if side]


def padded(side):
    """The next length that the server takes, or knows already."""
    least = max(-(-side // step) * step, smallest)
    return next((bucket for bucket in buckets if bucket >= least), least)


with Image.open(photo) as opened:
    rgb = opened.convert("RGB")
scale = size / max(rgb.size)
scaled = np.asarray(rgb.resize([max(1, round(side * scale)) for side in rgb.size], Image.Resampling.BICUBIC))
height, width = scaled.shape[:2]
image = np.pad(scaled, ((0, padded(height) - height), (0, padded(width) - width), (0, 0)), mode="edge")[None]

request = triton.InferInput("image", list(image.shape), "UINT8")
request.set_data_from_numpy(image)
edges = client.infer(model, [request]).as_numpy("edge_probability")[0, :height, :width]
grey = Image.fromarray(np.rint(np.clip(edges, 0, 1) * 255).astype(np.uint8))
grey.resize(rgb.size, Image.Resampling.BILINEAR).save(out)

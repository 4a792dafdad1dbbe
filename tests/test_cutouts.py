"""Cut-outs along edges, whole and with clean outlines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trace_sdk.edge_map import EdgeMap
from trace_sdk.instances.cutouts import cut_out


def outlined(strengths: dict[tuple[int, int, int, int], float]) -> EdgeMap:
    """A photo of 120 × 200 whose edges are the outlines of boxes (left, top, right, bottom), each of one strength."""
    edges = np.zeros((120, 200), np.float32)
    rgb = np.full((120, 200, 3), 50, np.uint8)
    for (left, top, right, bottom), strength in strengths.items():
        edges[top : bottom + 1, left : right + 1] = strength
        edges[top + 2 : bottom - 1, left + 2 : right - 1] = 0
        rgb[top : bottom + 1, left : right + 1] = 200
    return EdgeMap(edges, rgb, threshold=0.4, info={"network_size": (200, 120)})


def test_things_with_clean_outlines_are_cut_out_best_first() -> None:
    strong, weak, at_the_rim, speck = (20, 20, 80, 90), (110, 20, 170, 90), (150, 95, 199, 119), (3, 100, 13, 110)
    found = cut_out(outlined({strong: 0.9, weak: 0.6, at_the_rim: 0.9, speck: 0.9}))
    assert len(found) == 2 and found[0].score > found[1].score
    for cutout, box in zip(found, (strong, weak), strict=True):
        assert np.abs(np.subtract(cutout.box, box)).max() <= 3
        alpha = np.asarray(cutout.image.getchannel("A"))
        assert alpha.shape == (cutout.box[3] - cutout.box[1] + 2, cutout.box[2] - cutout.box[0] + 2)
        assert alpha[0].max() < 128 and alpha[alpha.shape[0] // 2, alpha.shape[1] // 2] == 255
    assert len(cut_out(outlined({strong: 0.9, weak: 0.6}), min_score=0.7)) == 1


def test_what_counts_as_clean_follows_the_engine_s_threshold() -> None:
    edges = outlined({(20, 20, 80, 90): 0.3})
    assert not cut_out(replace(edges, threshold=0.7)) and len(cut_out(replace(edges, threshold=0.2))) == 1

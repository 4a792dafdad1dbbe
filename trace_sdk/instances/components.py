"""Connected components of a list of links."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components


def components(links: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """Which of `count` nodes the links join: int32 [count], numbered from 0. `links`: int32 [L, 2]."""
    graph = coo_matrix((np.ones(len(links), np.int8), (links[:, 0], links[:, 1])), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)

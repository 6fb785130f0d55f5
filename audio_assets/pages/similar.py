"""Tracks that sound alike, by the cosine distance of their MusiCNN embeddings (0 to 2)."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from audio_assets.pages.tracks import Tracks

SAME_DISTANCE = 0.001
"""Below this distance two tracks of the same length sound the same."""

SAME_DURATION_S = 1.0
"""By how much the lengths of these may differ (s)."""

_BETWEEN = 2000
_NEIGHBOURS = 10
_COMPARED = 8
_AT_ONCE = 20_000


def neighbours(tracks: Tracks, file_key: str, count: int = 20) -> pd.DataFrame:
    """Return the tracks nearest to one, nearest first, with the column ``distance``.

    Of files with the same content one is returned, and none with the track's own.

    Raises
    ------
    KeyError
        If the track is unknown or has no embedding.
    """
    here = _place(tracks, file_key)
    others = _contents(tracks, here)
    others = others[others != here]
    distances = _distances(tracks, others, here)
    nearest = np.argsort(distances)[:count]
    return _rows(tracks, others[nearest], distance=distances[nearest])


def path(tracks: Tracks, start: str, end: str) -> pd.DataFrame:
    """Return a way from one track to another in small steps, with the column ``step``.

    It is the shortest way in the graph that joins each track to its ten nearest ones; more, where
    these leave the two apart. The graph is that of the 2000 tracks with the least sum of distances
    to both.

    Returns
    -------
    DataFrame
        Rows of the tracks from `start` to `end`; ``step`` is the distance from the one before.

    Raises
    ------
    KeyError
        If a track is unknown or has no embedding.
    """
    from scipy.sparse.csgraph import dijkstra
    from sklearn.neighbors import NearestNeighbors

    ends = [_place(tracks, start), _place(tracks, end)]
    if tracks.heard[ends[0]] == tracks.heard[ends[1]]:
        return _rows(tracks, np.array(ends[:1]), step=[0.0])
    others = _contents(tracks, *ends)
    others = others[~np.isin(others, ends)]
    detour = sum(_distances(tracks, others, place) for place in ends)
    nodes = np.concatenate([ends, others[np.argsort(detour)[:_BETWEEN]]])
    near = NearestNeighbors(algorithm="brute").fit(tracks.embeddings[nodes])
    joined = _NEIGHBOURS
    while True:
        joined = min(joined, len(nodes) - 1)
        graph = near.kneighbors_graph(n_neighbors=joined, mode="distance")
        # Of two vectors of length 1 the cosine distance is half the square of their distance. In
        # a sparse graph, 0 would be no edge.
        graph.data = np.maximum(graph.data**2 / 2, np.finfo(np.float32).eps)
        lengths, before = dijkstra(graph, directed=False, indices=[0], return_predecessors=True)
        if np.isfinite(lengths[0, 1]):
            break
        joined *= 4
    way = [1]
    while way[-1]:
        way.append(int(before[0, way[-1]]))
    found = nodes[way[::-1]]
    steps = 1 - (tracks.embeddings[found[1:]] * tracks.embeddings[found[:-1]]).sum(axis=1)
    return _rows(tracks, found, step=[0.0, *np.maximum(steps, 0)])


def duplicates(tracks: Tracks) -> pd.DataFrame:
    """Return likely duplicates: rows of tracks by ``group``, with ``why`` they are in it.

    Files with the same content are, and tracks with the same length whose embeddings hardly differ:
    see `SAME_DURATION_S` and `SAME_DISTANCE`. Each track is compared with those that are nearest by
    its length and its first principal components, so that no more than a few are looked at.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    frame = tracks.frame
    of_content = frame.groupby("content_hash", sort=False).ngroup().to_numpy()
    by_content = np.argsort(of_content, kind="stable")
    sorted_contents = of_content[by_content]
    is_same = (sorted_contents[1:] == sorted_contents[:-1]) & (sorted_contents[1:] >= 0)
    same = np.column_stack([by_content[:-1], by_content[1:]])[is_same]
    pairs = np.concatenate([same, _alike(tracks)])
    joined = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(frame), len(frame)))
    group = connected_components(joined, directed=False)[1]
    sizes = np.bincount(group, minlength=1)
    rows = np.flatnonzero(sizes[group] > 1)
    rows = rows[np.argsort(group[rows], kind="stable")]
    has_copy = np.isin(rows, same)
    found = frame.iloc[rows]
    found.insert(0, "group", 1 + np.unique(group[rows], return_inverse=True)[1])
    found.insert(1, "why", np.where(has_copy, "same content", "sounds the same"))
    return found


def _alike(tracks: Tracks) -> NDArray[np.intp]:
    """Return pairs of rows that sound the same, shape (n, 2)."""
    from scipy.spatial import KDTree

    if "duration_s" not in tracks.frame or not len(tracks.heard):
        return np.empty((0, 2), np.intp)
    durations = tracks.frame["duration_s"].to_numpy()[tracks.heard]
    known = np.flatnonzero(np.isfinite(durations))
    # Where the angle is small, the distance of two vectors of length 1 is the root of twice the
    # cosine distance, and on each axis they are no farther apart. So those that count are within 1.
    apart = np.sqrt(2 * SAME_DISTANCE)
    points = np.column_stack([durations / SAME_DURATION_S, tracks.components / apart])[known]
    if not len(points):
        return np.empty((0, 2), np.intp)
    near = KDTree(points).query(points, k=_COMPARED, p=np.inf, distance_upper_bound=1.0)[1]
    one, other = known.repeat(_COMPARED), np.append(known, -1)[near.ravel()]
    is_pair = (other >= 0) & (one != other)
    one, other = one[is_pair], other[is_pair]
    close = np.zeros(len(one), bool)
    for start in range(0, len(one), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        vectors = tracks.embeddings[one[some]], tracks.embeddings[other[some]]
        close[some] = 1 - np.einsum("ij,ij->i", *vectors) < SAME_DISTANCE
    return np.column_stack([tracks.heard[one[close]], tracks.heard[other[close]]])


def _place(tracks: Tracks, file_key: str) -> int:
    """Return the place of a track among those that have an embedding."""
    row = tracks.row_of[file_key]
    place = int(np.searchsorted(tracks.heard, row))
    if place == len(tracks.heard) or tracks.heard[place] != row:
        raise KeyError(file_key)
    return place


def _contents(tracks: Tracks, *places: int) -> NDArray[np.intp]:
    """Return the places of tracks, one per content: some given ones, and of others the first."""
    hashes = tracks.frame["content_hash"].iloc[tracks.heard].reset_index(drop=True)
    given = hashes.iloc[list(places)]
    others = np.flatnonzero(~hashes.duplicated() & ~hashes.isin(given))
    return np.union1d(others, places)


def _distances(tracks: Tracks, places: NDArray[np.intp], place: int) -> NDArray[np.float32]:
    cosines = tracks.embeddings @ tracks.embeddings[place]
    distances: NDArray[np.float32] = np.maximum(1 - cosines[places], 0)
    return distances


def _rows(tracks: Tracks, places: NDArray[np.intp], **more: ArrayLike) -> pd.DataFrame:
    """Return the rows of tracks, after a further column."""
    rows = tracks.frame.iloc[tracks.heard[places]]
    return pd.concat([pd.DataFrame(more, index=rows.index), rows], axis=1)

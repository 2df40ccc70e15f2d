"""COCO's greedy matching of ranked proposals with objects, for all IoU thresholds at once.

Letters: D proposals and G objects of one image, T IoU thresholds, A sets of objects.
"""

import numpy as np

ALMOST_ONE = 1 - 1e-10  # COCOeval's highest threshold: an IoU of 1 may come out a bit smaller


def find_hits(overlaps: np.ndarray, wanted: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Which proposals find an object when each, best first, takes the free one it overlaps most.

    It is what COCOeval.evaluateImg does, whose objects that are not wanted (crowds, other areas)
    are as good as absent: it gives one to a proposal only if no wanted one is left for it, and does
    not count that as a hit. Between equal overlaps the last object wins.

    Args:
        overlaps: (D, G) IoU, the best proposal first.
        wanted: (A, G) bool, the objects that count.
        thresholds: (T,) IoU from which on a proposal may take an object.

    Returns:
        (T, D, A) bool.
    """
    thresholds = np.minimum(thresholds, ALMOST_ONE)
    hits = np.zeros((len(thresholds), len(overlaps), len(wanted)), bool)
    rows = np.flatnonzero((overlaps >= thresholds.min()).any(axis=1))  # the others find nothing
    if len(rows):
        hits[:, rows] = _walk(overlaps[rows], wanted, thresholds)
    return hits


def _walk(overlaps: np.ndarray, wanted: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """`find_hits` by going from match to match, at most G of them, for all (T, A) in step."""
    count, (sets, objects) = len(overlaps), wanted.shape
    following = _next_passing(overlaps, thresholds)  # (T, D + 1, G)
    overlaps = np.concatenate([overlaps, np.zeros((1, objects))])
    hits = np.zeros((len(thresholds), count + 1, sets), bool)  # row D: after the last match
    t, a = np.ogrid[: len(thresholds), :sets]
    free = np.broadcast_to(wanted, (len(thresholds), sets, objects)).copy()
    at = np.zeros((len(thresholds), sets), int)
    while True:
        candidates = np.where(free, following[t, at], count)  # (T, A, G)
        at = candidates.min(axis=-1)
        if (at == count).all():
            return hits[:, :count]
        within_reach = np.where(candidates == at[..., None], overlaps[at], -1)
        taken = objects - 1 - within_reach[..., ::-1].argmax(axis=-1)
        hits[t, at, a] = True
        free[t, a, taken] = False
        at = np.minimum(at + 1, count)


def _next_passing(overlaps: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """For each proposal and object the next proposal, itself included, that may take the object.

    Returns:
        (T, D + 1, G) int32; D where there is none.
    """
    count, objects = overlaps.shape
    numbers = np.arange(count, dtype=np.int32)[:, None]
    passing = np.full((len(thresholds), count + 1, objects), count, np.int32)
    passing[:, :count] = np.where(overlaps >= thresholds[:, None, None], numbers, np.int32(count))
    return np.minimum.accumulate(passing[:, ::-1], axis=1)[:, ::-1]

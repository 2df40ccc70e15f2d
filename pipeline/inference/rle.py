"""COCO's run-length encoding of many masks at once, from the ends of their runs.

A mask is a sequence of pixels down the columns of the image, its runs alternately background and
foreground. Letters: H, W the image, e edges, n masks.
"""

import numpy as np

BITS = 5  # of a run length in one character
MORE = 1 << BITS  # marks that characters follow
FIRST_CHARACTER = np.uint8(ord("0"))


def cancel_pairs(owner: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges without those that undo each other.

    An edge switches between background and foreground, so two at one place switch nothing: a run
    without a pixel, or one that ends where a column ends and goes on at the top of the next.

    Args:
        owner: (e,) int64, the mask of each edge, ascending.
        edges: (e,) int64 positions, ascending within a mask.

    Returns:
        owner and edges of those that stay.
    """
    if len(edges) == 0:
        return owner, edges
    new = np.ones(len(edges), bool)
    new[1:] = (edges[1:] != edges[:-1]) | (owner[1:] != owner[:-1])
    first = np.flatnonzero(new)
    odd = first[np.diff(first, append=len(edges)) % 2 == 1]
    return owner[odd], edges[odd]


def boxes_of_runs(starts: np.ndarray, runs: np.ndarray, height: int) -> np.ndarray:
    """The boxes of masks.

    Args:
        starts: (n,) int64, the first run of each mask.
        runs: (r, 2) int64, beginning and end of the runs of foreground of all masks.
        height: H.

    Returns:
        (n, 4) float32 xyxy.
    """
    column, row = np.divmod(runs - [0, 1], height)  # of the first and the last pixel
    within = column[:, 0] == column[:, 1]  # a longer one has the foot of a column, and a top
    top = np.minimum.reduceat(np.where(within, row[:, 0], 0), starts)
    bottom = np.maximum.reduceat(np.where(within, row[:, 1], height - 1), starts)
    last = np.append(starts[1:], len(runs)) - 1
    boxes = np.stack([column[starts, 0], top, column[last, 1] + 1, bottom + 1], axis=1)
    return boxes.astype(np.float32)


def run_lengths(
    starts: np.ndarray, edges: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of the runs of masks, background first.

    Args:
        starts: (n,) int64, the first edge of each mask; each has some, an even number.
        edges: (e,) int64. size: H W.

    Returns:
        Lengths (c,) int64, the first of each mask (n,), and their numbers within a mask (c,).
    """
    firsts = starts + np.arange(len(starts))  # every mask has one run more than edges
    ends = np.insert(edges, np.append(starts[1:], len(edges)), size)
    lengths = np.diff(ends, prepend=0)
    lengths[firsts] = ends[firsts]
    number = np.arange(len(lengths)) - np.repeat(firsts, np.diff(firsts, append=len(lengths)))
    kept = (lengths > 0) | (number == 0)  # none at the end if the last pixel is foreground
    firsts = firsts - np.cumsum(~kept)[firsts]
    return lengths[kept], firsts, number[kept]


def compress(lengths: np.ndarray, firsts: np.ndarray, number: np.ndarray) -> list[bytes]:
    """COCO's strings of run lengths (rleToString of maskApi.c).

    From its fourth on, a length is written as what it exceeds the one before the last by; five bits
    to a character, the lowest first, the sign in the last.

    Args:
        lengths, firsts, number: of `run_lengths`.
    """
    values = lengths.copy()
    values[2:] -= np.where(number[2:] > 2, lengths[:-2], 0)
    magnitude = np.where(values < 0, ~values, values)
    groups = 1 + int(magnitude.max(initial=0)).bit_length() // BITS  # a bit more for the sign
    used = np.ones((len(lengths), groups), bool)
    characters = np.empty((len(lengths), groups), np.uint8)
    for group in range(groups):
        follows = magnitude >= 1 << (BITS * group + BITS - 1)
        characters[:, group] = (values >> (BITS * group) & (MORE - 1)) + MORE * follows
        used[:, group + 1 : group + 2] = follows[:, None]
    text = (characters[used] + FIRST_CHARACTER).tobytes()
    ends = np.cumsum(used.sum(axis=1))
    stops = ends[np.append(firsts[1:], len(lengths)) - 1].tolist()
    return [text[a:b] for a, b in zip([0, *stops[:-1]], stops, strict=True)]

"""Convert a mask to its outlines, rings of corners, and rings to the mask they enclose; one undoes the other."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]
_EAST, _SOUTH, _WEST, _NORTH = range(4)  # a right turn is the next one


def outlines(mask: NDArray[np.bool_]) -> list[list[Ring]]:
    """Return, for each piece of a mask (h, w), its outer ring and then its holes: corners (n, 2), x and y in mask px.

    Pieces that touch only at a corner are separate. Rings follow the pixels' edges, do not cross or touch themselves,
    and have the tissue on their right-hand side.
    """
    from scipy import ndimage  # slow to import, and needed where a slide is read alone

    labels = np.empty(mask.shape, dtype=np.int32)
    ndimage.label(mask, output=labels)
    outer: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = {piece: [] for piece in range(1, int(labels.max(initial=0)) + 1)}
    for ring in _rings(mask):
        (x, y), (next_x, next_y) = ring[0], ring[1]
        # The pixel to the right of the first side.
        row = y if next_x > x else y - 1 if next_x < x else min(y, next_y)
        column = x if next_y < y else x - 1 if next_y > y else min(x, next_x)
        piece = int(labels[row, column])
        if _area(ring) > 0:
            outer[piece] = ring.astype(float)
        else:
            holes[piece].append(ring.astype(float))
    return [[outer[piece], *holes[piece]] for piece in sorted(outer)]


def fill(mask: NDArray[np.bool_], rings: Sequence[Ring]) -> None:
    """Set the pixels of a mask (h, w) whose centres lie within an odd number of the rings (n, 2), in mask px."""
    rows, columns = mask.shape
    crossings = np.zeros((rows, columns + 1), dtype=np.int32)
    for ring in rings:
        start, end = ring, np.roll(ring, -1, axis=0)
        low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
        first = np.clip(np.ceil(low - 0.5), 0, rows).astype(np.int64)  # rows whose centre line crosses the side
        last = np.clip(np.ceil(high - 0.5), 0, rows).astype(np.int64)
        counts = last - first
        side = np.repeat(np.arange(len(ring)), counts)
        row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[side]
        slope = (row + 0.5 - start[side, 1]) / (end[side, 1] - start[side, 1])
        x = start[side, 0] + slope * (end[side, 0] - start[side, 0])
        np.add.at(crossings, (row, np.clip(np.ceil(x - 0.5), 0, columns).astype(np.int64)), 1)
    mask |= (np.cumsum(crossings, axis=1)[:, :columns] & 1).astype(bool)


def is_inside(point: NDArray[np.float64], ring: Ring) -> bool:
    """Return whether a point (x, y) lies within a ring (n, 2)."""
    start, end = ring, np.roll(ring, -1, axis=0)
    crosses = (start[:, 1] > point[1]) != (end[:, 1] > point[1])
    start, end = start[crosses], end[crosses]
    slope = (point[1] - start[:, 1]) / (end[:, 1] - start[:, 1])
    return bool((start[:, 0] + slope * (end[:, 0] - start[:, 0]) > point[0]).sum() % 2)


def _rings(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    """Yield the closed paths along the edges of a mask, as their corners (n, 2)."""
    starts, ends, headings = _sides(mask)
    width = mask.shape[1] + 1
    keys = (starts[:, 1] * width + starts[:, 0]) * 4 + headings
    order = np.argsort(keys)
    ordered = keys[order]
    corner = (ends[:, 1] * width + ends[:, 0]) * 4
    # Where two pixels touch at a corner, the path turns right, around the pixel it comes from.
    right, left = (_index_of(ordered, corner + (headings + turn) % 4) for turn in (1, 3))
    following = order[np.where(right >= 0, right, left)]
    left_over = np.ones(len(starts), dtype=bool)
    corners = starts.tolist()
    for first in range(len(starts)):
        if not left_over[first]:
            continue
        way: list[tuple[int, int]] = []
        index_of: dict[tuple[int, int], int] = {}
        side = first
        while left_over[side]:
            left_over[side] = False
            point = (corners[side][0], corners[side][1])
            if point in index_of:  # the path touches itself here: the loop in between is a ring of its own
                cut = index_of[point]
                yield np.array(way[cut:])
                for passed in way[cut + 1 :]:
                    del index_of[passed]
                del way[cut + 1 :]
            else:
                index_of[point] = len(way)
                way.append(point)
            side = int(following[side])
        yield np.array(way)


def _sides(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the straight sides of a mask's edges, tissue on their right: starts (n, 2), ends (n, 2), headings (n)."""
    padded = np.pad(mask, 1).astype(np.int8)
    starts, ends, headings = [], [], []
    # Between a row and the next: 1 where tissue begins (eastward), -1 where it ends (westward); same for columns.
    for change, along_x in ((np.diff(padded, axis=0)[:, 1:-1], True), (np.diff(padded, axis=1)[1:-1].T, False)):
        for sign in (1, -1):
            runs = np.diff(np.pad((change == sign).astype(np.int8), ((0, 0), (1, 1))), axis=1)
            line, begin = np.nonzero(runs == 1)
            _, end = np.nonzero(runs == -1)
            start, stop = (begin, end) if (sign == 1) == along_x else (end, begin)
            pairs = [(start, line), (stop, line)] if along_x else [(line, start), (line, stop)]
            starts.append(np.stack(pairs[0], axis=1))
            ends.append(np.stack(pairs[1], axis=1))
            heading = (_EAST if sign == 1 else _WEST) if along_x else (_NORTH if sign == 1 else _SOUTH)
            headings.append(np.full(len(line), heading))
    return np.concatenate(starts), np.concatenate(ends), np.concatenate(headings)


def _index_of(ordered: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of the keys in an ordered array, -1 for keys that are not in it."""
    indices = np.minimum(np.searchsorted(ordered, keys), max(0, len(ordered) - 1))
    return np.where(ordered[indices] == keys, indices, -1) if len(ordered) else indices


def _area(ring: NDArray[np.int64]) -> float:
    """Return the signed area, positive for an outer ring."""
    x, y = ring[:, 0].astype(float), ring[:, 1].astype(float)
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2

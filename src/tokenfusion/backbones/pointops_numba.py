"""The searches of :mod:`tokenfusion.backbones.pointops` on a CPU, one cloud at a time; compiled on first use, then cached."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

Array = np.ndarray

BLOCK = 1024  # points whose largest distance is kept: they fit the first-level cache
SIDE = 64  # cells of the grid along each axis, at most
REACH = 1.0001  # of a ball among the cells, in radii: covers the rounding of distances
FAR = np.float32(1e10)  # squared metres, before anything was chosen
HOLE = 1e-3  # squared metres: points this near to the origin are skipped


@intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    return a(a, b, c), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def _lowest_bit(typing: Any, word: Any) -> Any:
    """The number of the lowest bit that is set, of a word that is not zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, True))

    return word(word), generate


@njit(cache=True, nogil=True, inline="always")
def _square(dx: Any, dy: Any, dz: Any) -> Any:
    """Squared length in the order in which the reference rounds."""
    return _fma(dz, dz, _fma(dx, dx, dy * dy))  # type: ignore[call-arg]  # numba gives the typing context


# ---- furthest points -----------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _candidates(xyz: Array, order: Array) -> tuple[Array, Array, Array, Array]:
    """The points that may be chosen, in the order of preference: x, y, z and their indices, each ``[n]``."""
    x, y, z = np.empty(len(xyz), np.float32), np.empty(len(xyz), np.float32), np.empty(len(xyz), np.float32)
    index = np.empty(len(xyz), np.int64)
    n = 0
    for k in order:
        size = _square(xyz[k, 0], xyz[k, 1], xyz[k, 2])
        if np.float64(size) > HOLE and np.isfinite(size):
            x[n], y[n], z[n], index[n] = xyz[k, 0], xyz[k, 1], xyz[k, 2], k
            n += 1
    return x[:n], y[:n], z[:n], index[:n]  # contiguous each, or nothing would be vectorised


@njit(cache=True, nogil=True)
def _approach(x: Array, y: Array, z: Array, nearest: Array, px: Any, py: Any, pz: Any) -> Any:
    """Lower the squared distances to the chosen points by that to a new one; the largest of them, as an integer.

    The bits of a float that is not negative, read as an integer, are in the same order; integers let the compiler take the
    largest of eight at once.
    """
    for k in range(len(x)):
        distance = _square(x[k] - px, y[k] - py, z[k] - pz)
        nearest[k] = distance if distance < nearest[k] else nearest[k]
    largest = np.int32(0)
    for value in nearest.view(np.int32):
        largest = max(largest, value)
    return largest


@njit(cache=True, nogil=True)
def furthest(xyz: Array, order: Array, chosen: Array) -> None:
    """Fill ``chosen`` int64 ``[count]`` from ``xyz`` float32 ``[N, 3]``; ``order`` int64 ``[N]`` decides ties."""
    x, y, z, index = _candidates(xyz, order)
    n = len(index)
    nearest = np.full(n, FAR, np.float32)
    largest = np.zeros((n + BLOCK - 1) // BLOCK, np.int32)
    chosen[0] = 0
    p = xyz[0]
    for i in range(1, len(chosen)):
        if n == 0:
            chosen[i] = 0
            continue
        for b in range(len(largest)):
            part = slice(b * BLOCK, min((b + 1) * BLOCK, n))
            largest[b] = _approach(x[part], y[part], z[part], nearest[part], p[0], p[1], p[2])
        block = np.argmax(largest)  # the first of equals
        best = block * BLOCK
        while nearest.view(np.int32)[best] != largest[block]:
            best += 1
        chosen[i] = index[best]
        p = xyz[chosen[i]]


# ---- ball query ----------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _grid(xyz: Array, radius: Any) -> tuple[Array, Array, Array]:
    """Cells at least as wide as the radius: lowest corner, cells per metre, cells per axis; each ``[3]``."""
    origin, scale, shape = np.zeros(3), np.zeros(3), np.ones(3, np.int64)
    for axis in range(3):
        low, high = np.inf, -np.inf
        for k in range(len(xyz)):
            value = np.float64(xyz[k, axis])
            if np.isfinite(value):
                low, high = min(low, value), max(high, value)
        if low <= high:
            origin[axis] = low
            scale[axis] = 1.0 / max(np.float64(radius), (high - low) / SIDE)
            shape[axis] = int((high - low) * scale[axis]) + 1
    return origin, scale, shape


@njit(cache=True, nogil=True)
def _into_cells(xyz: Array, origin: Array, scale: Array, shape: Array) -> tuple[Array, Array, Array]:
    """Sort the finite points by cell: where each cell starts, whose turn it is, and the coordinates in that order."""
    cell = np.full(len(xyz), -1, np.int64)
    start = np.zeros(shape[0] * shape[1] * shape[2] + 1, np.int64)
    for k in range(len(xyz)):
        if np.isfinite(_square(xyz[k, 0], xyz[k, 1], xyz[k, 2])):
            number = 0
            for axis in range(3):
                number = number * shape[axis] + int((xyz[k, axis] - origin[axis]) * scale[axis])
            cell[k] = number
            start[number + 1] += 1
    for number in range(len(start) - 1):
        start[number + 1] += start[number]
    free = start.copy()
    member = np.empty(len(xyz), np.int64)
    coordinates = np.empty((3, len(xyz)), np.float32)
    for k in range(len(xyz)):
        if cell[k] >= 0:
            place = free[cell[k]]
            free[cell[k]] += 1
            member[place] = k
            for axis in range(3):
                coordinates[axis, place] = xyz[k, axis]
    return start, member, coordinates


@njit(cache=True, nogil=True)
def _span(middle: Any, reach: float, origin: float, scale: float, cells: int) -> tuple[int, int]:
    """First and last cell along one axis that a ball touches; none where the first is behind the last."""
    low = np.floor((np.float64(middle) - reach - origin) * scale)
    high = np.floor((np.float64(middle) + reach - origin) * scale)
    if not (low < cells and high >= 0):  # also where the middle is not a number
        return 0, -1
    return int(max(low, 0.0)), int(min(high, cells - 1.0))


@njit(cache=True, nogil=True)
def _take_first(words: Array, row: Array) -> None:
    """Write the lowest marked numbers into a row, repeat its first where they are too few, and clear the marks."""
    n = 0
    for w in range(len(words)):
        word = words[w]
        words[w] = 0
        while word != 0 and n < len(row):
            row[n] = w * 64 + np.int64(_lowest_bit(word))  # type: ignore[call-arg]
            n += 1
            word &= word - np.uint64(1)
    row[n:] = row[0] if n > 0 else 0


@njit(cache=True, nogil=True)
def ball(xyz: Array, centers: Array, radius: Any, found: Array) -> None:
    """Fill ``found`` int64 ``[M, count]`` from ``xyz`` float32 ``[N, 3]`` and ``centers`` float32 ``[M, 3]``."""
    origin, scale, shape = _grid(xyz, radius)
    start, member, (x, y, z) = _into_cells(xyz, origin, scale, shape)
    words = np.zeros((len(xyz) + 63) // 64, np.uint64)  # one bit per point: sorts the hits by their number for nothing
    limit, reach = radius * radius, np.float64(radius) * REACH
    for m in range(len(centers)):
        c = centers[m]
        i0, i1 = _span(c[0], reach, origin[0], scale[0], shape[0])
        j0, j1 = _span(c[1], reach, origin[1], scale[1], shape[1])
        k0, k1 = _span(c[2], reach, origin[2], scale[2], shape[2])
        if k0 <= k1:
            for i in range(i0, i1 + 1):
                for j in range(j0, j1 + 1):
                    column = (i * shape[1] + j) * shape[2]
                    for p in range(start[column + k0], start[column + k1 + 1]):
                        if _square(c[0] - x[p], c[1] - y[p], c[2] - z[p]) < limit:
                            words[member[p] >> 6] |= np.uint64(1) << np.uint64(member[p] & 63)
        _take_first(words, found[m])


# ---- three nearest -------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def three(unknown: Array, known: Array, nearest: Array) -> None:
    """Fill ``nearest`` int64 ``[U, 3]`` from ``unknown`` float32 ``[U, 3]`` and ``known`` float32 ``[K, 3]``."""
    for u in range(len(unknown)):
        px, py, pz = unknown[u, 0], unknown[u, 1], unknown[u, 2]
        best0 = best1 = best2 = np.float32(np.inf)
        at0 = at1 = at2 = 0
        for k in range(len(known)):
            distance = _square(px - known[k, 0], py - known[k, 1], pz - known[k, 2])
            if distance < best0:
                best0, best1, best2 = distance, best0, best1
                at0, at1, at2 = k, at0, at1
            elif distance < best1:
                best1, best2 = distance, best1
                at1, at2 = k, at1
            elif distance < best2:
                best2, at2 = distance, k
        nearest[u, 0], nearest[u, 1], nearest[u, 2] = at0, at1, at2

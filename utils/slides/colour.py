"""Optical densities of an image, and a hue that does not depend on the amount of stain."""

import math

import numpy as np
from numpy.typing import NDArray

COLOUR_STEP = 4  # grey levels per bin of the histogram of colours
_WHITE = 255.0


def optical_density(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (h, w, 3) optical density to base 10 against white: 0 is clear, 1 lets a tenth of the light through."""
    return density_of(np.arange(256))[rgb]


def density_of(values: NDArray) -> NDArray[np.float32]:
    """Return the optical density of values between 0 and 255, of any shape."""
    return (-np.log10((values + 1) / (_WHITE + 1))).astype(np.float32)


def hue(density: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return (u, v, mean density), each (h, w): u and v are hue and saturation whatever the amount of stain."""
    mean = mean_density(density)
    floor = np.maximum(mean, np.float32(1e-6))
    u = density[..., 0] / floor - 1
    v = (density[..., 1] - density[..., 2]) / (np.float32(math.sqrt(3)) * floor)
    return u.astype(np.float32, copy=False), v.astype(np.float32, copy=False), mean


def mean_density(density: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (h, w): `density.mean(axis=-1)`, but several times as fast."""
    return (density[..., 0] + density[..., 1] + density[..., 2]) / np.float32(3)


def least_density(density: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (h, w): `density.min(axis=-1)`, but several times as fast."""
    return np.minimum(np.minimum(density[..., 0], density[..., 1]), density[..., 2])


def chroma(density: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (h, w): the largest minus the smallest density of the channels."""
    return np.maximum(np.maximum(density[..., 0], density[..., 1]), density[..., 2]) - least_density(density)


def most_frequent_colour(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return (3,): the centre of the cube of `COLOUR_STEP` grey levels with most of the pixels (n, 3), n at least 1."""
    codes = (pixels // COLOUR_STEP).astype(np.int32) @ np.array([64**2, 64, 1], dtype=np.int32)
    code = int(np.bincount(codes).argmax())
    return np.array([code // 64**2, code // 64 % 64, code % 64]) * COLOUR_STEP + COLOUR_STEP / 2


def binned_density(density: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Return (h // width, w // width, 3): means over squares of `width` px; the rest at the far edges is dropped."""
    rows, columns = density.shape[0] // width, density.shape[1] // width
    density = density[: rows * width, : columns * width]
    total = np.zeros((rows, columns, 3), dtype=np.float32)
    for row in range(width):
        for column in range(width):
            total += density[row::width, column::width]
    return total / np.float32(width**2)

"""Colours brought back to those of another picture: A1111's colour correction.

Each channel of CIE L*a*b* (D65, from sRGB) is mapped so that its values are spread as the other picture's are; the
lightness of the picture itself is kept, by the W3C's blend mode "luminosity" (Compositing and Blending Level 1, 13).
"""

from __future__ import annotations

import numpy as np

_TO_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
_WHITE = _TO_XYZ.sum(axis=1)
_LUMINOSITY = np.array([0.3, 0.59, 0.11])
_KNEE = 6 / 29  # where CIE's cube root becomes a line


def match_colours(picture: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Give a picture (height, width, 3) uint8 the colours of another one of any size, and keep its own lightness."""
    lab, other = _to_lab(picture), _to_lab(source)
    matched = np.stack([_spread_as(lab[..., i], other[..., i]) for i in range(3)], axis=-1)
    return _bytes(_with_luminosity(_to_rgb(matched), picture / 255.0))


def _spread_as(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Map values so that their cumulative distribution becomes that of others."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    found, other_counts = np.unique(others, return_counts=True)
    shares = np.cumsum(counts) / values.size
    return np.interp(shares, np.cumsum(other_counts) / others.size, found)[at.reshape(values.shape)]


def _to_lab(pixels: np.ndarray) -> np.ndarray:
    unit = pixels / 255.0
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(xyz > _KNEE**3, np.cbrt(xyz), xyz / (3 * _KNEE**2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _to_rgb(lab: np.ndarray) -> np.ndarray:
    """Turn L*a*b* into sRGB in [0, 1], cut off at its ends."""
    y = (lab[..., 0] + 16) / 116
    root = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    xyz = np.where(root > _KNEE, root**3, 3 * _KNEE**2 * (root - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ np.linalg.inv(_TO_XYZ).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _with_luminosity(colours: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Give colours in [0, 1] the luminosity of others; what leaves [0, 1] is drawn towards grey."""
    wanted = (light @ _LUMINOSITY)[..., None]
    moved = colours + wanted - (colours @ _LUMINOSITY)[..., None]
    low, high = moved.min(axis=-1, keepdims=True), moved.max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = np.where(low < 0, wanted + (moved - wanted) * wanted / (wanted - low), moved)
        moved = np.where(high > 1, wanted + (moved - wanted) * (1 - wanted) / (high - wanted), moved)
    return moved


def _bytes(unit: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(unit, 0, 1)).astype(np.uint8)

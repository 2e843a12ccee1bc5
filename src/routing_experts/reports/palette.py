"""Colours and widths of a figure's variants, and the map from a share to a colour."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from matplotlib.colors import ListedColormap, to_rgb

NARROW = 3.9  # inches: a figure for a phone
WIDE = 7.6


@dataclass(frozen=True)
class Look:
    """One variant. Series colours are Okabe and Ito's or close to them: colour-blind eyes tell them apart.

    Attributes:
        suffix: what its file names have before ``.png``.
        width: in inches.
        ramp: the colours of no layer skipped and of all skipped.
        bands: backgrounds of alternating stages.
    """

    suffix: str
    width: float
    paper: str
    ink: str
    faint: str
    line: str
    routed: str
    static: str
    random: str
    ramp: tuple[str, str]
    bands: tuple[str, str]

    @property
    def narrow(self) -> bool:
        """Whether it is for a phone."""
        return self.width <= NARROW

    @property
    def colours(self) -> ListedColormap:
        """Share to colour; equal steps of the share look equally large."""
        return _ramp(*self.ramp)


_LIGHT = (
    *("#ffffff", "#1c2330", "#5f6b7a", "#dde2e8", "#0072b2", "#b84e00", "#666c75"),
    ("#edf2f7", "#0a3a70"),
    ("#f3f6f9", "#e9eef3"),
)
_DARK = (
    *("#171b22", "#e8ecf1", "#98a3b1", "#323a45", "#56b4e9", "#e69f00", "#a5adb8"),
    ("#232a34", "#a9dcff"),
    ("#1c2129", "#242b35"),
)
LOOKS = (
    Look("", WIDE, *_LIGHT),
    Look(".dark", WIDE, *_DARK),
    Look(".narrow", NARROW, *_LIGHT),
    Look(".narrow.dark", NARROW, *_DARK),
)

# Linear sRGB to OKLab (Ottosson 2020): cone responses, a cube root, and opponent axes.
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@cache
def _ramp(first: str, last: str) -> ListedColormap:
    """A straight line through OKLab, a space in which distance is perceived difference; hence a uniform map."""
    ends = np.array([to_rgb(first), to_rgb(last)])
    linear = np.where(ends <= 0.04045, ends / 12.92, ((ends + 0.055) / 1.055) ** 2.4)
    low, high = np.cbrt(linear @ _TO_CONES.T) @ _TO_LAB.T
    between = low + (high - low) * np.linspace(0, 1, 256)[:, None]
    back = (between @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_CONES).T
    back = back.clip(0, 1)
    return ListedColormap(np.where(back <= 0.0031308, 12.92 * back, 1.055 * back ** (1 / 2.4) - 0.055).clip(0, 1))

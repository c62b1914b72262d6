"""What the demo's scenes are drawn on: coordinates, a palette, repeatable noise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOISE_CELLS = 6  # of smooth noise across the picture


@dataclass(frozen=True)
class Canvas:
    """What a scene is drawn on.

    Attributes:
        width_px: Width of the frame.
        height_px: Height of the frame.
        palette: Two or more colours, RRGGBB; brightness 0 gives the first, 1 the last.
        seed: Makes the scene's random shapes its own.
        x: float32, shape (H, W): -1 to 1 along the shorter side, the picture's middle is 0.
        y: float32, shape (H, W): the same, downwards.
    """

    width_px: int
    height_px: int
    palette: Sequence[str]
    seed: int
    x: np.ndarray = field(init=False, repr=False)
    y: np.ndarray = field(init=False, repr=False)
    _colours: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Lay out the coordinates and the palette's 256 shades."""
        short = min(self.width_px, self.height_px)
        columns = (np.arange(self.width_px, dtype=np.float32) * 2 + 1 - self.width_px) / short
        rows = (np.arange(self.height_px, dtype=np.float32) * 2 + 1 - self.height_px) / short
        x, y = np.meshgrid(columns, rows)
        stops = np.array([list(bytes.fromhex(colour)) for colour in self.palette], dtype=np.float64)
        shades = np.linspace(0, len(stops) - 1, 256)
        colours = np.stack([np.interp(shades, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "_colours", colours.round().astype(np.uint8))

    def colour(self, brightness: np.ndarray | float) -> np.ndarray:
        """Look brightness (H, W), 0 to 1, up in the palette: uint8 (H, W, 3)."""
        shade = (np.clip(np.asarray(brightness, dtype=np.float32), 0, 1) * 255).astype(np.uint8)
        colours: np.ndarray = self._colours[shade]
        return colours

    def random(self, *shape: int, stream: int = 0) -> np.ndarray:
        """The scene's own random numbers, the same at every call: float32, 0 to 1."""
        numbers: np.ndarray = np.random.default_rng((self.seed, stream)).random(shape, dtype=np.float32)
        return numbers

    def noise(self, cells: int = _NOISE_CELLS, stream: int = 0) -> np.ndarray:
        """Smooth clouds, 0 to 1, that repeat at the edges: a grid of random numbers, blended between its points."""
        grid = np.pad(self.random(cells, cells, stream=stream), (0, 1), mode="wrap")
        clouds: np.ndarray = _blend(self.height_px, cells) @ grid @ _blend(self.width_px, cells).T
        return clouds

    def turned(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """The coordinates, turned about the middle."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return self.x * cos - self.y * sin, self.x * sin + self.y * cos


def _blend(length: int, cells: int) -> np.ndarray:
    """Weights (length, cells + 1) of each grid point for each pixel: smoothstep between neighbours."""
    at = np.linspace(0, cells - 1e-3, length, dtype=np.float32)
    left = at.astype(int)
    step = at - left
    step = step * step * (3 - 2 * step)
    weights = np.zeros((length, cells + 1), dtype=np.float32)
    weights[np.arange(length), left] = 1 - step
    weights[np.arange(length), left + 1] = step
    return weights

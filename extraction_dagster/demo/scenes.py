"""Moving pictures from arithmetic: 26 text-free scenes, each with a texture of its own.

A scene is a pure function of the canvas and the time, so that any frame can be drawn alone, in any order, at any frame
rate, and comes out the same on every machine. Most scenes compute a brightness field and look it up in the palette.
The videos of the demo are compared byte by byte: a change here changes them.
"""
# ruff: noqa: PLR2004 - in this file the numbers are the drawing

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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

    def noise(self, cells: int = 6, stream: int = 0) -> np.ndarray:
        """Smooth clouds, 0 to 1, that repeat at the edges: a grid of cells x cells random numbers, blended between."""
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


def _wave(phase: np.ndarray) -> np.ndarray:
    wave: np.ndarray = np.sin(phase, dtype=np.float32) * np.float32(0.5) + np.float32(0.5)
    return wave


def _plasma(c: Canvas, t: float) -> np.ndarray:
    return c.colour(_wave(4 * c.x + t) * 0.4 + _wave(3 * (c.x + c.y) - t) * 0.3 + _wave(5 * np.hypot(c.x, c.y)) * 0.3)


def _pinwheel(c: Canvas, t: float) -> np.ndarray:
    return c.colour((np.arctan2(c.y, c.x) * (6 / np.pi) + t) % 2 < 1)


def _balls(c: Canvas, t: float) -> np.ndarray:
    picture = c.colour(0.15 * (c.y + 1))
    for start_x, start_y, speed_x, speed_y, shade in c.random(8, 5):
        # A triangle wave bounces between the edges: |((p) mod 4) - 2| - 1 runs -1, 1, -1, …
        x = abs((start_x * 4 + t * (0.3 + speed_x)) % 4 - 2) - 1
        y = abs((start_y * 4 + t * (0.3 + speed_y)) % 4 - 2) - 1
        away = np.hypot(c.x - x, c.y - y) / 0.28
        inside = away < 1
        picture[inside] = c.colour((0.4 + 0.6 * shade) * (1 - 0.5 * away[inside] ** 2))
    return picture


def _checkerboard(c: Canvas, t: float) -> np.ndarray:
    return c.colour((np.floor(c.x * 4 + t) + np.floor(c.y * 4 + t / 2)) % 2)


def _rings(c: Canvas, t: float) -> np.ndarray:
    return c.colour(_wave(24 * np.hypot(c.x - 0.4 * np.sin(t), c.y - 0.4 * np.cos(t)) - 5 * t))


def _clouds(c: Canvas, t: float) -> np.ndarray:
    drift = round(t * 12)
    sky = (
        c.noise(5) * 0.6
        + np.roll(c.noise(13, 1), drift, axis=1) * 0.3
        + np.roll(c.noise(31, 2), drift * 2, axis=1) * 0.15
    )
    return c.colour((sky - 0.3) * 2)


def _stars(c: Canvas, t: float) -> np.ndarray:
    picture = c.colour(0.12 * c.noise())
    for x, y, depth in c.random(260, 3):
        far = (depth - t / 8) % 1 + 0.05
        column = int((0.5 + (x - 0.5) * 0.5 / far) * c.width_px)
        row = int((0.5 + (y - 0.5) * 0.5 / far) * c.height_px)
        size = 1 + int(0.35 / far)
        picture[max(row, 0) : max(row + size, 0), max(column, 0) : max(column + size, 0)] = c.colour(1.2 - far)
    return picture


def _stripes(c: Canvas, t: float) -> np.ndarray:
    return c.colour(c.random(64)[(np.floor(c.x * 7 + t).astype(int)) % 64])


def _voronoi(c: Canvas, t: float) -> np.ndarray:
    nearest = np.full(c.x.shape, np.inf, dtype=np.float32)
    second, shade = nearest.copy(), np.zeros_like(nearest)
    for x, y, phase, colour in c.random(18, 4):
        away = (c.x - (x * 3 - 1.5) - 0.2 * np.sin(t + 6 * phase)) ** 2 + (
            c.y - (y * 3 - 1.5) - 0.2 * np.cos(t + 6 * phase)
        ) ** 2
        closer = away < nearest
        second = np.where(closer, nearest, np.minimum(second, away))
        shade[closer] = colour
        nearest = np.minimum(nearest, away)
    return c.colour(np.where(np.sqrt(second) - np.sqrt(nearest) < 0.06, 0, 0.25 + 0.75 * shade))


def _sea(c: Canvas, t: float) -> np.ndarray:
    depth = np.clip(c.y + 0.45, 0.02, None)
    swell = _wave(9 / depth + 3 * np.sin(2 * c.x / depth + t) + 3 * t) * np.clip(depth * 2, 0, 1)
    return c.colour(np.where(c.y < -0.4, 0.75 - 0.25 * c.y, 0.1 + 0.45 * swell))


def _fire(c: Canvas, t: float) -> np.ndarray:
    rise = -round(t * 40)
    flames = np.roll(c.noise(9), rise, axis=0) * 0.6 + np.roll(c.noise(20, 1), rise * 2, axis=0) * 0.5
    return c.colour(flames * (0.9 + 0.9 * c.y))


def _halftone(c: Canvas, t: float) -> np.ndarray:
    x, y = c.turned(0.5)
    dots = np.hypot((x * 6) % 1 - 0.5, (y * 6) % 1 - 0.5)
    return c.colour(dots < 0.15 + 0.3 * _wave(2 * x - 2 * t))


def _spiral(c: Canvas, t: float) -> np.ndarray:
    return c.colour(_wave(3 * np.arctan2(c.y, c.x) + 10 * np.log(np.hypot(c.x, c.y) + 0.05) - 4 * t) ** 3)


def _rain(c: Canvas, t: float) -> np.ndarray:
    lanes = np.floor((c.x + 0.25 * c.y) * 28).astype(int) % 97
    fall = (c.y * 0.5 - (0.6 + c.random(97, stream=1)[lanes]) * t + c.random(97)[lanes]) % 1
    return c.colour(np.where(fall > 0.75, (fall - 0.75) * 4, 0.1 + 0.1 * c.y))


def _metaballs(c: Canvas, t: float) -> np.ndarray:
    glow = np.zeros_like(c.x)
    for a, b, speed in c.random(7, 3):
        x, y = 0.9 * np.sin(6 * a + t * (0.4 + speed)), 0.7 * np.cos(6 * b + t * (0.6 + speed))
        glow += 0.05 / ((c.x - x) ** 2 + (c.y - y) ** 2 + 0.01)
    return c.colour(np.floor(np.clip(glow - 0.2, 0, 1) * 5) / 5)


def _bricks(c: Canvas, t: float) -> np.ndarray:
    row = np.floor(c.y * 5)
    across = c.x * 2.5 + 0.5 * (row % 2) + 0.6 * t
    mortar = ((c.y * 5) % 1 < 0.12) | (across % 1 < 0.06)
    shade = c.random(128)[(row * 17 + np.floor(across) * 5).astype(int) % 128]
    return c.colour(np.where(mortar, 1, 0.1 + 0.5 * shade + 0.1 * c.noise(40)))


def _tunnel(c: Canvas, t: float) -> np.ndarray:
    radius = np.hypot(c.x, c.y) + 0.02
    tiles = (np.floor(2 / radius + 3 * t) + np.floor(np.arctan2(c.y, c.x) * (5 / np.pi) + t)) % 2
    return c.colour((0.3 + 0.7 * tiles) * np.clip(radius * 1.4, 0, 1))


def _mountains(c: Canvas, t: float) -> np.ndarray:
    picture = c.colour(0.9 - 0.15 * c.y)
    for layer in range(4):
        along = c.x[0] * (1.5 + layer) + t * (0.15 + 0.25 * layer) + 7 * layer
        ridge = 0.35 * layer - 0.5 + 0.2 * np.sin(along) + 0.09 * np.sin(2.7 * along) + 0.03 * np.sin(11 * along)
        picture[c.y > ridge] = c.colour(0.6 - 0.2 * layer)
    return picture


def _confetti(c: Canvas, t: float) -> np.ndarray:
    picture = c.colour(np.zeros_like(c.x))
    for x, y, fall, shade in c.random(90, 4):
        column = int(x * c.width_px)
        row = int(((y + t * (0.05 + 0.15 * fall)) % 1.1 - 0.05) * c.height_px)
        wide, high = 6 + int(12 * fall), 4 + int(10 * abs(np.sin(3 * t + 9 * shade)))
        picture[max(row, 0) : max(row + high, 0), column : column + wide] = c.colour(0.3 + 0.7 * shade)
    return picture


def _plaid(c: Canvas, t: float) -> np.ndarray:
    x, y = c.turned(0.15 * np.sin(t))
    across, down = ((x * 3 + 0.3 * t) % 1), ((y * 3) % 1)
    twill = 0.12 * ((np.floor(x * 40) + np.floor(y * 40)) % 2)
    return c.colour(0.35 * (across < 0.5) + 0.35 * (down < 0.5) + 0.3 * ((across < 0.08) | (down < 0.08)) + twill)


def _mosaic(c: Canvas, t: float) -> np.ndarray:
    tiles = c.random(40, 40)[np.floor(c.y * 7).astype(int) % 40, np.floor(c.x * 7).astype(int) % 40]
    return c.colour(_wave(6 * tiles + (0.5 + 2 * tiles) * t))


def _ribbon(c: Canvas, t: float) -> np.ndarray:
    picture = c.colour(0.1 + 0.1 * c.x)
    for strand in range(9):
        middle = 0.6 * np.sin(2 * c.x + t + 0.35 * strand) * np.cos(0.7 * t + 0.2 * strand)
        picture[np.abs(c.y - middle) < 0.035] = c.colour(0.3 + 0.08 * strand)
    return picture


def _julia(c: Canvas, t: float) -> np.ndarray:
    z = (c.x + 1j * c.y).astype(np.complex64) * np.complex64(1.3)
    steps = np.zeros_like(c.x)
    for _ in range(18):
        z = z * z + np.complex64(-0.76 + 0.08 * np.sin(t / 2) + 0.14j)
        inside = np.abs(z) < 2
        steps += inside
        z[~inside] = 3
    return c.colour(steps / 18)


def _sunset(c: Canvas, t: float) -> np.ndarray:
    height = -0.4 + 0.05 * t
    sky = 0.45 + 0.3 * c.y
    picture = c.colour(np.where(c.y > 0.45, 0.12 + 0.08 * _wave(60 * c.y + 4 * np.sin(6 * c.x + 2 * t)), sky))
    picture[(np.hypot(c.x, c.y - height) < 0.38) & (c.y < 0.45)] = c.colour(1)
    return picture


def _radar(c: Canvas, t: float) -> np.ndarray:
    radius = np.hypot(c.x, c.y)
    sweep = ((np.arctan2(c.y, c.x) / (2 * np.pi) - t / 4) % 1) ** 3
    grid = (np.abs((radius * 4) % 1 - 0.5) < 0.04) | (np.abs(c.x) < 0.012) | (np.abs(c.y) < 0.012)
    return c.colour(np.where(radius < 0.97, 0.55 * sweep + 0.45 * grid, 0.05))


def _triangles(c: Canvas, t: float) -> np.ndarray:
    x, y = c.turned(0.1 * t)
    parts = [np.floor(4 * (x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)))) for a in (0.0, 2.0944, 4.1888)]
    return c.colour(c.random(61)[(parts[0] * 7 + parts[1] * 13 + parts[2] * 29).astype(int) % 61])


SCENES: dict[str, Callable[[Canvas, float], np.ndarray]] = {
    scene.__name__[1:]: scene
    for scene in (
        _plasma, _pinwheel, _balls, _checkerboard, _rings, _clouds, _stars, _stripes, _voronoi, _sea, _fire, _halftone,
        _spiral, _rain, _metaballs, _bricks, _tunnel, _mountains, _confetti, _plaid, _mosaic, _ribbon, _julia, _sunset,
        _radar, _triangles,
    )
}  # fmt: skip

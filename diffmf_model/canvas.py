"""A canvas that paints one scene for two cameras, a colour one and a thermal one, through the same pinhole.

Both pictures come from one geometry, so they are registered by construction.
"""

from collections.abc import Callable
from copy import copy

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 3


class Canvas:
    """A visible (H, W, 3) and a thermal (H, W) picture under construction, in a pinhole view over flat ground.

    World coordinates in metres: X to the right, Y up from the ground, Z away from the camera. Light is kept apart from
    the visible colour, as a factor (H, W, 3); glow (H, W, 3) is light that the lens adds on top of all surfaces.
    Temperatures run from 0, cold sky, to 1, the hottest engine.
    """

    def __init__(
        self,
        size: tuple[int, int],
        rng: np.random.Generator,
        eye: float = 1.7,
        horizon: float = 0.46,
        grain: float = 0.010,
    ):
        self.size, self.rng, self.eye, self.grain = size, rng, eye, grain
        width, height = (SUPERSAMPLING * n for n in size)
        self.focal, self.cx, self.cy = 0.95 * width, width / 2, horizon * height
        self.y, self.x = np.mgrid[:height, :width].astype(np.float32) + 0.5
        self.visible = np.zeros((height, width, 3), np.float32)
        self.light = np.ones((height, width, 3), np.float32)
        self.glow = np.zeros((height, width, 3), np.float32)
        self.thermal = np.zeros((height, width), np.float32)
        self.part = np.s_[:, :]  # the rows and columns of the whole picture that this canvas shows
        self.table = rng.random((256, 256), dtype=np.float32)

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        return self.cx + self.focal * x / z, self.cy - self.focal * (y - self.eye) / z

    def ground(self) -> tuple[np.ndarray, np.ndarray]:
        """X and Z of the ground under each pixel; above the horizon they are far away."""
        z = self.focal * self.eye / np.maximum(self.y - self.cy, 0.5)
        return (self.x - self.cx) * z / self.focal, z

    def side_plane(self, x: float) -> tuple[np.ndarray, np.ndarray]:
        """Y and Z of the vertical plane X = x, parallel to the view axis, behind each pixel."""
        z = self.focal * x / np.where(np.abs(self.x - self.cx) < 0.5, 0.5, self.x - self.cx)
        return self.eye - (self.y - self.cy) * z / self.focal, z

    def front_plane(self, z: float) -> tuple[np.ndarray, np.ndarray]:
        """X and Y of the vertical plane Z = z, across the view axis, behind each pixel."""
        return (self.x - self.cx) * z / self.focal, self.eye - (self.y - self.cy) * z / self.focal

    def noise(self, u, v, octaves: int = 5, footprint=0.0) -> np.ndarray:
        """Fractal value noise around 0, mostly within ±0.5. Octaves finer than footprint (u, v a pixel) fade out."""
        total, norm = np.float32(0), 0.0
        for octave in range(octaves):
            frequency, weight = 2.0**octave, 0.6**octave
            s, t = u * frequency + 37.1 * octave, v * frequency + 71.7 * octave
            i, j = np.floor(s).astype(np.int64), np.floor(t).astype(np.int64)
            a, b = (w * w * (3 - 2 * w) for w in (s - i, t - j))
            i0, i1, j0, j1 = i % 256, (i + 1) % 256, j % 256, (j + 1) % 256
            top = self.table[i0, j0] * (1 - b) + self.table[i0, j1] * b
            bottom = self.table[i1, j0] * (1 - b) + self.table[i1, j1] * b
            fade = np.clip(2 - 4 * frequency * footprint, 0, 1)
            total = total + weight * fade * (top * (1 - a) + bottom * a - 0.5)
            norm += weight
        return (2.2 * total / norm).astype(np.float32)

    def draw(self, painter: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
        """The coverage (H, W) of what `painter` draws in white."""
        image = Image.new("L", [SUPERSAMPLING * n for n in self.size])
        painter(ImageDraw.Draw(image))
        return np.asarray(image)[self.part].astype(np.float32) / 255

    def polygons(self, *outlines: list[tuple[float, float, float]]) -> np.ndarray:
        """The coverage (H, W) of polygons with corners X, Y, Z in the world."""

        def painter(d: ImageDraw.ImageDraw) -> None:
            for outline in outlines:
                d.polygon([self.project(*corner) for corner in outline], fill=255)

        return self.draw(painter)

    def paint(self, mask, colour=None, heat=None, light=None) -> None:
        """Blends a colour, a temperature and an illumination in, where the mask is; each may vary by pixel."""
        layers = ((self.visible, colour, True), (self.light, light, True), (self.thermal, heat, False))
        for layer, value, has_channels in layers:
            if value is not None:
                m = mask[..., None] if has_channels else mask
                layer += m * (np.asarray(value, np.float32) - layer)

    def develop(self) -> tuple[np.ndarray, np.ndarray]:
        """The two sensors: optics, noise, quantization."""
        visible = _shrink(np.clip(self.visible, 0, 1) * self.light + self.glow)
        visible = np.clip(visible, 0, None) / (1 + np.clip(visible - 0.75, 0, None))  # soft highlights
        visible += self.rng.normal(0, self.grain, visible.shape)
        visible += self.rng.normal(0, 0.6 * self.grain, visible.shape[:2])[..., None]
        thermal = _blur(_shrink(self.thermal[..., None])[..., 0], 0.9)
        thermal = 0.9 * thermal + 0.1 * _blur(thermal, 6)  # hot bodies bloom a little
        thermal += self.rng.normal(0, 0.012, thermal.shape) + self.rng.normal(0, 0.004, thermal.shape[1])
        return tuple((np.clip(picture, 0, 1) * 255).round().astype(np.uint8) for picture in (thermal, visible))


class AerialCanvas(Canvas):
    """The view straight down from `eye` metres: X to the right and Z up the picture, turned by `heading` radians."""

    def __init__(
        self,
        size: tuple[int, int],
        rng: np.random.Generator,
        eye: float = 69.0,
        heading: float = 0.0,
        grain: float = 0.0022,
    ):
        super().__init__(size, rng, eye, horizon=0.5, grain=grain)
        self.focal = 1.25 * self.x.shape[1]
        self.turn = np.cos(heading), np.sin(heading)

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        cos, sin = self.turn
        scale = self.focal / (self.eye - y)
        return self.cx + scale * (cos * x - sin * z), self.cy - scale * (sin * x + cos * z)

    def ground(self, y: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """X and Z of what each pixel sees at height y."""
        cos, sin = self.turn
        right, up = ((w * (self.eye - y) / self.focal) for w in (self.x - self.cx, self.cy - self.y))
        return cos * right + sin * up, cos * up - sin * right

    def window(self, x: float, z: float, radius: float) -> "AerialCanvas":
        """The part around X, Z as a canvas that paints into this one: what is small is painted faster on it."""
        (px, py), reach = self.project(x, 0, z), radius * self.focal / self.eye
        rows, columns = (slice(*(max(0, int(p + d)) for d in (-reach, reach + 1))) for p in (py, px))
        window = copy(self)
        window.part = rows, columns
        for name in ("x", "y", "visible", "light", "glow", "thermal"):
            setattr(window, name, getattr(self, name)[rows, columns])
        return window


def _shrink(image: np.ndarray) -> np.ndarray:
    height, width, channels = image.shape
    s = SUPERSAMPLING
    return image.reshape(height // s, s, width // s, s, channels).mean(axis=(1, 3))


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    radius = int(3 * sigma + 1)
    window = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    window /= window.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        image = np.apply_along_axis(np.convolve, axis, padded, window, "valid")
    return image


def smooth(value, low: float, high: float) -> np.ndarray:
    """0 at low, 1 at high, smooth in between and flat beyond."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def rgb(r: float, g: float, b: float) -> np.ndarray:
    """A colour, or a light's factors."""
    return np.array((r, g, b), np.float32)

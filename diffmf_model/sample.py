"""Renders the bundled sample pair: a street at dusk, seen by a colour camera and by a thermal one of the same view.

`python -m diffmf_model.sample DIR` writes sample_ir.png and sample_vi.png. A scene is a function that paints a Canvas;
SCENES lists them. Sizes are in metres, temperatures run from 0, cold sky, to 1, the hottest engine.
"""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .canvas import Canvas, rgb, smooth


def render(scene: str = "street", seed: int = 7, size: tuple[int, int] = (480, 360)) -> tuple[np.ndarray, np.ndarray]:
    """The infrared (H, W) and the visible (H, W, 3) picture of a scene, uint8. size: width, height in pixels."""
    canvas = Canvas(size, np.random.default_rng(seed))
    SCENES[scene](canvas)
    return canvas.develop()


LAMP = (-2.9, 4.6, 13.0)  # the street lamp's head


def street(c: Canvas) -> None:
    """Dusk: a lit road and trees on the left; on the right, in the dark of a house, a parked car and a person."""
    _sky(c)
    _ground(c)
    _wall(c, x=4.6, near=6.5, far=24.0, height=7.2)
    for x, z, size in ((-7.6, 30, 5.2), (-6.4, 21, 4.4), (-5.9, 12.5, 3.8)):
        _tree(c, x, z, size)
    _lamp(c)
    _person(c, -1.35, 17.0, 1.72, light=rgb(0.95, 0.8, 0.55), coat=rgb(0.35, 0.33, 0.42), stride=0.7)
    _car(c, 2.75, 12.0)
    _person(c, 3.35, 7.6, 1.78, light=rgb(0.11, 0.115, 0.15), coat=rgb(0.30, 0.27, 0.25), stride=-0.9)


def _sky(c: Canvas) -> None:
    height = np.clip((c.cy - c.y) / c.cy, 0, 1)
    glow = np.exp(-4.5 * height)[..., None]
    clouds = smooth(c.noise(c.x / c.cx * 2.2, (1.15 - height) ** 2 * 9, 6), -0.05, 0.45) * (0.3 + 0.7 * height)
    colour = rgb(0.20, 0.28, 0.45) * (1 - glow) + rgb(0.93, 0.63, 0.42) * glow
    colour = colour + clouds[..., None] * (rgb(0.30, 0.20, 0.20) + 0.25 * glow)
    everywhere = np.ones_like(c.y)
    c.paint(everywhere, colour, 0.06 + 0.10 * glow[..., 0] + 0.05 * clouds)
    skyline = c.cy - c.focal * (0.020 + 0.030 * (c.noise(c.x / c.cx * 6, 3.0, 6) + 0.5))
    leaves = c.noise(c.x / c.cx * 60, c.y / c.cx * 60, 3)
    c.paint(smooth(c.y - skyline, 0, 3), rgb(0.13, 0.15, 0.16) * (1 + 0.4 * leaves[..., None]), 0.24 + 0.02 * leaves)


def _ground(c: Canvas) -> None:
    x, z = c.ground()
    below = (c.y > c.cy).astype(np.float32)
    footprint = z * z / (c.focal * c.eye) * 0.5 + z / c.focal
    coarse, fine = c.noise(x * 0.6, z * 0.6, 5, footprint * 0.6), c.noise(x * 14, z * 14, 4, footprint * 14)
    blades = c.noise(x * 30, z * 9, 4, footprint * 20)
    grass = rgb(0.27, 0.33, 0.17) * (1 + 0.6 * coarse + 1.1 * blades)[..., None]
    c.paint(below, grass, 0.27 + 0.05 * coarse + 0.02 * blades)
    road = smooth(x, -3.05, -2.95) * below
    tracks = np.exp(-(((np.abs(x + 0.3) - 0.8) / 0.3) ** 2))
    asphalt = rgb(0.40, 0.40, 0.42) * (1 + 0.25 * coarse + 0.34 * fine - 0.12 * tracks)[..., None]
    c.paint(road, asphalt, 0.42 + 0.05 * coarse + 0.015 * fine + 0.03 * tracks)
    dashes = road * smooth(0.07 - np.abs(x + 0.3), 0, 0.02) * ((z % 4.5) < 2.4) * (0.8 + 0.3 * fine)
    c.paint(np.clip(dashes, 0, 1), rgb(0.88, 0.86, 0.78), 0.40)
    pavement = smooth(x, 3.02, 3.06) * below
    joints = np.maximum(smooth(np.abs(x % 0.8 - 0.4), 0.375, 0.4), smooth(np.abs(z % 0.8 - 0.4), 0.37, 0.4))
    slabs = rgb(0.52, 0.50, 0.47) * (1 + 0.25 * coarse + 0.3 * fine - 0.45 * joints)[..., None]
    c.paint(pavement, slabs, 0.38 + 0.03 * coarse - 0.02 * joints)
    for kerb in (-3.0, 3.0):
        c.paint(below * smooth(0.09 - np.abs(x - kerb), 0, 0.02), rgb(0.62, 0.61, 0.58), 0.36)
    shadow = smooth(x, 0.4, 3.2) * smooth(z, 38, 22)
    dusk = rgb(0.60, 0.61, 0.72) * (1 - 0.82 * shadow)[..., None]
    distance = ((x - LAMP[0]) ** 2 + (z - LAMP[2]) ** 2) / LAMP[1] ** 2
    c.paint(below, light=dusk + rgb(1.25, 0.95, 0.55) / (1 + distance[..., None]) ** 2 * 1.1)


def _wall(c: Canvas, x: float, near: float, far: float, height: float) -> None:
    y, z = c.side_plane(x)
    wall = ((z > near) & (z < far) & (y > 0) & (y < height)).astype(np.float32)
    row = np.floor(y / 0.16)
    along = z / 0.42 + 0.5 * (row % 2)
    footprint = z * z / (c.focal * x)
    joint = np.maximum(smooth(np.abs(y / 0.16 % 1 - 0.5), 0.40, 0.48), smooth(np.abs(along % 1 - 0.5), 0.44, 0.49))
    joint = joint * np.clip(1.6 - footprint * 8, 0.15, 1)
    brick = c.noise(np.floor(along) * 7.3, row * 5.1, 1) * np.clip(1.5 - footprint * 5, 0.1, 1)
    stain = c.noise(z * 0.5, y * 0.5, 5, footprint * 0.5)
    colour = rgb(0.52, 0.29, 0.22) * (1 + 0.45 * brick + 0.4 * stain)[..., None]
    colour = colour + joint[..., None] * (rgb(0.55, 0.52, 0.48) - colour)
    shade = (0.22 + 0.30 * smooth(y, 1.0, height))[..., None] * rgb(0.85, 0.9, 1.1)
    c.paint(wall, colour, 0.34 + 0.04 * stain + 0.05 * smooth(y, height, 0) - 0.015 * joint, shade)
    c.paint(wall * (y > height - 0.35), rgb(0.50, 0.48, 0.46), 0.30)
    for floor, sill in enumerate((1.1, 4.3)):
        for index, start in enumerate(np.arange(near + 0.9, far - 1.8, 3.1)):
            lit = (floor, index) in ((1, 1), (0, 3), (1, 4))
            s, t = (z - start) / 1.5, (y - sill) / 1.7
            frame = wall * (s > -0.08) * (s < 1.08) * (t > -0.07) * (t < 1.06)
            c.paint(frame, rgb(0.72, 0.70, 0.66), 0.36)
            pane = wall * (s > 0) * (s < 1) * (t > 0) * (t < 1) * (np.abs(s - 0.5) > 0.03) * (np.abs(t - 0.62) > 0.025)
            if lit:
                curtain = 0.8 + 0.2 * np.sin(s * 40) * (np.abs(s - 0.5) > 0.28)
                c.paint(pane, rgb(1.0, 0.78, 0.42) * (curtain - 0.25 * t)[..., None], 0.50, rgb(1, 1, 1) * 1.05)
            else:
                c.paint(pane, rgb(0.20, 0.24, 0.32) * (0.7 + 0.7 * t)[..., None], 0.17 + 0.04 * t)


def _tree(c: Canvas, x: float, z: float, size: float) -> None:
    px, foot = c.project(x, 0, z)
    scale = c.focal / z
    u, v = (c.x - px) / scale, (foot - c.y) / scale
    lean = 0.12 * np.sin(v * 1.3 + x)
    trunk = smooth(0.16 + 0.05 * np.exp(-v * 3) - np.abs(u - lean), 0, 0.03) * (v > 0) * (v < size)
    bark = c.noise(u * 18, v * 4, 4)
    dark = rgb(0.62, 0.55, 0.50)
    c.paint(trunk, rgb(0.28, 0.21, 0.16) * (1 + 0.8 * bark)[..., None], 0.33 + 0.02 * bark, dark)
    r = np.hypot(u / (0.50 * size), (v - 0.95 * size) / (0.48 * size))
    clumps, leaves = c.noise(u * 1.3 + x, v * 1.3, 3), c.noise(u * 7 + x, v * 7, 5)
    crown = smooth(1.0 - r + 0.55 * clumps + 0.50 * leaves, 0.05, 0.22)
    lamp_side = np.exp(-((x + u - LAMP[0]) ** 2 + (v - LAMP[1]) ** 2) / 7) * np.exp(-((z - LAMP[2]) ** 2) / 60)
    colour = rgb(0.25, 0.30, 0.16) * (1 + 0.9 * clumps + 1.3 * leaves)[..., None]
    light = (0.50 + 0.35 * smooth(v, 0.5 * size, 1.5 * size))[..., None] * dark * 1.3
    c.paint(crown, colour, 0.30 + 0.03 * clumps + 0.03 * leaves, light + lamp_side[..., None] * rgb(1.05, 0.80, 0.46))


def _lamp(c: Canvas) -> None:
    x, y, z = LAMP
    (px, foot), (_, top), (arm, _) = c.project(x - 0.5, 0, z), c.project(x, y, z), c.project(x, y, z)
    width = int(0.11 * c.focal / z)
    post = c.draw(lambda d: d.line([(px, foot), (px, top), (arm, top)], fill=255, width=width, joint="curve"))
    c.paint(post, rgb(0.16, 0.17, 0.19), 0.33, rgb(0.8, 0.75, 0.7))
    r = np.hypot(c.x - arm, c.y - top - width) * z / c.focal
    c.visible += np.exp(-r / 0.45)[..., None] * rgb(0.75, 0.55, 0.28) + np.exp(-((r / 0.16) ** 2))[..., None] * 1.5
    c.light += (np.exp(-r / 0.5)[..., None] * 0.6).astype(np.float32)
    c.paint(np.exp(-((r / 0.17) ** 2)), heat=0.72)


def _car(c: Canvas, x: float, z: float) -> None:
    """Seen from the front, its engine still hot."""

    def shape(points: list[tuple[float, float]], mirrored: bool = True) -> np.ndarray:
        outline = points + [(-u, v) for u, v in reversed(points)] if mirrored else points
        return c.draw(lambda d: d.polygon([c.project(x + u, v, z) for u, v in outline], fill=255))

    def disc(u: float, v: float, a: float, b: float) -> np.ndarray:
        (left, low), (right, high) = c.project(x + u - a, v - b, z), c.project(x + u + a, v + b, z)
        return c.draw(lambda d: d.ellipse((left, high, right, low), fill=255))

    light = rgb(0.16, 0.165, 0.21)
    gx, gz = c.ground()
    under = np.exp(-(((gx - x) / 0.95) ** 6) - ((gz - z - 0.6) / 1.0) ** 4) * (c.y > c.cy)
    c.light *= 1 - 0.85 * under[..., None]
    c.paint(0.5 * under, heat=0.62)
    for side in (-0.68, 0.68):
        tyre = [(side - 0.14, 0), (side + 0.14, 0), (side + 0.14, 0.45), (side - 0.14, 0.45)]
        c.paint(shape(tyre, mirrored=False), rgb(0.12, 0.12, 0.12), 0.60, light)
    body = [
        (0.0, 0.22),
        (0.86, 0.22),
        (0.92, 0.40),
        (0.91, 0.72),
        (0.84, 0.92),
        (0.66, 1.46),
        (0.52, 1.53),
        (0.0, 1.55),
    ]
    height = (c.cy + c.focal * c.eye / z - c.y) * z / c.focal
    across = np.abs((c.x - c.cx) * z / c.focal - x)
    engine = np.exp(-(((height - 0.66) / 0.26) ** 2) - (across / 0.72) ** 4)
    gloss = (0.75 + 0.5 * smooth(height, 0.3, 1.0) - 0.25 * smooth(height, 0.95, 1.0))[..., None]
    c.paint(shape(body), rgb(0.42, 0.10, 0.10) * gloss, 0.40 + 0.42 * engine, light)
    glass = [(0.0, 0.98), (0.72, 0.96), (0.57, 1.42), (0.0, 1.45)]
    c.paint(
        shape(glass), rgb(0.16, 0.19, 0.24) * (0.6 + height[..., None]), 0.20 + 0.06 * smooth(height, 1.4, 1.0), light
    )
    grille = [(0.0, 0.44), (0.44, 0.44), (0.48, 0.66), (0.0, 0.68)]
    slats = 0.5 + 0.5 * np.sin(height * 130)
    c.paint(shape(grille), rgb(0.20, 0.20, 0.21) * (0.4 + slats[..., None]), 0.92 - 0.08 * slats, light)
    for side in (-1, 1):
        c.paint(disc(side * 0.68, 0.66, 0.16, 0.10), rgb(0.85, 0.86, 0.88), 0.55, light * 1.3)
        c.paint(disc(side * 0.98, 1.02, 0.10, 0.07), rgb(0.30, 0.08, 0.08), 0.34, light)
    plate = [(0.0, 0.29), (0.26, 0.29), (0.26, 0.40), (0.0, 0.40)]
    c.paint(shape(plate), rgb(0.85, 0.85, 0.78), 0.50, light)


def _person(c: Canvas, x: float, z: float, height: float, light: np.ndarray, coat: np.ndarray, stride: float) -> None:
    """Walking across the view; stride is the legs' spread and sense."""

    def limbs(*chains: list[tuple[float, float, float]]) -> np.ndarray:
        def painter(d: ImageDraw.ImageDraw) -> None:
            for chain in chains:
                for (u0, v0, r0), (u1, v1, r1) in pairwise(chain):
                    for t in np.linspace(0, 1, 40):
                        px, py = c.project(x + height * (u0 + t * (u1 - u0)), height * (v0 + t * (v1 - v0)), z)
                        r = (r0 + t * (r1 - r0)) * height * c.focal / z
                        d.ellipse((px - r, py - r, px + r, py + r), fill=255)

        return c.draw(painter)

    s = stride * 0.11
    gx, gz = c.ground()
    c.light *= 1 - 0.6 * (np.exp(-(((gx - x) / 0.35) ** 2) - ((gz - z) / 0.3) ** 2) * (c.y > c.cy))[..., None]
    folds = c.noise(c.x * z / c.focal * 9, c.y * z / c.focal * 4, 4)
    legs = limbs(
        [(0, 0.50, 0.058), (s * 0.9, 0.27, 0.042), (s, 0.04, 0.026), (s + 0.25 * s, 0.018, 0.018)],
        [(0, 0.50, 0.058), (-s * 0.5, 0.27, 0.042), (-s * 1.3, 0.05, 0.026), (-s * 1.1, 0.018, 0.018)],
    )
    c.paint(legs, rgb(0.22, 0.23, 0.30) * (1 + 0.5 * folds)[..., None], 0.70 + 0.05 * folds, light)
    torso = limbs([(0, 0.50, 0.070), (0.008, 0.62, 0.068), (0.01, 0.74, 0.082), (0.01, 0.80, 0.058)])
    arms = limbs(
        [(0.01, 0.79, 0.036), (-s * 0.8, 0.63, 0.030), (-s * 0.6, 0.50, 0.024)],
        [(0.01, 0.79, 0.036), (s * 0.7, 0.63, 0.030), (s * 1.3, 0.52, 0.024)],
    )
    cloth = coat * (1 + 0.6 * folds)[..., None]
    c.paint(torso, cloth, 0.78 + 0.06 * folds, light)
    c.paint(arms, cloth * 0.85, 0.74 + 0.05 * folds, light)
    skin = limbs([(-s * 0.6, 0.49, 0.020), (-s * 0.5, 0.47, 0.020)], [(s * 1.35, 0.515, 0.020), (s * 1.4, 0.50, 0.020)])
    head = limbs([(0.01, 0.84, 0.030), (0.012, 0.90, 0.056), (0.014, 0.93, 0.058)])
    c.paint(np.maximum(skin, head), rgb(0.72, 0.54, 0.44), 0.97, light)
    c.paint(limbs([(0.0, 0.955, 0.050), (-0.012 * np.sign(s), 0.935, 0.052)]), rgb(0.14, 0.11, 0.09), 0.84, light)


SCENES = {"street": street}


def write_sample(folder: Path) -> None:
    """Writes the bundled pair as PNG files."""
    for name, picture in zip(("ir", "vi"), render(), strict=True):
        Image.fromarray(picture).save(folder / f"sample_{name}.png", optimize=True)


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))

"""What stands in a street, painted for both cameras: sky, ground, houses, trees, lamps, cars, people, smoke and fire.

Positions are in metres as in canvas.py. Each function paints over what is there already, so scenes paint from far to
near. `light` is what falls on a thing; where a function has no such argument, the scene lights the ground itself.
"""

from collections.abc import Callable, Collection, Iterable
from itertools import pairwise

import numpy as np
from PIL import ImageDraw

from .canvas import Canvas, rgb, smooth

Point = tuple[float, float, float]
SODIUM = rgb(1.25, 0.95, 0.55)  # a street lamp's light


def sky(
    c: Canvas,
    zenith: np.ndarray,
    horizon: np.ndarray,
    clouds: np.ndarray,
    forest: np.ndarray,
    cover: tuple[float, float] = (-0.05, 0.45),
    lining: float = 0.25,
    warmth: float = 0.06,
) -> None:
    """A sky from zenith's to horizon's colour, under clouds that add theirs, over a distant forest.

    cover: the cloud noise at which clouds begin and are full; lining: what they add near the horizon; warmth: the
    thermal camera's clear sky.
    """
    height = np.clip((c.cy - c.y) / c.cy, 0, 1)
    glow = np.exp(-4.5 * height)[..., None]
    amount = smooth(c.noise(c.x / c.cx * 2.2, (1.15 - height) ** 2 * 9, 6), *cover) * (0.3 + 0.7 * height)
    colour = zenith * (1 - glow) + horizon * glow
    colour = colour + amount[..., None] * (clouds + lining * glow)
    everywhere = np.ones_like(c.y)
    c.paint(everywhere, colour, warmth + 0.10 * glow[..., 0] + 0.05 * amount)
    skyline = c.cy - c.focal * (0.020 + 0.030 * (c.noise(c.x / c.cx * 6, 3.0, 6) + 0.5))
    leaves = c.noise(c.x / c.cx * 60, c.y / c.cx * 60, 3)
    c.paint(smooth(c.y - skyline, 0, 3), forest * (1 + 0.4 * leaves[..., None]), 0.24 + 0.02 * leaves)


def ground(c: Canvas, grass: np.ndarray, asphalt: np.ndarray, slabs: np.ndarray) -> None:
    """A meadow, a road with a dashed line from X = -3 to 3, and a pavement to its right; the scene lights them."""
    x, z = c.ground()
    below = below_horizon(c)
    footprint = z * z / (c.focal * c.eye) * 0.5 + z / c.focal
    coarse, fine = c.noise(x * 0.6, z * 0.6, 5, footprint * 0.6), c.noise(x * 14, z * 14, 4, footprint * 14)
    blades = c.noise(x * 30, z * 9, 4, footprint * 20)
    grass = grass * (1 + 0.6 * coarse + 1.1 * blades)[..., None]
    c.paint(below, grass, 0.27 + 0.05 * coarse + 0.02 * blades)
    road = smooth(x, -3.05, -2.95) * below
    tracks = np.exp(-(((np.abs(x + 0.3) - 0.8) / 0.3) ** 2))
    asphalt = asphalt * (1 + 0.25 * coarse + 0.34 * fine - 0.12 * tracks)[..., None]
    c.paint(road, asphalt, 0.42 + 0.05 * coarse + 0.015 * fine + 0.03 * tracks)
    dashes = road * smooth(0.07 - np.abs(x + 0.3), 0, 0.02) * ((z % 4.5) < 2.4) * (0.8 + 0.3 * fine)
    c.paint(np.clip(dashes, 0, 1), rgb(0.88, 0.86, 0.78), 0.40)
    pavement = smooth(x, 3.02, 3.06) * below
    joints = np.maximum(smooth(np.abs(x % 0.8 - 0.4), 0.375, 0.4), smooth(np.abs(z % 0.8 - 0.4), 0.37, 0.4))
    slabs = slabs * (1 + 0.25 * coarse + 0.3 * fine - 0.45 * joints)[..., None]
    c.paint(pavement, slabs, 0.38 + 0.03 * coarse - 0.02 * joints)
    for kerb in (-3.0, 3.0):
        c.paint(below * smooth(0.09 - np.abs(x - kerb), 0, 0.02), rgb(0.62, 0.61, 0.58), 0.36)


def below_horizon(c: Canvas) -> np.ndarray:
    return (c.y > c.cy).astype(np.float32)


def lamplight(x, z, lamp: Point) -> np.ndarray:
    """The light of a street lamp at X, Z, as a factor (..., 3)."""
    distance = ((x - lamp[0]) ** 2 + (z - lamp[2]) ** 2) / lamp[1] ** 2
    return SODIUM / (1 + distance[..., None]) ** 2 * 1.1


def wall(
    c: Canvas,
    x: float,
    near: float,
    far: float,
    height: float,
    lit: Collection[tuple[int, int]],
    light: Callable[[np.ndarray, np.ndarray], np.ndarray],
    brick: np.ndarray,
    sills: tuple[float, ...] = (1.1, 4.3),
) -> None:
    """A brick front along the road. lit: floor and number of lit windows; light(Y, Z) falls on it."""
    y, z = c.side_plane(x)
    front = ((z > near) & (z < far) & (y > 0) & (y < height)).astype(np.float32)
    row = np.floor(y / 0.16)
    along = z / 0.42 + 0.5 * (row % 2)
    footprint = z * z / (c.focal * abs(x))
    joint = np.maximum(smooth(np.abs(y / 0.16 % 1 - 0.5), 0.40, 0.48), smooth(np.abs(along % 1 - 0.5), 0.44, 0.49))
    joint = joint * np.clip(1.6 - footprint * 8, 0.15, 1)
    shades = c.noise(np.floor(along) * 7.3, row * 5.1, 1) * np.clip(1.5 - footprint * 5, 0.1, 1)
    stain = c.noise(z * 0.5, y * 0.5, 5, footprint * 0.5)
    colour = brick * (1 + 0.45 * shades + 0.4 * stain)[..., None]
    colour = colour + joint[..., None] * (rgb(0.55, 0.52, 0.48) - colour)
    heat = 0.34 + 0.04 * stain + 0.05 * smooth(y, height, 0) - 0.015 * joint
    c.paint(front, colour, heat, light(y, z))
    c.paint(front * (y > height - 0.35), rgb(0.50, 0.48, 0.46), 0.30)
    for floor, sill in enumerate(sills):
        for index, start in enumerate(np.arange(near + 0.9, far - 1.8, 3.1)):
            s, t = (z - start) / 1.5, (y - sill) / 1.7
            frame = front * (s > -0.08) * (s < 1.08) * (t > -0.07) * (t < 1.06)
            c.paint(frame, rgb(0.72, 0.70, 0.66), 0.36)
            pane = front * (s > 0) * (s < 1) * (t > 0) * (t < 1) * (np.abs(s - 0.5) > 0.03) * (np.abs(t - 0.62) > 0.025)
            if (floor, index) in lit:
                curtain = 0.8 + 0.2 * np.sin(s * 40) * (np.abs(s - 0.5) > 0.28)
                c.paint(pane, rgb(1.0, 0.78, 0.42) * (curtain - 0.25 * t)[..., None], 0.50, rgb(1, 1, 1) * 1.05)
            else:
                c.paint(pane, rgb(0.20, 0.24, 0.32) * (0.7 + 0.7 * t)[..., None], 0.17 + 0.04 * t)


def tree(c: Canvas, x: float, z: float, size: float, light: np.ndarray, lamps: Iterable[Point] = ()) -> None:
    px, foot = c.project(x, 0, z)
    scale = c.focal / z
    u, v = (c.x - px) / scale, (foot - c.y) / scale
    lean = 0.12 * np.sin(v * 1.3 + x)
    trunk = smooth(0.16 + 0.05 * np.exp(-v * 3) - np.abs(u - lean), 0, 0.03) * (v > 0) * (v < size)
    bark = c.noise(u * 18, v * 4, 4)
    c.paint(trunk, rgb(0.28, 0.21, 0.16) * (1 + 0.8 * bark)[..., None], 0.33 + 0.02 * bark, light)
    r = np.hypot(u / (0.50 * size), (v - 0.95 * size) / (0.48 * size))
    clumps, leaves = c.noise(u * 1.3 + x, v * 1.3, 3), c.noise(u * 7 + x, v * 7, 5)
    crown = smooth(1.0 - r + 0.55 * clumps + 0.50 * leaves, 0.05, 0.22)
    colour = rgb(0.25, 0.30, 0.16) * (1 + 0.9 * clumps + 1.3 * leaves)[..., None]
    light = (0.50 + 0.35 * smooth(v, 0.5 * size, 1.5 * size))[..., None] * light * 1.3
    for lamp in lamps:
        near = np.exp(-((x + u - lamp[0]) ** 2 + (v - lamp[1]) ** 2) / 7) * np.exp(-((z - lamp[2]) ** 2) / 60)
        light = light + near[..., None] * rgb(1.05, 0.80, 0.46)
    c.paint(crown, colour, 0.30 + 0.03 * clumps + 0.03 * leaves, light)


def street_lamp(c: Canvas, lamp: Point, light: np.ndarray, reach: float = 0.5) -> None:
    """A lamp's head at X, Y, Z on its post, which stands `reach` to the left (to the right where negative)."""
    x, y, z = lamp
    (px, foot), (_, top), (arm, _) = c.project(x - reach, 0, z), c.project(x, y, z), c.project(x, y, z)
    width = int(0.11 * c.focal / z)
    post = c.draw(lambda d: d.line([(px, foot), (px, top), (arm, top)], fill=255, width=width, joint="curve"))
    c.paint(post, rgb(0.16, 0.17, 0.19), 0.33, light)
    r = np.hypot(c.x - arm, c.y - top - width) * z / c.focal
    c.visible += np.exp(-r / 0.45)[..., None] * rgb(0.75, 0.55, 0.28) + np.exp(-((r / 0.16) ** 2))[..., None] * 1.5
    c.light += (np.exp(-r / 0.5)[..., None] * 0.6).astype(np.float32)
    c.paint(np.exp(-((r / 0.17) ** 2)), heat=0.72)


def car(c: Canvas, x: float, z: float, light: np.ndarray, paint: np.ndarray, warmth: float = 1.0) -> None:
    """Seen from the front. warmth: 1 with the engine still hot, 0 when it has stood there all night."""

    def shape(points: list[tuple[float, float]], mirrored: bool = True) -> np.ndarray:
        outline = points + [(-u, v) for u, v in reversed(points)] if mirrored else points
        return c.polygons([(x + u, v, z) for u, v in outline])

    def disc(u: float, v: float, a: float, b: float) -> np.ndarray:
        (left, low), (right, high) = c.project(x + u - a, v - b, z), c.project(x + u + a, v + b, z)
        return c.draw(lambda d: d.ellipse((left, high, right, low), fill=255))

    def heat(driven, parked: float = 0.31):
        return warmth * driven + (1 - warmth) * parked

    gx, gz = c.ground()
    under = np.exp(-(((gx - x) / 0.95) ** 6) - ((gz - z - 0.6) / 1.0) ** 4) * (c.y > c.cy)
    c.light *= 1 - 0.85 * under[..., None]
    c.paint(0.5 * under, heat=heat(0.62, 0.38))
    for side in (-0.68, 0.68):
        tyre = [(side - 0.14, 0), (side + 0.14, 0), (side + 0.14, 0.45), (side - 0.14, 0.45)]
        c.paint(shape(tyre, mirrored=False), rgb(0.12, 0.12, 0.12), heat(0.60), light)
    body = [(0, 0.22), (0.86, 0.22), (0.92, 0.40), (0.91, 0.72), (0.84, 0.92), (0.66, 1.46), (0.52, 1.53), (0, 1.55)]
    height = (c.cy + c.focal * c.eye / z - c.y) * z / c.focal
    across = np.abs((c.x - c.cx) * z / c.focal - x)
    engine = np.exp(-(((height - 0.66) / 0.26) ** 2) - (across / 0.72) ** 4)
    gloss = (0.75 + 0.5 * smooth(height, 0.3, 1.0) - 0.25 * smooth(height, 0.95, 1.0))[..., None]
    c.paint(shape(body), paint * gloss, heat(0.40 + 0.42 * engine), light)
    glass = shape([(0.0, 0.98), (0.72, 0.96), (0.57, 1.42), (0.0, 1.45)])
    colour = rgb(0.16, 0.19, 0.24) * (0.6 + height[..., None])
    c.paint(glass, colour, heat(0.20 + 0.06 * smooth(height, 1.4, 1.0), 0.18), light)
    slats = 0.5 + 0.5 * np.sin(height * 130)
    grille = shape([(0.0, 0.44), (0.44, 0.44), (0.48, 0.66), (0.0, 0.68)])
    c.paint(grille, rgb(0.20, 0.20, 0.21) * (0.4 + slats[..., None]), heat(0.92 - 0.08 * slats), light)
    for side in (-1, 1):
        c.paint(disc(side * 0.68, 0.66, 0.16, 0.10), rgb(0.85, 0.86, 0.88), heat(0.55), light * 1.3)
        c.paint(disc(side * 0.98, 1.02, 0.10, 0.07), rgb(0.30, 0.08, 0.08), heat(0.34), light)
    plate = shape([(0.0, 0.29), (0.26, 0.29), (0.26, 0.40), (0.0, 0.40)])
    c.paint(plate, rgb(0.85, 0.85, 0.78), heat(0.50), light)


def beams(c: Canvas, x: float, z: float) -> None:
    """The light of oncoming headlights on the road before the car, and their mirror images in the wet asphalt."""
    gx, gz = c.ground()
    ahead = z - gz
    spread = np.exp(-(((gx - x) / (1.1 + 0.16 * np.clip(ahead, 0, None))) ** 2))
    reach = smooth(ahead, -0.3, 2.0) / (1 + np.clip(ahead, 0, None) / 7) ** 2 * below_horizon(c)
    c.light += (spread * reach)[..., None] * rgb(1.15, 1.17, 1.25)
    for side in (-0.68, 0.68):
        reflection(c, x + side, 0.66, z, 0.75 * rgb(1.0, 0.98, 0.92))


def reflection(c: Canvas, x: float, y: float, z: float, light: np.ndarray) -> None:
    """The streak in wet asphalt below a lamp at X, Y, Z."""
    gx, gz = c.ground()
    ripples = np.clip(0.70 + 1.0 * c.noise(gx * 3, gz * 3, 5) + 1.3 * c.noise(gx * 9, gz * 14, 3), 0.05, 2)
    px, py = c.project(x, -y, z)
    down = (c.y - py) / (0.12 * c.focal)
    width = c.focal * (0.006 + 0.006 * np.clip(down, 0, 3))
    length = np.where(down < 0, np.exp(-((down / 0.12) ** 2)), np.exp(-down)) * (np.abs(gx) < 3)
    c.glow += (length * np.exp(-(((c.x - px) / width) ** 2)) * ripples)[..., None] * light


def glare(c: Canvas, x: float, y: float, z: float, strength: float = 1.0) -> None:
    """A headlight that shines into the lens: it blinds the colour camera, the thermal one sees a warm lamp."""
    px, py = c.project(x, y, z)
    dx, dy = (c.x - px) / c.focal, (c.y - py) / c.focal
    r, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    rays = 0.55 * np.abs(np.cos(3 * angle + 0.4)) ** 24 + 0.30 * np.abs(np.cos(7 * angle + 1.1)) ** 16
    core = 6.0 * np.exp(-((r / 0.013) ** 2))
    halo = 1.3 / (1 + (r / 0.020) ** 2) + rays * np.exp(-r / 0.055)
    veil = 0.16 * np.exp(-r / 0.16)
    c.glow += strength * core[..., None]
    c.glow += strength * halo[..., None] * rgb(1.0, 0.97, 0.90) + strength * veil[..., None] * rgb(0.80, 0.88, 1.0)
    c.paint(np.exp(-((r * z / 0.12) ** 2)), heat=0.74)


def person(
    c: Canvas,
    x: float,
    z: float,
    height: float,
    light: np.ndarray,
    coat: np.ndarray,
    stride: float,
    trousers: np.ndarray | None = None,
    helmet: np.ndarray | None = None,
) -> None:
    """Walking across the view; stride is the legs' spread and sense. A helmet comes with reflective, thick clothes."""

    def limbs(*chains: list[Point]) -> np.ndarray:
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
    thick = 0.0 if helmet is None else 0.14  # what thick clothes keep from the thermal camera
    legs = limbs(
        [(0, 0.50, 0.058), (s * 0.9, 0.27, 0.042), (s, 0.04, 0.026), (s + 0.25 * s, 0.018, 0.018)],
        [(0, 0.50, 0.058), (-s * 0.5, 0.27, 0.042), (-s * 1.3, 0.05, 0.026), (-s * 1.1, 0.018, 0.018)],
    )
    trousers = rgb(0.22, 0.23, 0.30) if trousers is None else trousers
    c.paint(legs, trousers * (1 + 0.5 * folds)[..., None], 0.70 - thick + 0.05 * folds, light)
    torso = limbs([(0, 0.50, 0.070), (0.008, 0.62, 0.068), (0.01, 0.74, 0.082), (0.01, 0.80, 0.058)])
    arms = limbs(
        [(0.01, 0.79, 0.036), (-s * 0.8, 0.63, 0.030), (-s * 0.6, 0.50, 0.024)],
        [(0.01, 0.79, 0.036), (s * 0.7, 0.63, 0.030), (s * 1.3, 0.52, 0.024)],
    )
    cloth = coat * (1 + 0.6 * folds)[..., None]
    c.paint(torso, cloth, 0.78 - thick + 0.06 * folds, light)
    c.paint(arms, cloth * 0.85, 0.74 - thick + 0.05 * folds, light)
    if helmet is not None:
        level = (c.cy + c.focal * c.eye / z - c.y) * z / c.focal / height
        stripes = (np.abs(level - 0.60) < 0.012) | (np.abs(level - 0.70) < 0.012) | (np.abs(level - 0.14) < 0.012)
        c.paint(np.maximum(np.maximum(torso, arms), legs) * stripes, rgb(0.90, 0.92, 0.80), 0.50, light)
    skin = limbs([(-s * 0.6, 0.49, 0.020), (-s * 0.5, 0.47, 0.020)], [(s * 1.35, 0.515, 0.020), (s * 1.4, 0.50, 0.020)])
    head = limbs([(0.01, 0.84, 0.030), (0.012, 0.90, 0.056), (0.014, 0.93, 0.058)])
    c.paint(np.maximum(skin, head), rgb(0.72, 0.54, 0.44), 0.97, light)
    cap = [(0.0, 0.955, 0.050), (-0.012 * np.sign(s), 0.935, 0.052)]
    if helmet is None:
        c.paint(limbs(cap), rgb(0.14, 0.11, 0.09), 0.84, light)
    else:
        brim = [(0.014 - 0.08, 0.935, 0.010), (0.014 + 0.08, 0.935, 0.010)]
        c.paint(limbs([(u, v + 0.012, r + 0.008) for u, v, r in cap], brim), helmet, 0.52, light)


def flames(c: Canvas, x: float, z: float, width: float, height: float, base: float = 0.0) -> None:
    """A fire across X ± width / 2 that stands `base` above the ground; it lights the ground and the smoke around."""
    u, v = c.front_plane(z)
    u, v = (u - x) / (width / 2), (v - base) / height
    sway = 0.30 * c.noise(u * 1.2 + 5, v * 2.2 - 3, 3) * smooth(v, 0, 0.6)
    tongues = np.clip(1 + 2.0 * c.noise((u + sway) * 2.6, v * 0.9 + 11, 3), 0.1, None)
    top = tongues * np.clip(1 - np.abs(u + sway) ** 2.5, 0, None)
    fuel = (top - v + 0.45 * c.noise((u + sway) * 4, v * 3 + 7, 4)) * (v > -0.03) * (np.abs(u) < 1.2)
    flame, core = smooth(fuel, 0.05, 0.30), smooth(fuel, 0.20, 1.30)
    core = np.clip(core * (1 + 1.1 * c.noise((u + sway) * 5, v * 2 + 3, 4)), 0, 1)
    colour = rgb(0.95, 0.30, 0.04) + core[..., None] * rgb(0.20, 0.62, 0.42)
    c.paint(flame * (0.55 + 0.45 * core), colour, light=rgb(1.25, 1.15, 1.05))
    c.paint(flame, heat=0.86 + 0.14 * core)
    distance = np.hypot(u * width / 2, (v - 0.3) * height)
    c.glow += 0.22 * np.exp(-distance / (0.9 * width))[..., None] * rgb(1.0, 0.48, 0.14)


def smoke(
    c: Canvas, path: list[Point], z: float, density: float, seed: float, fire: Point | None = None, bright: float = 1.0
) -> None:
    """A plume in the plane Z = z along path, points (X, Y, radius). Visible light does not pass, long waves do.

    seed: where in the noise its billows lie; fire: the X, Y and reach of flames that redden it and heat its gas.
    """
    u, v = c.front_plane(z)
    swirl = c.noise(u * 0.5 + seed, v * 0.5, 2), c.noise(u * 0.5, v * 0.5 + seed, 2)
    u, v = u + 0.6 * swirl[0], v + 0.6 * swirl[1]
    body = np.full_like(u, -9.0)  # 1 on the plume's axis, 0 at its radius
    for (x0, y0, r0), (x1, y1, r1) in pairwise(path):
        t = np.clip(((u - x0) * (x1 - x0) + (v - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        distance = np.hypot(u - x0 - t * (x1 - x0), v - y0 - t * (y1 - y0))
        body = np.maximum(body, 1 - distance / (r0 + t * (r1 - r0)))

    def puffs(du: float = 0.0, dv: float = 0.0) -> np.ndarray:
        octaves = (0.48**k * np.abs(c.noise((u + du) * 0.6 * 2**k + seed, (v + dv) * 0.6 * 2**k, 1)) for k in range(5))
        return 1.4 * sum(octaves) - 0.6

    puff = puffs()
    thickness = np.clip(body + 0.60 * puff + 0.15, 0, None)
    alpha = 1 - np.exp(-density * thickness**1.5)
    relief = np.clip(0.30 * (puff - puffs(-0.20, 0.34)), -0.15, 0.15)  # lit from the upper left
    soot = 0.56 + 0.16 * puff + relief + 0.18 * smooth(v, 0, 7) + 0.22 * c.noise(u * 0.22 + seed, v * 0.22, 2)
    colour = rgb(0.80, 0.80, 0.82) * (bright * soot)[..., None]
    heat, warm = 0.30, 0.05 * alpha
    if fire is not None:
        near = np.exp(-(((u - fire[0]) / fire[2]) ** 2) - ((v - fire[1]) / fire[2]) ** 2)
        sooty = np.exp(-np.hypot(u - fire[0], v - fire[1]) / (2.2 * fire[2]))[..., None]
        colour = colour * (1 - 0.65 * sooty) + near[..., None] * rgb(0.42, 0.17, 0.04)
        heat, warm = 0.30 + 0.45 * near, alpha * (0.05 + 0.45 * near)
    c.paint(alpha, np.clip(colour, 0.02, 1), light=rgb(1, 1, 1))
    c.paint(warm, heat=heat)

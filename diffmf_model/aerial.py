"""What a drone sees from above, painted for both cameras: roads, roofs, trees, cars and people under a low sun.

Positions are X, Z in metres as in canvas.AerialCanvas, headings in radians from X to Z. The sun has warmed the ground
all day; shade, metal and standing cars are cold, engines hot. Scenes paint surfaces, then shadows, then what is tall.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .canvas import AerialCanvas, rgb, smooth

Point = tuple[float, float]
SUN, SHADE = rgb(1.20, 1.09, 0.91), rgb(0.27, 0.32, 0.44)
CAST = (1.15, -0.85)  # where the shadow of a point 1 m above the ground falls


def lawn(c: AerialCanvas) -> None:
    """Grass over the whole view, lit by the sun."""
    x, z = c.ground()
    coarse, fine = c.noise(x * 0.12, z * 0.12, 4), c.noise(x * 2.5, z * 2.5, 4)
    mown = 0.06 * np.sign(np.sin(z * 2.6 + 0.4 * np.sin(x * 0.2))) * (z < -11)
    dry = smooth(coarse, -0.05, 0.45)[..., None]
    colour = rgb(0.29, 0.37, 0.16) * (1 - dry) + rgb(0.47, 0.44, 0.24) * dry
    everywhere = np.ones_like(x)
    c.paint(everywhere, colour * (1 + 0.33 * fine + mown)[..., None], 0.33 + 0.07 * coarse + 0.05 * fine, SUN)


def road(c: AerialCanvas, start: Point, end: Point, width: float) -> None:
    """Asphalt between two points, with a dashed line in the middle and worn wheel tracks."""
    x, z = c.ground()
    along, across = _along(c, start, end)
    mask = smooth(width / 2 - np.abs(across), 0, 0.08) * (along > 0)
    coarse, fine = c.noise(x * 0.25, z * 0.25, 4), c.noise(x * 4, z * 4, 4)
    patch = smooth(c.noise(x * 0.16 + 9, z * 0.16, 1), 0.34, 0.36)
    crack = smooth(0.014 - np.abs(c.noise(x * 0.45 + 3, z * 0.45, 4)), 0, 0.008) * (coarse > 0)
    tracks = np.exp(-(((np.abs(np.abs(across) - width / 4) - 0.75) / 0.28) ** 2))
    oil = np.exp(-(((np.abs(across) - width / 4) / 0.25) ** 2))
    tone = 1 + 0.22 * coarse + 0.14 * fine - 0.22 * patch - 0.35 * crack - 0.10 * tracks - 0.07 * oil
    c.paint(
        mask, rgb(0.40, 0.40, 0.41) * tone[..., None], 0.55 + 0.05 * coarse + 0.02 * fine + 0.04 * patch + 0.03 * tracks
    )
    worn = np.clip(0.85 + 0.9 * fine, 0.2, 1)
    dash = smooth(0.09 - np.abs(across), 0, 0.03) * (along % 5 < 2.6)
    edge = smooth(0.06 - np.abs(np.abs(across) - width / 2 + 0.3), 0, 0.03)
    c.paint(mask * np.maximum(dash, edge) * worn, rgb(0.86, 0.85, 0.80), 0.49)


def pavement(c: AerialCanvas, start: Point, end: Point, width: float) -> None:
    """Slabs on both sides of a road and its kerbs."""
    along, across = _along(c, start, end)
    mask = smooth(width / 2 + 1.9 - np.abs(across), 0, 0.06) * (along > -3)
    joints = np.maximum(smooth(np.abs(along % 1 - 0.5), 0.45, 0.48), smooth(np.abs(across % 1 - 0.5), 0.45, 0.48))
    slab = c.noise(np.floor(along) * 3.7, np.floor(across) * 5.3, 1) + 0.6 * c.noise(along * 3, across * 3, 4)
    colour = rgb(0.62, 0.60, 0.56) * (1 + 0.22 * slab - 0.22 * joints)[..., None]
    c.paint(mask, colour, 0.47 + 0.03 * slab - 0.02 * joints)
    kerb = smooth(width / 2 + 0.18 - np.abs(across), 0, 0.04) * (along > 0)
    c.paint(kerb, rgb(0.74, 0.73, 0.70), 0.44)


def zebra(c: AerialCanvas, centre: Point, width: float) -> None:
    """A crossing of a road that runs along X."""
    x, z = c.ground()
    fine = c.noise(x * 4, z * 4, 4)
    bars = ((z - centre[1]) % 1.0 < 0.5) * (np.abs(x - centre[0]) < 1.6) * (np.abs(z - centre[1]) < width / 2 - 0.4)
    c.paint(bars * np.clip(0.85 + 0.8 * fine, 0.2, 1), rgb(0.88, 0.87, 0.82), 0.48)


def path(c: AerialCanvas, points: list[Point], width: float) -> None:
    """Gravel through a park."""
    x, z = c.ground()
    wobble = 0.5 * c.noise(x * 0.5, z * 0.5, 3)
    distance = np.full_like(x, np.inf)
    for start, end in pairwise(points):
        along, across = _along(c, start, end)
        beyond = np.maximum(np.maximum(-along, along - np.hypot(end[0] - start[0], end[1] - start[1])), 0)
        distance = np.minimum(distance, np.hypot(across, beyond))
    grain = c.noise(x * 5, z * 5, 4)
    mask = smooth(width / 2 - distance + wobble, -0.1, 0.15)
    c.paint(mask, rgb(0.66, 0.58, 0.45) * (1 + 0.2 * grain)[..., None], 0.46 + 0.03 * grain)


def car_park(c: AerialCanvas, low: Point, high: Point, bays: Iterable[int]) -> None:
    """Asphalt with two rows of bays 2.85 m wide along X, from corner to corner."""
    x, z = c.ground()
    mask = _rectangle(c, low, high)
    coarse, fine = c.noise(x * 0.3 + 4, z * 0.3, 4), c.noise(x * 4, z * 4, 4)
    spots = smooth(c.noise(x * 0.9 + 5, z * 0.9, 3), 0.25, 0.5)
    tone = 1 + 0.25 * coarse + 0.15 * fine - 0.25 * spots
    c.paint(mask, rgb(0.34, 0.34, 0.36) * tone[..., None], 0.57 + 0.04 * coarse + 0.02 * fine + 0.02 * spots)
    worn = np.clip(0.8 + 0.9 * fine, 0.2, 1)
    for bay in bays:
        for end in (low[1] + 0.3, high[1] - 5.4):
            for side in (0, 2.85):
                left = low[0] + 0.18 + 2.85 * bay + side
                c.paint(_rectangle(c, (left - 0.05, end), (left + 0.05, end + 5.1)) * worn, rgb(0.84, 0.83, 0.79), 0.50)


def patio(c: AerialCanvas, low: Point, high: Point) -> None:
    x, z = c.ground()
    joint = np.maximum(smooth(np.abs(x % 0.6 - 0.3), 0.26, 0.29), smooth(np.abs(z % 0.6 - 0.3), 0.26, 0.29))
    stone = c.noise(np.floor(x / 0.6) * 3.1, np.floor(z / 0.6) * 4.7, 1)
    colour = rgb(0.70, 0.62, 0.54) * (1 + 0.3 * stone - 0.25 * joint)[..., None]
    c.paint(_rectangle(c, low, high), colour, 0.50 + 0.03 * stone - 0.02 * joint)


def pool(c: AerialCanvas, low: Point, high: Point) -> None:
    """Water: cold, and bright where the sun's net of light lies on its floor."""
    x, z = c.ground()
    c.paint(
        _rectangle(c, (low[0] - 0.25, low[1] - 0.25), (high[0] + 0.25, high[1] + 0.25)), rgb(0.85, 0.83, 0.78), 0.42
    )
    net = smooth(0.10 - np.abs(c.noise(x * 0.8, z * 0.8, 3)), 0, 0.10)
    colour = rgb(0.12, 0.48, 0.60) + net[..., None] * rgb(0.20, 0.26, 0.22)
    c.paint(_rectangle(c, low, high), colour, 0.17 + 0.015 * net)


@dataclass(frozen=True)
class House:
    """Corners on the ground, height of the eaves, the ridge's height above them (0: a flat roof), and the roof."""

    low: Point
    high: Point
    height: float
    ridge: float
    tiles: np.ndarray
    metal: bool = False

    def corners(self, y: float, margin: float = 0.0, offset: Point = (0.0, 0.0)) -> list[tuple[float, float, float]]:
        (x0, z0), (x1, z1) = self.low, self.high
        flat = (
            (x0 - margin, z0 - margin),
            (x1 + margin, z0 - margin),
            (x1 + margin, z1 + margin),
            (x0 - margin, z1 + margin),
        )
        return [(x + offset[0], y, z + offset[1]) for x, z in flat]


def house_shadow(c: AerialCanvas, house: House) -> None:
    """Darkens the ground; the thermal camera sees the shade where it lay a while ago, too."""

    def cast(dx: float, dz: float) -> np.ndarray:
        height = house.height + 0.5 * house.ridge
        base, tip = house.corners(0), house.corners(0, 0.3, (height * dx, height * dz))
        return c.polygons(base, tip, *_sides(base, tip))

    c.paint(cast(*CAST), light=SHADE)
    for turn in (0.0, 0.12, 0.25):  # the shadow has moved clockwise
        c.thermal -= 0.035 * cast(CAST[0] * (1 - turn), CAST[1] * (1 + turn)) * (c.thermal > 0.25)


def house(c: AerialCanvas, house: House) -> None:
    """Walls, as far as the perspective shows them, and the roof."""
    eaves = house.corners(house.height)
    walls = _sides(house.corners(0), eaves)
    for (dx, dz), side in zip(((0, -1), (1, 0), (0, 1), (-1, 0)), walls, strict=True):
        lit = max(0.0, -(dx * CAST[0] + dz * CAST[1])) / 1.43
        c.paint(c.polygons(side), rgb(0.74, 0.70, 0.63), 0.38 + 0.10 * lit, SHADE + lit * 0.8 * SUN)
    (_flat_roof if house.ridge == 0 else _gable)(c, house)


def _gable(c: AerialCanvas, house: House) -> None:
    """Two faces that meet in a ridge along X; the one towards the sun is bright and warm."""
    near, right, far, left = house.corners(house.height, margin=0.45)
    middle, top = (house.low[1] + house.high[1]) / 2, house.height + house.ridge
    ends = (house.low[0] - 0.45, top, middle), (house.high[0] + 0.45, top, middle)
    x, z = c.ground(house.height + house.ridge / 2)
    rows, tile = np.floor(z / 0.36), np.floor(x / 0.30 + 0.5 * (np.floor(z / 0.36) % 2))
    shade = c.noise(rows * 3.1, tile * 7.7, 1) + 0.8 * c.noise(x * 0.35, z * 0.35, 4)
    step = z / 0.36 - rows
    colour = house.tiles * (1 + 0.30 * shade - 0.28 * smooth(step, 0.75, 1.0) + 0.10 * step)[..., None]
    for face, towards_sun in (([near, right, ends[1], ends[0]], 0.0), ([left, far, ends[1], ends[0]], 1.0)):
        light = (0.72 + 0.33 * towards_sun) * SUN
        c.paint(
            c.polygons(face), colour, 0.50 + 0.14 * towards_sun + 0.03 * shade - 0.02 * smooth(step, 0.75, 1), light
        )
    ridge = [(*ends[0][:2], middle - 0.14), (*ends[1][:2], middle - 0.14), (*ends[1][:2], middle + 0.14)]
    c.paint(c.polygons([*ridge, (*ends[0][:2], middle + 0.14)]), house.tiles * 0.8, 0.52)
    _block(c, (house.low[0] + 2.6, middle + 0.9), (0.9, 0.9), top - 0.6, 1.6, rgb(0.45, 0.25, 0.20), 0.52, hot=0.95)
    for start in (4.4, 7.2):  # roof windows: cold glass, since it mirrors the sky
        corner = (house.low[0] + start, middle + 1.5)
        _block(c, corner, (1.0, 1.3), top - 1.2, 0.1, rgb(0.35, 0.45, 0.58), 0.20)


def _flat_roof(c: AerialCanvas, house: House) -> None:
    """Gravel in a parapet with ventilation on it; or sheet metal, which shows the thermal camera the cold sky."""
    x, z = c.ground(house.height)
    rim, inside = c.polygons(house.corners(house.height)), c.polygons(house.corners(house.height, -0.4))
    coarse, fine = c.noise(x * 0.3 + 2, z * 0.3, 4), c.noise(x * 5, z * 5, 4)
    if house.metal:
        seam = smooth(np.abs(x / 0.6 % 1 - 0.5), 0.40, 0.46)
        rust = smooth(c.noise(x * 0.25 + 7, z * 0.6, 5), 0.15, 0.5)
        colour = house.tiles * (1 + 0.10 * coarse - 0.30 * seam)[..., None]
        colour = colour + rust[..., None] * (rgb(0.45, 0.30, 0.20) - colour)
        c.paint(rim, colour, 0.16 + 0.03 * seam + 0.12 * rust + 0.02 * coarse, SUN * 0.95)
        return
    c.paint(rim, rgb(0.76, 0.75, 0.72), 0.46, SUN)
    c.paint(inside, house.tiles * (1 + 0.25 * coarse + 0.25 * fine)[..., None], 0.62 + 0.05 * coarse + 0.02 * fine, SUN)
    parapet = c.polygons(house.corners(house.height, -0.4, (0.9, -0.7)))
    c.paint(inside * (1 - parapet), light=SHADE, heat=0.54)
    (x0, z0), (_, z1) = house.low, house.high
    _block(c, (x0 + 1.6, z1 - 4.4), (2.4, 1.6), house.height, 1.1, rgb(0.72, 0.74, 0.75), 0.40, hot=0.93)
    _block(c, (x0 + 5.4, z1 - 3.6), (1.1, 1.1), house.height, 0.8, rgb(0.70, 0.72, 0.73), 0.34, hot=0.80)
    _block(c, (x0 + 7.6, z0 + 2.2), (2.0, 3.0), house.height, 0.5, rgb(0.10, 0.14, 0.26), 0.66)
    _block(c, (x0 + 1.4, z0 + 1.8), (3.0, 1.4), house.height, 0.3, rgb(0.50, 0.58, 0.64), 0.22)


def _block(
    c: AerialCanvas,
    low: Point,
    size: Point,
    y: float,
    height: float,
    colour: np.ndarray,
    heat: float,
    hot: float | None = None,
) -> None:
    """A box on a roof at height y, its shadow, and what blows hot air out of its top."""
    box = House(low, (low[0] + size[0], low[1] + size[1]), height, 0.0, colour)
    base, tip = box.corners(y), box.corners(y, 0, (height * CAST[0], height * CAST[1]))
    shadow = c.polygons(base, tip, *_sides(base, tip))
    c.paint(shadow, light=SHADE)
    c.thermal -= 0.05 * shadow
    top = box.corners(y + height)
    c.paint(c.polygons(*_sides(base, top)), colour * 0.8, heat, SUN * 0.6)
    c.paint(c.polygons(top), colour, heat, SUN)
    if hot is not None:
        x, z = c.ground(y + height)
        centre, radius = (low[0] + size[0] / 2, low[1] + size[1] / 2), 0.33 * min(size)
        vent = smooth(radius - np.hypot(x - centre[0], z - centre[1]), 0, 0.1)
        c.paint(vent, rgb(0.10, 0.10, 0.11), hot)


def tree_shadow(c: AerialCanvas, x: float, z: float, size: float) -> None:
    height = 0.75 * size
    c = c.window(x + height * CAST[0], z + height * CAST[1], 1.4 * size)
    gx, gz = c.ground()
    dx, dz = gx - x - height * CAST[0], gz - z - height * CAST[1]
    along = (dx * CAST[0] + dz * CAST[1]) / 1.43
    across = (dx * CAST[1] - dz * CAST[0]) / 1.43
    r = np.hypot(along / (0.80 * size), across / (0.46 * size))
    mask = smooth(1 - r + 0.5 * c.noise(gx * 0.9 + x, gz * 0.9, 5), 0.0, 0.25)
    c.paint(0.92 * mask, light=SHADE)
    c.thermal -= 0.085 * mask * (c.thermal > 0.25)


def tree(c: AerialCanvas, x: float, z: float, size: float) -> None:
    """A crown of leafy domes, bright towards the sun."""
    c = c.window(x, z, 1.2 * size)
    gx, gz = c.ground(0.7 * size)
    u, v = gx - x, gz - z

    def surface(du: float, dv: float) -> np.ndarray:
        r = np.hypot(u + du, v + dv) / (0.5 * size)
        clumps = np.abs(c.noise((u + du) * 0.55 + x, (v + dv) * 0.55 + z, 2))
        leaves = c.noise((u + du) * 2.6 + x, (v + dv) * 2.6 + z, 4)
        return np.sqrt(np.clip(1.15 - r * r, 0, None)) + 0.9 * clumps + 0.45 * leaves - 0.35 * (r > 0.9)

    height = surface(0, 0)
    slope = np.clip((height - surface(-0.22, 0.16)) * 2.2, -0.6, 0.7)
    r = np.hypot(u, v) / (0.5 * size)
    mask = smooth(1.0 - r + 0.55 * c.noise(u * 0.8 + x, v * 0.8, 5), 0.0, 0.12)
    hue = 0.5 + 0.5 * np.sin(x * 12.9 + z * 78.2)  # differs from tree to tree
    colour = rgb(0.22, 0.33, 0.11) * (1 - hue) + rgb(0.36, 0.36, 0.13) * hue
    colour = colour * (0.75 + 0.35 * height)[..., None]
    light = SHADE + (0.42 + slope)[..., None] * SUN
    c.paint(mask, colour, 0.27 + 0.05 * slope + 0.04 * (height - 1), np.clip(light, 0.12, None))


def thermal_ghost(c: AerialCanvas, x: float, z: float, heading: float) -> None:
    """Where a car stood in the sun until now: its shade is still cold, its engine's place warm; only heat shows it."""
    c = c.window(x, z, 4)
    a, b = _local(c, x, z, heading)
    c.thermal -= 0.21 * smooth(_box(a, b, 2.1, 0.85, 0.4), 0, 0.30)
    c.thermal += 0.16 * np.exp(-(((a - 1.3) / 0.5) ** 2) - (b / 0.5) ** 2)


def car(c: AerialCanvas, x: float, z: float, heading: float, paint: np.ndarray, engine: float) -> None:
    """engine: 1 when it runs, 0 when it has been cold for long."""
    c = c.window(x, z, 6)
    light = _light_at(c, x, z)
    _shadow_of_box(c, x, z, heading, 2.15, 0.88, 1.35)
    gx, gz = _local(c, x, z, heading)
    c.thermal += engine * 0.16 * np.exp(-((gx / 2.5) ** 4) - (gz / 1.15) ** 4)
    a, b = _local(c, x, z, heading, 0.7)
    body = smooth(_box(a, b, 2.15, 0.88, 0.45), 0, 0.08)
    tone = 1 - 0.35 * smooth(np.abs(b), 0.55, 0.88) + 0.12 * np.cos(a * 1.1)
    hood = np.exp(-(((a - 1.45) / 0.60) ** 4) - (b / 0.62) ** 4)
    heat = 0.28 + engine * (0.16 + 0.42 * hood)
    c.paint(body, np.clip(paint * tone[..., None] + 0.03, 0, 1), heat, light)
    cabin_a, cabin_b = _local(c, x, z, heading, 1.35)
    glass = smooth(_box(cabin_a + 0.30, cabin_b, 1.42, 0.76 - 0.06 * np.abs(cabin_a), 0.35), 0, 0.06)
    sky = rgb(0.10, 0.13, 0.17) + 0.25 * smooth(cabin_a, 0.5, 1.2)[..., None] * rgb(0.5, 0.7, 1.0)
    c.paint(glass, sky, 0.16 + 0.06 * engine, light)
    roof = smooth(_box(cabin_a + 0.42, cabin_b, 0.80, 0.62, 0.25), 0, 0.06)
    shine = 1.05 + 0.25 * np.exp(-(((cabin_b - 0.2) / 0.25) ** 2))
    c.paint(roof, np.clip(paint * shine[..., None] + 0.05, 0, 1), 0.26 + 0.10 * engine, light)
    for side in (-0.6, 0.6):
        lamp = smooth(_box(a - 2.0, b - side, 0.12, 0.2, 0.1), 0, 0.05)
        c.paint(lamp, rgb(0.92, 0.92, 0.86), 0.40 + 0.2 * engine)
        lamp = smooth(_box(a + 2.05, b - side, 0.08, 0.2, 0.08), 0, 0.05)
        c.paint(lamp, rgb(0.60, 0.06, 0.05), 0.34)
    if engine > 0.9:
        c.paint(np.exp(-(((gx + 2.35) / 0.35) ** 2) - ((gz - 0.45) / 0.22) ** 2), heat=0.86)


def van(c: AerialCanvas, x: float, z: float, heading: float, paint: np.ndarray) -> None:
    """A delivery van under way: hot under the hood, its box as cold as the sky it mirrors."""
    c = c.window(x, z, 8)
    light = _light_at(c, x, z)
    _shadow_of_box(c, x, z, heading, 3.4, 1.1, 2.7)
    gx, gz = _local(c, x, z, heading)
    c.thermal += 0.14 * np.exp(-((gx / 3.6) ** 4) - (gz / 1.3) ** 4)
    a, b = _local(c, x, z, heading, 1.0)
    hood = np.exp(-(((a - 2.9) / 0.5) ** 4) - (b / 0.8) ** 4)
    c.paint(
        smooth(_box(a, b, 3.4, 1.05, 0.35), 0, 0.08), paint * (1 - 0.2 * hood[..., None]), 0.40 + 0.48 * hood, light
    )
    a, b = _local(c, x, z, heading, 2.0)
    c.paint(smooth(_box(a - 2.05, b, 0.42, 0.92, 0.15), 0, 0.06), rgb(0.12, 0.16, 0.22), 0.20, light)
    a, b = _local(c, x, z, heading, 2.7)
    ribs = smooth(np.abs(a / 0.7 % 1 - 0.5), 0.42, 0.48)
    c.paint(
        smooth(_box(a + 0.95, b, 2.45, 1.05, 0.10), 0, 0.06),
        paint * (1.0 - 0.15 * ribs[..., None]),
        0.24 + 0.02 * ribs,
        light,
    )
    c.paint(np.exp(-(((gx + 3.6) / 0.4) ** 2) - ((gz - 0.6) / 0.25) ** 2), heat=0.88)


def person(c: AerialCanvas, x: float, z: float, heading: float, shirt: np.ndarray) -> None:
    """Shoulders, head and swinging limbs from above."""
    c = c.window(x, z, 3)
    light = _light_at(c, x, z)
    gx, gz = c.ground()
    for step in np.linspace(0, 1.6, 9):
        spot = np.exp(-((gx - x - step * CAST[0]) ** 2 + (gz - z - step * CAST[1]) ** 2) / 0.03)
        c.light *= 1 - 0.25 * spot[..., None]
    a, b = _local(c, x, z, heading, 0.5)
    for side in (-1, 1):
        leg = smooth(1 - np.hypot((a - 0.22 * side) / 0.20, (b - 0.10 * side) / 0.11), 0, 0.3)
        c.paint(leg, rgb(0.16, 0.18, 0.24), 0.74, light)
    a, b = _local(c, x, z, heading, 1.4)
    c.paint(smooth(1 - np.hypot(a / 0.17, b / 0.30), 0, 0.25), shirt, 0.84, light)
    for side in (-1, 1):
        arm = smooth(1 - np.hypot((a + 0.16 * side) / 0.17, (b - 0.27 * side) / 0.09), 0, 0.3)
        c.paint(arm, rgb(0.68, 0.50, 0.40), 0.92, light)
    a, b = _local(c, x, z, heading, 1.7)
    c.paint(smooth(1 - np.hypot(a - 0.03, b) / 0.15, 0, 0.3), rgb(0.17, 0.12, 0.09), 0.96, light)


def _shadow_of_box(
    c: AerialCanvas, x: float, z: float, heading: float, length: float, width: float, height: float
) -> None:
    shadow = np.zeros_like(c.x)
    for step in np.linspace(0, height, 6):
        a, b = _local(c, x + step * CAST[0], z + step * CAST[1], heading)
        shadow = np.maximum(shadow, smooth(_box(a, b, length - 0.1, width - 0.05, 0.4), 0, 0.12))
    c.paint(shadow, light=SHADE * 0.85)
    c.thermal -= 0.05 * shadow


def _light_at(c: AerialCanvas, x: float, z: float) -> np.ndarray:
    """The light (3,) on the ground at X, Z."""
    px, py = c.project(x, 0, z)
    here = np.hypot(c.x - px, c.y - py) < 0.6 * c.focal / c.eye
    return c.light[here].mean(axis=0) if here.any() else SUN


def _local(c: AerialCanvas, x: float, z: float, heading: float, y: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Metres along and across the heading from X, Z, at height y."""
    gx, gz = c.ground(y)
    cos, sin = np.cos(heading), np.sin(heading)
    return cos * (gx - x) + sin * (gz - z), cos * (gz - z) - sin * (gx - x)


def _along(c: AerialCanvas, start: Point, end: Point) -> tuple[np.ndarray, np.ndarray]:
    """Metres along and across the line from start to end."""
    return _local(c, *start, np.arctan2(end[1] - start[1], end[0] - start[0]))


def _box(a, b, length, width, radius: float) -> np.ndarray:
    """How far inside a rounded rectangle of half length and half width; negative outside."""
    da, db = np.abs(a) - length + radius, np.abs(b) - width + radius
    return radius - np.hypot(np.maximum(da, 0), np.maximum(db, 0)) - np.minimum(np.maximum(da, db), 0)


def _rectangle(c: AerialCanvas, low: Point, high: Point) -> np.ndarray:
    return c.polygons([(low[0], 0, low[1]), (high[0], 0, low[1]), (high[0], 0, high[1]), (low[0], 0, high[1])])


def _sides(base: list, top: list) -> list[list]:
    """The quadrilaterals between two outlines."""
    following = [1, 2, 3, 0]
    return [[base[i], base[j], top[j], top[i]] for i, j in enumerate(following)]

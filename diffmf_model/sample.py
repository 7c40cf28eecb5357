"""Renders scenes as a colour camera and a thermal one of the same view see them; one of them is the bundled pair.

`python -m diffmf_model.sample DIR` writes the bundled pair, sample_ir.png and sample_vi.png; docs/gallery.py writes the
others. A scene is a function that paints a canvas; SCENES lists them.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from . import aerial, props
from .canvas import AerialCanvas, Canvas, rgb, smooth


def render(scene: str = "street", seed: int = 7, size: tuple[int, int] = (480, 360)) -> tuple[np.ndarray, np.ndarray]:
    """The infrared (H, W) and the visible (H, W, 3) picture of a scene, uint8. size: width, height in pixels."""
    camera, paint = SCENES[scene]
    canvas = camera(size, np.random.default_rng(seed))
    paint(canvas)
    return canvas.develop()


def street(c: Canvas) -> None:
    """Dusk: a lit road and trees on the left; on the right, in the dark of a house, a parked car and a person."""
    lamp = (-2.9, 4.6, 13.0)
    dusk, shade = rgb(0.62, 0.55, 0.50), rgb(0.85, 0.9, 1.1)
    props.sky(c, rgb(0.20, 0.28, 0.45), rgb(0.93, 0.63, 0.42), rgb(0.30, 0.20, 0.20), rgb(0.13, 0.15, 0.16))
    props.ground(c, rgb(0.27, 0.33, 0.17), rgb(0.40, 0.40, 0.42), rgb(0.52, 0.50, 0.47))
    x, z = c.ground()
    house = smooth(x, 0.4, 3.2) * smooth(z, 38, 22)
    daylight = rgb(0.60, 0.61, 0.72) * (1 - 0.82 * house)[..., None]
    c.paint(props.below_horizon(c), light=daylight + props.lamplight(x, z, lamp))
    props.wall(
        c, 4.6, near=6.5, far=24.0, height=7.2, brick=rgb(0.52, 0.29, 0.22), lit={(1, 1), (0, 3), (1, 4)},
        light=lambda y, z: (0.22 + 0.30 * smooth(y, 1.0, 7.2))[..., None] * shade,
    )  # fmt: skip
    for x, z, size in ((-7.6, 30, 5.2), (-6.4, 21, 4.4), (-5.9, 12.5, 3.8)):
        props.tree(c, x, z, size, dusk, [lamp])
    props.street_lamp(c, lamp, rgb(0.8, 0.75, 0.7))
    props.person(c, -1.35, 17.0, 1.72, light=rgb(0.95, 0.8, 0.55), coat=rgb(0.35, 0.33, 0.42), stride=0.7)
    props.car(c, 2.75, 12.0, light=rgb(0.16, 0.165, 0.21), paint=rgb(0.42, 0.10, 0.10))
    props.person(c, 3.35, 7.6, 1.78, light=rgb(0.11, 0.115, 0.15), coat=rgb(0.30, 0.27, 0.25), stride=-0.9)


def night(c: Canvas) -> None:
    """Rain has stopped: an oncoming car's headlights blind the colour camera to who crosses the road beside it."""
    lamps = [(-2.6, 5.2, 11.0), (-2.6, 5.2, 27.0)]
    dark = rgb(0.10, 0.11, 0.16)
    props.sky(
        c, rgb(0.018, 0.024, 0.050), rgb(0.15, 0.11, 0.10), rgb(0.035, 0.030, 0.034), rgb(0.020, 0.022, 0.028),
        lining=0.10, warmth=0.04,
    )  # fmt: skip
    props.ground(c, rgb(0.20, 0.26, 0.14), rgb(0.26, 0.26, 0.28), rgb(0.42, 0.40, 0.38))
    x, z = c.ground()
    below = props.below_horizon(c)
    c.paint(below, light=dark + sum(0.75 * props.lamplight(x, z, lamp) for lamp in lamps))
    props.beams(c, 1.1, 15.0)
    for x, y, z in lamps:
        props.reflection(c, x, y, z, 0.16 * props.SODIUM)

    def house_light(x: float):
        return lambda y, z: (
            dark + sum(props.lamplight(x, z, lamp) * np.exp(-(((y - 2.5) / 4.0) ** 2))[..., None] for lamp in lamps)
        )

    props.wall(
        c, -7.2, near=8.0, far=33.0, height=10.4, brick=rgb(0.50, 0.42, 0.34), light=house_light(-7.2),
        lit={(0, 2), (0, 3), (1, 0), (1, 4), (2, 2), (2, 6)}, sills=(1.1, 4.3, 7.5),
    )  # fmt: skip
    props.wall(
        c, 5.6, near=7.5, far=30.0, height=7.2, brick=rgb(0.52, 0.29, 0.22), light=house_light(5.6),
        lit={(1, 2), (0, 5)},
    )  # fmt: skip
    for lamp in lamps[::-1]:
        props.street_lamp(c, lamp, dark * 2)
    props.person(c, -3.9, 22.0, 1.70, light=rgb(0.75, 0.60, 0.40), coat=rgb(0.30, 0.22, 0.20), stride=0.6)
    props.car(c, 3.1, 19.0, light=dark, paint=rgb(0.30, 0.34, 0.40), warmth=0.0)
    props.person(c, 0.02, 14.6, 1.76, light=rgb(0.20, 0.20, 0.22), coat=rgb(0.20, 0.22, 0.28), stride=0.9)
    props.car(c, 1.1, 15.0, light=dark, paint=rgb(0.20, 0.22, 0.26))
    props.person(c, -1.75, 8.2, 1.80, light=rgb(0.16, 0.14, 0.12), coat=rgb(0.16, 0.16, 0.18), stride=-0.8)
    for side in (-0.68, 0.68):
        props.glare(c, 1.1 + side, 0.66, 15.0)


def burning(c: Canvas) -> None:
    """Day: smoke of a burning car hides two people, a second car and trees from the colour camera only."""
    day, shade = rgb(0.96, 0.97, 1.0), rgb(0.60, 0.63, 0.70)
    props.sky(
        c, rgb(0.38, 0.54, 0.78), rgb(0.80, 0.84, 0.88), rgb(0.30, 0.24, 0.16), rgb(0.24, 0.30, 0.27),
        cover=(-0.25, 0.45), lining=0.0, warmth=0.08,
    )  # fmt: skip
    props.ground(c, rgb(0.30, 0.40, 0.17), rgb(0.42, 0.42, 0.43), rgb(0.56, 0.54, 0.51))
    x, z = c.ground()
    below = props.below_horizon(c)
    shadow = smooth(x, 2.4, 3.8) * smooth(z, 38, 22)
    fire = np.exp(-((x - 1.6) ** 2 + (z - 15.0) ** 2) / 3.5)
    c.paint(below, light=day * (1 - 0.35 * shadow)[..., None] + fire[..., None] * rgb(0.9, 0.42, 0.12))
    c.paint(below * fire, heat=0.78)
    props.wall(
        c, 5.2, near=6.5, far=26.0, height=7.2, brick=rgb(0.56, 0.33, 0.25), lit=(),
        light=lambda y, z: (0.80 + 0.20 * smooth(y, 1.0, 7.2))[..., None] * shade,
    )  # fmt: skip
    for x, z, size in ((-8.5, 32, 5.4), (-7.6, 24, 4.8), (-6.6, 16, 4.2)):
        props.tree(c, x, z, size, day * 0.95)
    props.smoke(c, [(1.6, 2.0, 0.9), (-0.5, 3.4, 2.0), (-5.0, 5.2, 3.2), (-13, 8.0, 4.4)], 26.0, 5.0, 3.1, bright=1.0)
    props.car(c, -1.7, 22.0, light=day * 0.85, paint=rgb(0.62, 0.64, 0.66))
    props.person(c, -3.9, 19.0, 1.72, light=day * 0.9, coat=rgb(0.55, 0.22, 0.18), stride=0.8)
    props.person(c, -0.75, 17.0, 1.80, light=day * 0.9, coat=rgb(0.24, 0.30, 0.45), stride=-0.7)
    props.car(c, 1.6, 15.0, light=rgb(0.42, 0.36, 0.34), paint=rgb(0.30, 0.27, 0.25))
    props.flames(c, 1.6, 14.9, width=2.0, height=1.9, base=0.75)
    props.smoke(
        c, [(1.7, 2.7, 0.6), (1.2, 3.6, 1.1), (-0.6, 4.4, 1.7), (-4.0, 5.4, 2.6), (-9, 6.5, 3.4)], 14.8, 7.0, 8.7,
        fire=(1.6, 2.0, 1.2), bright=0.9,
    )  # fmt: skip
    props.smoke(c, [(0.5, 0.7, 0.6), (-1.6, 1.4, 1.5), (-6.0, 1.6, 1.9), (-11, 2.2, 2.3)], 13.0, 6.0, 5.3)
    props.person(
        c, -3.1, 9.0, 1.80, light=day, coat=rgb(0.32, 0.27, 0.16), stride=0.8,
        trousers=rgb(0.30, 0.26, 0.16), helmet=rgb(0.86, 0.74, 0.20),
    )  # fmt: skip


def junction(c: AerialCanvas) -> None:
    """A late afternoon from above: driven and parked cars, the cold places that cars have left, people in the shade."""
    aerial.lawn(c)
    roads = [((-60, -6), (60, -6), 8.0), ((12, -2), (12, 60), 6.4)]
    for road in roads:
        aerial.pavement(c, *road)
    for road in roads:
        aerial.road(c, *road)
    aerial.path(c, [(-34, -19), (-20, -16), (-6, -18.5), (8, -15.5), (14, -10.5)], 1.7)
    aerial.car_park(c, (17.0, 1.2), (33.0, 14.8), bays=range(5))
    aerial.patio(c, (-11.6, 3.2), (-4.2, 9.4))
    aerial.pool(c, (-10.4, 4.2), (-6.6, 8.2))
    aerial.zebra(c, (4.6, -6), 8.0)
    houses = [
        aerial.House((-29, 5), (-14.5, 14), 5.2, ridge=2.6, tiles=rgb(0.56, 0.27, 0.19)),
        aerial.House((-4.5, 10.5), (6.6, 21), 7.5, ridge=0.0, tiles=rgb(0.50, 0.50, 0.49)),
        aerial.House((19, 18.5), (36, 27), 5.0, ridge=2.2, tiles=rgb(0.36, 0.37, 0.40)),
        aerial.House((16.5, -27), (31, -15.0), 5.5, ridge=0.0, tiles=rgb(0.60, 0.64, 0.66), metal=True),
    ]
    trees = [
        (-24, -14.5, 6.2), (-15.5, -20.5, 7.0), (-9.5, -14.2, 5.0), (-1.5, -21.5, 6.6), (4.5, -13.6, 4.6),
        (-31, -21, 7.5), (11, -20.5, 5.6), (-31.5, 1.5, 4.4), (-12.8, 12.5, 4.8), (-11, 17.5, 6.0),
        (-17, 19.5, 6.4), (-26, 18.5, 6.8), (-1.8, 5.2, 3.4), (17, 16.8, 4.0), (30.5, 15.8, 4.2), (33, -12.5, 4.6),
    ]  # fmt: skip
    for house in houses:
        aerial.house_shadow(c, house)
    for x, z, size in trees:
        aerial.tree_shadow(c, x, z, size)
    for x, z, heading in ((21.45, 4.3, np.pi / 2), (-12.5, -9.0, 0.0)):
        aerial.thermal_ghost(c, x, z, heading)
    red, blue, white = rgb(0.62, 0.10, 0.09), rgb(0.12, 0.22, 0.48), rgb(0.88, 0.88, 0.86)
    grey, black, silver = rgb(0.40, 0.42, 0.44), rgb(0.07, 0.07, 0.08), rgb(0.68, 0.70, 0.72)
    aerial.car(c, -19.5, -7.9, 0.0, white, engine=1.0)
    aerial.car(c, -3.0, -4.0, np.pi, red, engine=1.0)
    aerial.car(c, 23.0, -4.0, np.pi, black, engine=1.0)
    aerial.car(c, 13.6, 8.0, np.pi / 2, blue, engine=1.0)
    aerial.van(c, 10.8, -8.0, 0.0, rgb(0.86, 0.87, 0.86))
    for x, paint, engine in ((18.6, silver, 0.0), (24.3, grey, 0.7), (27.15, white, 0.0)):
        aerial.car(c, x, 4.3, np.pi / 2, paint, engine)
    for x, paint, engine in ((18.6, blue, 0.0), (21.45, red, 0.0), (27.15, black, 0.35), (30.0, silver, 0.0)):
        aerial.car(c, x, 11.9, -np.pi / 2, paint, engine)
    for x, z, heading, shirt in (
        (4.3, -4.6, 1.5, red), (5.1, -8.3, -1.6, white), (8.0, 8.0, 0.4, grey), (7.9, 14.5, 1.2, black),
        (-13.0, -17.2, 0.3, blue), (-12.2, -17.8, 0.3, red), (1.5, -16.9, 3.0, black), (20.2, 8.3, 0.2, white),
        (-6.0, 8.9, 2.0, rgb(0.8, 0.55, 0.4)), (-18.5, -1.2, 0.1, silver),
    ):  # fmt: skip
        aerial.person(c, x, z, heading, shirt)
    for house in houses:
        aerial.house(c, house)
    for x, z, size in trees:
        aerial.tree(c, x, z, size)


SCENES = {
    "street": (Canvas, street),
    "night": (Canvas, night),
    "smoke": (partial(Canvas, grain=0.005), burning),
    "aerial": (partial(AerialCanvas, heading=-0.16), junction),
}
GALLERY = tuple(name for name in SCENES if name != "street")  # what docs/gallery.py shows beside the bundled pair


def write_sample(folder: Path) -> None:
    """Writes the bundled pair as PNG files."""
    for name, picture in zip(("ir", "vi"), render(), strict=True):
        Image.fromarray(picture).save(folder / f"sample_{name}.png", optimize=True)


if __name__ == "__main__":
    write_sample(Path(sys.argv[1]))

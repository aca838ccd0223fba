"""What stands in a procedural room, and where: classes, colours, furniture, camera."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from tokenfusion.data import raycast as rc
from tokenfusion.data.raycast import Colour, Floats, Material, Paint, Scene, Solid

CLASSES: dict[str, tuple[int, int, int]] = {
    "wall": (196, 205, 220),
    "floor": (150, 118, 92),
    "ceiling": (236, 236, 230),
    "picture": (214, 72, 92),
    "cupboard": (44, 130, 190),
    "panel": (128, 142, 168),
    "carpet": (234, 168, 60),
    "cushion": (226, 110, 44),
    "box": (112, 82, 60),
    "sofa": (98, 160, 112),
    "table": (164, 204, 88),
    "dresser": (140, 84, 150),
    "locker": (70, 84, 160),
}
T = TypeVar("T")
WALL, FLOOR, CEILING, PICTURE, CUPBOARD, PANEL, CARPET, CUSHION, BOX, SOFA, TABLE, DRESSER, LOCKER = range(13)


class Camera(NamedTuple):
    """Where the camera stands in the room and what it sees of it."""

    centre: Floats  # [3, 1] in the room's axes
    axes: Floats  # [3, 3] right, down, forward as rows, in the room's axes
    heading_rad: float  # of forward, counter-clockwise from the room's x axis
    half_width: float  # tangent of half the field of view, at 4:3


def _linear(code: str) -> Colour:
    """Reflectance of a colour written as on a screen, '#rrggbb'."""
    red, green, blue = (((int(code[k : k + 2], 16) / 255 + 0.02) / 1.02) ** 2.2 for k in (1, 3, 5))
    return red, green, blue


def _darken(colour: Colour, by: float) -> Colour:
    return colour[0] * by, colour[1] * by, colour[2] * by


def _darker(material: Material, by: float) -> Material:
    return material._replace(main=_darken(material.main, by), second=_darken(material.second, by), frame=0.0)


_WALLS = [_linear(c) for c in ("#e6e0d4", "#d9dccf", "#cfd8dc", "#e3d3c4", "#dcd6e0", "#d8cfc0", "#c9d4cc")]
_WOODS = [(_linear(a), _linear(b)) for a, b in (("#c89f6c", "#9b7146"), ("#b58a5e", "#8a6240"), ("#a87f5c", "#7d573c"))]
_TILES = [(_linear(a), _linear(b)) for a, b in (("#cfc8bc", "#b4aa9b"), ("#bcc0bf", "#9fa5a6"), ("#c8b9a4", "#ad9c86"))]
_WARM = [_linear(c) for c in ("#d23b32", "#e2622a", "#dc9a1c", "#b8324f")]
_COOL = [_linear(c) for c in ("#1f6fc0", "#1e94a6", "#3c50b4", "#2a8f6a")]
_PALE = [_linear(c) for c in ("#f2ead8", "#f6efe6", "#ead9b0")]
_WHITE = (0.82, 0.82, 0.8)
_GREENS = (_linear("#4f8a4a"), _linear("#2f6337"))
_SLATE = [_linear(c) for c in ("#6f8699", "#7f93a8", "#5f7f8c")]


class Furnisher:
    """Puts furniture where it is free and seen; keeps the lists that become a Scene."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.size = (self.draw(4.2, 5.6), self.draw(4.2, 5.4), self.draw(2.4, 2.75))
        tone = self.pick(_WALLS)
        plain, striped = (Material(p, tone, _darken(tone, 0.86), 0.3) for p in (rc.PLASTER, rc.STRIPES))
        self.wall = striped if rng.random() < 0.25 else plain
        planks = Material(rc.PLANKS, *self.pick(_WOODS), self.draw(0.14, 0.2))
        tiles = Material(rc.CHECKER, *self.pick(_TILES), self.draw(0.35, 0.5))
        self.floor = planks if rng.random() < 0.7 else tiles
        self.solids: list[Solid] = []
        self.paints: list[Paint] = []
        self.boxes: list[tuple[float, ...]] = []  # centre, full sizes, yaw in the room's axes
        self.box_class: list[int] = []
        self.on_floor: list[tuple[float, ...]] = []  # taken: x, y, half sizes
        self.on_wall: list[tuple[float, ...]] = []  # taken: wall, along, up, half sizes
        self.camera = self._camera()

    def draw(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def _camera(self) -> Camera:
        width, depth, _ = self.size
        at = np.array([width * self.draw(0.3, 0.7), self.draw(0.3, 0.7), self.draw(1.4, 1.75)])
        heading = np.arctan2(0.85 * depth - at[1], width * self.draw(0.3, 0.7) - at[0])
        pitch, roll = np.radians(self.draw(-18, -8)), np.radians(self.draw(-2, 2))
        right = np.array([np.sin(heading), -np.cos(heading), 0])
        forward = np.array([np.cos(heading) * np.cos(pitch), np.sin(heading) * np.cos(pitch), np.sin(pitch)])
        down = np.cross(forward, right)
        axes = np.stack(
            [np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right, forward]
        )
        return Camera(
            at[:, None].astype(np.float32),
            axes.astype(np.float32),
            float(heading),
            np.tan(np.radians(self.draw(31, 37))),
        )

    def sees(self, x: float, y: float, z: float) -> bool:
        """Whether a point lies well inside the picture and not right before the camera."""
        right, down, ahead = (self.camera.axes @ (np.array([[x], [y], [z]]) - self.camera.centre))[:, 0]
        reach = 0.92 * self.camera.half_width * ahead
        return bool(ahead > 1.3 and abs(right) < reach and abs(down) < 0.75 * reach)

    def solid(
        self, centre: Colour, half: Colour, material: Material, label: int, yaw: float = 0.0, shape: int = rc.BOX
    ) -> None:
        """Add a solid; it belongs to the object whose box comes next."""
        instance = 0 if label == rc.UNLABELLED else len(self.boxes) + 1
        self.solids.append(Solid(shape, centre, half, yaw, material, label, instance))

    def finish(self, centre: Colour, half: Colour, label: int, yaw: float = 0.0) -> None:
        """Close an object: its box holds all solids added since the last one."""
        self.boxes.append((*centre, *(2 * h for h in half), yaw))
        self.box_class.append(label)

    def free(self, taken: list[tuple[float, ...]], spot: tuple[float, ...], gap: float) -> bool:
        """Whether a rectangle (keys, two centres, two half sizes) keeps clear of those taken; takes it if so."""
        *key, a, b, half_a, half_b = spot
        for *other, c, d, half_c, half_d in taken:
            if other == key and abs(a - c) < half_a + half_c + gap and abs(b - d) < half_b + half_d + gap:
                return False
        taken.append(spot)
        return True

    def at_wall(self, wall: int, along: float, off: float) -> tuple[float, float]:
        """Room x, y of a place so far along a wall (0 left, 1 back, 2 right) and so far off it."""
        return {0: (off, along), 1: (along, self.size[1] - off), 2: (self.size[0] - off, along)}[wall]

    def wall_spot(self, half: float) -> tuple[int, float]:
        """A random wall and place along it where something so wide fits."""
        wall = int(self.rng.choice(3, p=(0.25, 0.5, 0.25)))
        return wall, self.draw(half + 0.05, self.size[0] - half - 0.05) if wall == 1 else self.draw(
            1.0 + half, self.size[1] - half - 0.1
        )

    def vivid(self, hues: Sequence[Colour]) -> Material:
        """A strong colour, plain or with a pale pattern."""
        pattern = self.pick((rc.PLAIN, rc.PLAIN, rc.STRIPES, rc.CHECKER, rc.DOTS))
        return Material(pattern, self.pick(hues), self.pick(_PALE), self.draw(0.18, 0.3))

    # -- on the walls: flat or raised, wall coloured or vivid, warm or cool

    def hang(self, label: int, raised: bool) -> None:
        """Panel, picture or cupboard on a wall, painted on it or standing out from it."""
        half, tall, deep = self.draw(0.35, 0.65), self.draw(0.28, 0.42), self.draw(0.12, 0.2)
        material = self.wall
        if label != PANEL:
            material = self.vivid(_WARM if (label == CUPBOARD) == raised else _COOL)
            material = material._replace(frame=self.pick((0.0, 0.05)))
        for _ in range(12):
            wall, along = self.wall_spot(half)
            up = self.draw(1.5, min(1.85, self.size[2] - tall - 0.1))
            (x, y), spot = self.at_wall(wall, along, deep), (wall, along, up, half, tall)
            if self.sees(x, y, up) and self.free(self.on_wall, spot, 0.12):
                break
        else:
            return
        if raised:
            size = (half, deep, tall) if wall == 1 else (deep, half, tall)
            self.solid((x, y, up), size, material, label)
            self.finish((x, y, up), size, label)
            return
        axis, turned = (1, True) if wall == 1 else (0, wall == 2)
        self.paints.append(Paint(axis, turned, (along, up), (half, tall), 0.0, material, label))
        if self.rng.random() < 0.5:  # a painted edge, so that colour does not tell what stands out
            side = np.sign((self.camera.centre[0, 0] if wall == 1 else self.camera.centre[1, 0]) - along)
            strip = self.draw(0.03, 0.08)
            edge = (along + float(side) * (half + strip), up)
            self.paints.append(Paint(axis, turned, edge, (strip, tall), 0.0, _darker(material, 0.8), label))

    def moulding(self) -> None:
        """A painted rectangle of wall: looks like a panel to a camera without depth."""
        half, tall = self.draw(0.35, 0.65), self.draw(0.28, 0.42)
        wall, along = self.wall_spot(half)
        up = self.draw(1.5, 1.8)
        if self.free(self.on_wall, (wall, along, up, half, tall), 0.12):
            rim = self.wall._replace(pattern=rc.PLAIN, second=_darken(self.wall.main, 0.8), frame=0.03)
            axis, turned = (1, True) if wall == 1 else (0, wall == 2)
            self.paints.append(Paint(axis, turned, (along, up), (half, tall), 0.0, rim, WALL))

    # -- along the walls

    def stand(self, label: int) -> None:
        """Sofa, dresser or locker with its back to a wall."""
        sofa = label == SOFA
        half, deep = (self.draw(0.75, 1.0), 0.45) if sofa else (self.draw(0.4, 0.7), self.draw(0.22, 0.3))
        tall = self.draw(0.38, 0.44) if sofa else self.draw(0.4, 0.56)
        for _ in range(12):
            wall, along = self.wall_spot(half)
            x, y = self.at_wall(wall, along, deep + 0.02)
            sizes = (half, deep) if wall == 1 else (deep, half)
            if self.sees(x, y, tall) and self.free(self.on_floor, (x, y, *sizes), 0.1):
                break
        else:
            return

        def part(a: float, off: float, up: float, wide: float, thick: float, high: float, material: Material) -> None:
            px, py = self.at_wall(wall, along + a, off)
            self.solid((px, py, up), (wide, thick, high) if wall == 1 else (thick, wide, high), material, label)

        if sofa:
            part(0, deep + 0.02, 0.22, half - 0.15, deep - 0.02, 0.22, self.wall)
            part(0, 0.14, tall, half, 0.12, tall, self.wall)
            for side in (-1, 1):
                part(side * (half - 0.09), deep + 0.02, 0.31, 0.09, deep, 0.31, self.wall)
        else:
            wood = Material(rc.PLAIN, *_WOODS[0])._replace(main=self.pick(_WOODS)[0])
            body = wood if label == DRESSER else Material(rc.PLAIN, self.pick(_SLATE), _WHITE)
            part(0, deep, tall, half, deep - 0.02, tall, body)
            front = body._replace(pattern=rc.DRAWERS, period=2 * tall / 3)
            part(0, 2 * deep, tall, half - 0.03, 0.02, tall - 0.03, front)
        self.finish((x, y, tall), (*sizes, tall), label)

    # -- in the middle of the room

    def place(self, half_a: float, half_b: float, taken: list[tuple[float, ...]]) -> tuple[float, float, float] | None:
        """A free and seen place x, y, yaw on the floor."""
        for _ in range(14):
            x, y = self.draw(0.6, self.size[0] - 0.6), self.draw(1.5, self.size[1] - 0.7)
            yaw = self.draw(-0.6, 0.6)
            cos, sin = abs(np.cos(yaw)), abs(np.sin(yaw))
            reach = (cos * half_a + sin * half_b, sin * half_a + cos * half_b)
            inside = all(r < c < s - r for c, s, r in zip((x, y), self.size, reach, strict=False))
            if inside and self.sees(x, y, 0.15) and self.free(taken, (x, y, *reach), 0.06):
                return x, y, yaw
        return None

    def block(self, label: int) -> None:
        """Box or cushion: the same shapes, painted like the floor or vivid; some are round."""
        half = (self.draw(0.26, 0.42), self.draw(0.24, 0.36), self.draw(0.14, 0.25))
        if round_one := self.rng.random() < 0.25:
            half = (half[0], half[0], half[2])
        if not (spot := self.place(half[0], half[1], self.on_floor)):
            return
        x, y, yaw = spot
        material = self.floor if label == BOX else self.vivid(_WARM + _COOL)
        self.solid((x, y, half[2]), half, material, label, yaw, rc.CYLINDER if round_one else rc.BOX)
        self.finish((x, y, half[2]), half, label, yaw)

    def table(self) -> None:
        """A top and four legs, painted like the wall; often with a plant, which has no class."""
        half_a, half_b, top = self.draw(0.5, 0.75), self.draw(0.35, 0.48), self.draw(0.66, 0.76)
        if not (spot := self.place(half_a, half_b, self.on_floor)):
            return
        x, y, yaw = spot
        self.solid((x, y, top - 0.035), (half_a, half_b, 0.035), self.wall, TABLE, yaw)
        for a in (-1, 1):
            for b in (-1, 1):
                right, ahead = a * (half_a - 0.06), b * (half_b - 0.06)
                leg = (x + np.cos(yaw) * right - np.sin(yaw) * ahead, y + np.sin(yaw) * right + np.cos(yaw) * ahead)
                self.solid((*leg, top / 2 - 0.035), (0.035, 0.035, top / 2 - 0.035), self.wall, TABLE, yaw)
        self.finish((x, y, top / 2), (half_a, half_b, top / 2), TABLE, yaw)
        if self.rng.random() < 0.6:
            pot, leaf = Material(rc.PLAIN, _linear("#e8e2d6"), _WHITE), Material(rc.DOTS, *_GREENS, 0.07)
            self.solid((x, y, top + 0.07), (0.06, 0.06, 0.07), pot, rc.UNLABELLED, shape=rc.CYLINDER)
            self.solid((x, y, top + 0.23), (0.13, 0.13, 0.13), leaf, rc.UNLABELLED, shape=rc.BALL)

    def carpet(self, large: bool) -> None:
        """A vivid rectangle of floor, as large as a rug or as small as a cushion."""
        half = (self.draw(0.65, 0.95), self.draw(0.45, 0.65)) if large else (self.draw(0.3, 0.5), self.draw(0.26, 0.42))
        if spot := self.place(*half, [] if large else self.on_floor):  # furniture may stand on a rug
            x, y, yaw = spot
            material = self.vivid(_WARM + _COOL)
            self.paints.append(Paint(2, False, (x, y), half, yaw, material, CARPET))
            if self.rng.random() < 0.5:  # a darker hem on the near side, like the front of a cushion
                hem = self.draw(0.1, 0.2)
                near = (x + np.sin(yaw) * (half[1] + hem), y - np.cos(yaw) * (half[1] + hem))
                self.paints.append(Paint(2, False, near, (half[0], hem), yaw, _darker(material, 0.75), CARPET))

    def scene(self) -> Scene:
        """Furnish the room and light it."""
        width, depth, height = self.size
        self.carpet(large=True) if self.rng.random() < 0.5 else None
        for label in self.rng.permutation([SOFA, DRESSER, LOCKER]):
            if self.rng.random() < 0.75:
                self.stand(int(label))
        if self.rng.random() < 0.65:
            self.table()
        hung = [(PANEL, True), (PICTURE, True), (PICTURE, False), (CUPBOARD, True), (CUPBOARD, False)]
        for index in self.rng.permutation(5):
            if self.rng.random() < 0.75:
                self.hang(*hung[index])
        for label in self.rng.permutation([BOX, CUSHION, CARPET, BOX, CUSHION]):
            if self.rng.random() < 0.75:
                self.carpet(large=False) if label == CARPET else self.block(int(label))
        for _ in range(2):
            self.moulding()
        lamp = (width * self.draw(0.35, 0.65), depth * self.draw(0.4, 0.65), height - 0.45)
        bulb = Material(rc.PLAIN, (1.7, 1.6, 1.4), _WHITE)
        self.solid(lamp, (0.13, 0.13, 0.13), bulb, rc.UNLABELLED, shape=rc.BALL)
        cord = Material(rc.PLAIN, _linear("#3c3c3c"), _WHITE)
        self.solid((lamp[0], lamp[1], height - 0.16), (0.012, 0.012, 0.16), cord, rc.UNLABELLED, shape=rc.CYLINDER)
        fill = np.array([self.draw(-0.7, 0.7), -1.0, 0.6])
        fill /= np.linalg.norm(fill)
        roof = Material(rc.PLASTER, (0.86, 0.86, 0.84), _WHITE, 0.4)
        materials = (self.wall, self.floor, roof)
        sun = (float(fill[0]), float(fill[1]), float(fill[2]))
        return Scene(self.size, materials, (WALL, FLOOR, CEILING), self.solids, self.paints, lamp, sun)

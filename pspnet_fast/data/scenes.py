"""Embedded scenes, "boat or car": an object whose own pixels cannot tell its class.

One and the same hull, in one and the same bank of mist, is a boat where water lies beyond the mist and a car where a
road does. The mist is opaque on every pixel within ``BAND`` pixels of the hull, so a network that sees no further than
that cannot tell the two apart. Scenes come as twins: items 2k and 2k + 1 share light, sky, shore, mist and hull (the
same pixels) and differ in what lies around the mist, water or road.

Everything is drawn with numpy from the seed; there are no files.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pspnet_fast.data.canvas import Canvas, Floats, noise, rgb, smooth_step

CLASSES = ("sky", "water", "road", "clutter", "mist", "boat", "car")
COLORS = [(158, 202, 240), (33, 102, 172), (90, 90, 98), (84, 140, 84), (230, 228, 218), (244, 140, 40), (200, 40, 90)]
BAND = 22  # pixels: the mist is opaque up to this distance from the hull's box
HALF_HULL = ((14, 18), (27, 35))  # ranges of half the height and half the length of the hull's box, pixels
MIN_SIZE = (145, 193)  # room for the mist and some surroundings on all sides
MEAN, STD = 0.5, 0.25  # of pictures scaled to 0..1, the same for all channels
SUPERSAMPLING = 3  # of the hull, each way

# Noon, evening, dusk, overcast: the colours of the zenith, the horizon and the sun, and the tint of what they light.
LIGHTS = np.array(
    [
        [[62, 122, 196], [196, 220, 238], [255, 252, 232], [255, 255, 255]],
        [[98, 126, 182], [252, 206, 150], [255, 232, 168], [255, 232, 204]],
        [[58, 62, 120], [240, 158, 142], [255, 200, 160], [214, 190, 210]],
        [[138, 150, 164], [212, 216, 220], [236, 238, 240], [226, 232, 240]],
    ],
    dtype=np.float32,
)


class Light(NamedTuple):
    """Colours of one time of day; ``tint`` (0..1 a channel) multiplies the colours of lit things."""

    zenith: Floats
    horizon: Floats
    sun: Floats
    tint: Floats


def _choose_light(rng: np.random.Generator) -> Light:
    first, second = rng.choice(len(LIGHTS), 2, replace=False)
    zenith, horizon, sun, tint = LIGHTS[first] + rng.uniform(0, 0.5) * (LIGHTS[second] - LIGHTS[first])
    return Light(zenith, horizon, sun, tint / 255)


def _draw_sky(canvas: Canvas, rng: np.random.Generator, light: Light, horizon: float) -> float:
    """Gradient, sun and clouds; returns the sun's column."""
    sky = canvas.window(0, horizon, 0, canvas.size[1])
    up = np.clip(1 - sky.y / horizon, 0, 1)[..., None]
    canvas.paint(np.ones((1, 1), np.float32), light.horizon, "sky")
    sky.paint(np.ones((1, 1), np.float32), light.horizon * (1 - up) + light.zenith * up)
    y, x = rng.uniform(0.1, 0.9) * horizon, rng.uniform(0.05, 0.95) * canvas.size[1]
    distance = np.hypot(sky.y - y, sky.x - x)
    sky.paint(0.8 * np.exp(-distance / 26), light.sun)
    sky.paint(np.clip(6.5 - distance, 0, 1), light.sun)
    clouds = noise(rng, sky.size, (14, 46), 4)
    density = rng.uniform(0.46, 0.62)
    color = (light.horizon + 2 * light.sun) / 3 - 18 * clouds[..., None]
    sky.paint(0.85 * smooth_step(clouds, density, density + 0.2), color)
    return x


def _draw_shore(canvas: Canvas, rng: np.random.Generator, light: Light, horizon: float) -> None:
    """Hills, buildings and trees along the horizon."""
    land = canvas.window(horizon - 24, horizon, 0, canvas.size[1])
    for distance in (1.0, 0.5):  # the far range is higher and paler
        ridge = horizon - 3 - 16 * distance * noise(rng, (1, canvas.size[1]), (1, 52), 4)
        color = rgb(70, 96, 78) * light.tint * (1 - 0.55 * distance) + 0.55 * distance * light.horizon
        land.paint(np.clip(land.y - ridge + 0.5, 0, 1), color, "clutter")
    for _ in range(rng.integers(2, 8)):
        left, width, height = rng.uniform(0, canvas.size[1]), rng.uniform(7, 15), rng.uniform(8, 24)
        wall = (rgb(*rng.uniform(120, 205, 3)) * 0.7 + 60) * light.tint
        canvas.box(horizon - height, horizon, left, left + width, wall, "clutter")
        canvas.box(horizon - height - 1.5, horizon - height, left - 0.5, left + width + 0.5, 0.6 * wall, "clutter")
        glass = light.sun if rng.random() < 0.4 else 0.55 * wall
        front = canvas.window(horizon - height + 2, horizon - 2, left + 1, left + width - 1.5)
        rows, columns = np.mod(front.y - horizon + height, 4) > 2, np.mod(front.x - left, 3.5) > 1.6
        front.paint(rows & columns, glass)
    for _ in range(rng.integers(4, 14)):
        _draw_tree(canvas, rng, light, horizon + 1, rng.uniform(0, canvas.size[1]), rng.uniform(5, 13))


def _draw_tree(canvas: Canvas, rng: np.random.Generator, light: Light, foot: float, x: float, height: float) -> None:
    leaves = rgb(rng.uniform(40, 90), rng.uniform(90, 130), rng.uniform(45, 70)) * light.tint
    trunk = rgb(92, 70, 52) * light.tint
    canvas.box(foot - 0.4 * height, foot, x - 0.06 * height, x + 0.06 * height, trunk, "clutter")
    if rng.random() < 0.4:
        canvas.cone(foot - height, foot - 0.15 * height, x, 0.32, 0.75 * leaves, "clutter")
    else:
        for dy, dx, radius, shade in ((0.55, 0.0, 0.32, 0.8), (0.6, -0.2, 0.22, 0.95), (0.75, 0.1, 0.25, 1.1)):
            canvas.disc(foot - dy * height, x + dx * height, radius * height, shade * leaves, "clutter")


def _draw_water(canvas: Canvas, rng: np.random.Generator, light: Light, horizon: float, sun: float) -> None:
    """The sky's reflection, waves that grow towards the viewer, the sun's glitter, foam, rocks and buoys."""
    water = canvas.window(horizon, canvas.size[0], 0, canvas.size[1])
    below = np.clip(water.y - horizon, 0.5, None)
    near = below / (canvas.size[0] - horizon)
    deep = rgb(rng.uniform(12, 40), rng.uniform(70, 120), rng.uniform(105, 150)) * light.tint
    reflection = 0.75 * np.exp(-near / 0.3)[..., None]
    warp = noise(rng, water.size, (9, 34), 3) + noise(rng, water.size, (3, 10))
    waves = np.sin(rng.uniform(26, 34) * np.log(below + 4) + 7 * warp) * smooth_step(below, 0, 14)
    waves += 2 * noise(rng, water.size, (2, 9)) - 1
    surface = np.clip(water.y - horizon + 0.5, 0, 1)
    water.paint(surface, deep * (1 - reflection) + light.horizon * reflection + 13 * waves[..., None], "water")
    glitter = np.exp(-(((water.x - sun) / (4 + 26 * near)) ** 2)) * smooth_step(waves, 0.2, 1.2)
    water.paint(glitter * surface, light.sun)
    foam = rgb(240, 246, 246) * light.tint
    water.paint(0.7 * smooth_step(waves, 1.25, 1.7) * smooth_step(below, 4, 10), foam)
    for _ in range(rng.integers(3, 9)):
        foot, x = horizon + rng.uniform(0.08, 0.98) * (canvas.size[0] - horizon), rng.uniform(0, canvas.size[1])
        scale = 2 + 0.1 * (foot - horizon)
        if rng.random() < 0.5:
            stone = rng.uniform(0.7, 1.1) * rgb(96, 88, 84) * light.tint
            canvas.disc(foot, x, 1.8 * scale, 0.5 * (foam + deep), flat=0.25)
            canvas.disc(foot, x, 1.5 * scale, stone, "clutter", flat=0.75, foot=foot)
            canvas.disc(foot - 0.4 * scale, x + 0.3 * scale, 0.7 * scale, 1.25 * stone, flat=0.6, foot=foot)
        else:
            paint = (rgb(214, 52, 40) if rng.random() < 0.6 else rgb(40, 140, 80)) * light.tint
            canvas.disc(foot, x, 1.3 * scale, 0.4 * deep, flat=0.3)
            canvas.cone(foot - 2.6 * scale, foot, x, 0.32, paint, "clutter")
            canvas.box(foot - 1.5 * scale, foot - 0.9 * scale, x - 0.4 * scale, x + 0.4 * scale, foam)
            canvas.disc(foot - 2.8 * scale, x, 0.4 * scale, light.sun, "clutter")


def _draw_road(canvas: Canvas, rng: np.random.Generator, light: Light, horizon: float) -> None:
    """Asphalt in perspective with grain, patches, wheel tracks and lane marks; lamps, signs and trees along it."""
    road = canvas.window(horizon, canvas.size[0], 0, canvas.size[1])
    below = np.clip(road.y - horizon, 0.5, None)
    vanishing, spacing = rng.uniform(0.2, 0.8) * canvas.size[1], rng.uniform(0.9, 1.3)
    lane = (road.x - vanishing) / (below * spacing) + rng.uniform(0, 1)
    across = np.abs(lane - np.round(lane)) * (below * spacing)  # pixels from the nearest lane mark
    grain = 26 * (noise(rng, road.size, (1, 1)) - 0.5) * smooth_step(below, 0, 40)
    patches = 22 * (noise(rng, road.size, (7, 26), 3) - 0.5)
    tracks = 9 * np.cos(4 * np.pi * lane) * smooth_step(below, 4, 30)
    asphalt = (rgb(0, 0, 4) + rng.uniform(84, 112) + (grain + patches + tracks)[..., None]) * light.tint
    haze = 0.5 * np.exp(-below / 9)[..., None]
    road.paint(np.clip(road.y - horizon + 0.5, 0, 1), asphalt * (1 - haze) + light.horizon * haze, "road")
    dashes = smooth_step(np.sin(rng.uniform(15, 22) * np.log(below + 12) + rng.uniform(0, 6)), -0.2, 0.2)
    white = rgb(244, 242, 234) * light.tint
    mark = white if rng.random() < 0.7 else rgb(244, 204, 80) * light.tint
    road.paint(0.9 * np.clip(0.035 * below + 0.3 - across, 0, 1) * dashes * smooth_step(below, 2, 12), mark)
    pole = rgb(70, 72, 78) * light.tint
    for _ in range(rng.integers(4, 9)):
        foot, x = horizon + rng.uniform(0.02, 0.3) * (canvas.size[0] - horizon), rng.uniform(0, canvas.size[1])
        height = 9 + 1.1 * (foot - horizon)
        kind = rng.choice(("tree", "lamp", "sign"))
        if kind == "tree":
            _draw_tree(canvas, rng, light, foot, x, 1.2 * height)
            continue
        width = max(0.6, 0.03 * height)
        canvas.box(foot - height, foot, x - width, x + width, pole, "clutter")
        if kind == "lamp":
            canvas.box(foot - height, foot - height + 1, x, x + 0.35 * height, pole, "clutter")
            canvas.disc(foot - height + 1, x + 0.35 * height, 0.12 * height, light.sun, "clutter", flat=0.5)
        else:
            plate = (rgb(208, 44, 44), rgb(36, 90, 180), rgb(246, 196, 50))[rng.integers(3)] * light.tint
            canvas.disc(foot - height, x, 0.24 * height, white, "clutter")
            canvas.disc(foot - height, x, 0.18 * height, plate, "clutter")


class Box(NamedTuple):
    """The hull's box: its middle pixel and the pixels that it reaches beyond that one to either side."""

    y: int
    x: int
    half_height: int
    half_length: int

    def distance(self, y: Floats, x: Floats) -> Floats:
        """Distance of pixels from the box, in pixels; 0 inside."""
        dy, dx = np.abs(y - self.y) - self.half_height, np.abs(x - self.x) - self.half_length
        return np.hypot(np.clip(dy, 0, None), np.clip(dx, 0, None))


def _draw_mist(canvas: Canvas, rng: np.random.Generator, light: Light, box: Box) -> None:
    """A bank of mist: opaque up to ``BAND`` pixels from the hull's box, torn at its edge, a thin veil beyond."""
    distance = box.distance(canvas.y, canvas.x)
    swirls = noise(rng, canvas.size, (16, 40), 4)
    edge = 1 - smooth_step(distance - 45 * np.clip(swirls - 0.3, 0, None), BAND, BAND + 16)
    veil = swirls * (1 - smooth_step(distance, BAND, BAND + 45))
    shade = 0.93 + 0.16 * (swirls - 0.5) + 0.05 * (noise(rng, canvas.size, (4, 30)) - 0.5)
    cover = np.maximum(edge, np.minimum(veil, 0.45))
    canvas.paint(cover, shade[..., None] * (rgb(128, 128, 128) + 64 * light.tint + 0.25 * light.horizon), "mist")


def _draw_hull(canvas: Canvas, rng: np.random.Generator, light: Light, box: Box, name: str) -> None:
    """A painted hull with a cabin, windows, a lamp and old tyres at its side: wheels or fenders, nobody can tell."""
    rows, columns = 2 * box.half_height + 1, 2 * box.half_length + 1
    fine = Canvas((SUPERSAMPLING * rows, SUPERSAMPLING * columns))
    v = (2 * fine.y + 1) / fine.size[0] - 1  # -1 at the top of the box, 1 at its bottom
    u = (2 * fine.x + 1) / fine.size[1] - 1
    u = -u if rng.random() < 0.5 else u  # -1 at the stern, 1 at the bow
    deck = rng.uniform(-0.1, 0.05) - rng.uniform(0.1, 0.3) * np.clip(u, 0, None) ** 2
    keel = 0.96 - 1.1 * smooth_step(u, 0.55, 1.1) - 0.5 * smooth_step(u, -0.86, -1.05)
    stern, bow, roof = rng.uniform(-0.66, -0.45), rng.uniform(0.05, 0.35), rng.uniform(-0.98, -0.75)
    slant = (v - roof) / -roof  # 0 at the roof, 1 at the deck
    body = (v > deck) & (v < keel)
    cabin = (
        (v > roof + 0.1 * (u - stern) ** 2) & (v <= deck) & (u > stern - 0.1 * slant) & (u < bow - 0.2 + 0.32 * slant)
    )
    glass = (v > roof + 0.2) & (v < deck - 0.12) & (u > stern + 0.07 - 0.08 * slant) & (u < bow - 0.28 + 0.28 * slant)
    pillar = np.abs(u - (stern + bow) / 2 + 0.08) < 0.035
    lamp = ((v - 0.12) / 0.13) ** 2 + ((u - 0.85) / 0.05) ** 2 < 1
    stripe = np.abs(v - deck - rng.uniform(0.3, 0.45)) < 0.07
    first, second = rgb(*rng.uniform(30, 235, 3)), rgb(*rng.uniform(30, 235, 3))
    grain = 16 * (noise(rng, fine.size, (5, 9), 3) - 0.5)[..., None]
    shade = (1.12 - 0.42 * smooth_step(v, -0.1, 1) + 0.2 * np.exp(-(((v - deck - 0.14) / 0.07) ** 2)))[..., None]
    fine.paint(cabin, (0.35 * first + 0.65 * rgb(238, 234, 226) + grain) * (1 - 0.1 * v[..., None]))
    fine.paint(glass & ~pillar, rgb(36, 48, 62) + 70 * smooth_step(u + 0.5 * v, -0.5, 0.6)[..., None])
    fine.paint(body, (first + grain) * shade)
    fine.paint(body & stripe, second * shade)
    fine.paint(body & (v > 0.72), rgb(52, 46, 44) * shade)
    fine.paint(body & lamp, rgb(255, 244, 190))
    cover = cabin | body
    for x in np.linspace(rng.uniform(-0.65, -0.5), rng.uniform(0.36, 0.5), rng.integers(2, 4)):
        radius = np.hypot((v - 0.62) * box.half_height, (u - x) * box.half_length) / box.half_height
        fine.paint(radius < 0.36, np.where(radius[..., None] < 0.17, rgb(150, 150, 152), rgb(34, 32, 34)))
        cover |= radius < 0.36
    blocks = (rows, SUPERSAMPLING, columns, SUPERSAMPLING)
    alpha = cover.reshape(blocks).mean((1, 3), dtype=np.float32)
    color = (fine.picture * light.tint).reshape(*blocks, 3).mean((1, 3)) / np.maximum(alpha, 0.01)[..., None]
    top, left = box.y - box.half_height, box.x - box.half_length
    canvas.window(top, top + rows - 1, left, left + columns - 1).paint(alpha, color, name)


class Scene(NamedTuple):
    """A picture (H, W, 3) uint8 RGB, its label (H, W) uint8 and the box of its hull."""

    picture: NDArray[np.uint8]
    label: NDArray[np.uint8]
    box: Box


def draw_scene(size: tuple[int, int], index: int, seed: int = 0) -> Scene:
    """Draw scene ``index`` of ``seed``: on water where the index is even, its twin on a road where it is odd."""
    _check_size(size)
    # Three streams: whatever the surroundings draw, light and place, mist and hull stay the same.
    place, surroundings, thing = (np.random.default_rng([seed, index // 2, stream]) for stream in range(3))
    half_height, half_length = (int(place.integers(low, high + 1)) for low, high in HALF_HULL)
    margin = half_length + BAND + 4
    box = Box(
        int(place.integers(size[0] - 62, size[0] - 43)),
        int(place.integers(margin, size[1] - margin)),
        half_height,
        half_length,
    )
    horizon = float(place.uniform(0.24, 0.36) * size[0])
    light = _choose_light(place)
    canvas = Canvas(size, CLASSES)
    sun = _draw_sky(canvas, surroundings, light, horizon)
    _draw_shore(canvas, surroundings, light, horizon)
    if index % 2 == 0:
        _draw_water(canvas, surroundings, light, horizon, sun)
    else:
        _draw_road(canvas, surroundings, light, horizon)
    _draw_mist(canvas, thing, light, box)
    _draw_hull(canvas, thing, light, box, "boat" if index % 2 == 0 else "car")
    return Scene(np.clip(canvas.picture + 0.5, 0, 255).astype(np.uint8), canvas.label, box)


def _check_size(size: tuple[int, int]) -> None:
    if size[0] < MIN_SIZE[0] or size[1] < MIN_SIZE[1]:
        raise ValueError(f"size (height, width) must be at least {MIN_SIZE}, got {tuple(size)}")


class SceneDataset(Dataset[tuple[Tensor, Tensor]]):
    """``length`` scenes of ``size`` (height, width): image (3, H, W) float32, normalised, and label (H, W) int64.

    Scenes are drawn when first asked for and kept (uint8), so that only the first epoch pays for the drawing.
    """

    def __init__(self, size: tuple[int, int], length: int, seed: int = 0) -> None:
        _check_size(size)
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        self.size, self.length, self.seed = size, length, seed
        self._scenes: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """The scene behind item ``index``: picture, label and box."""
        if not 0 <= index < self.length:
            raise IndexError(f"index must be in 0..{self.length - 1}, got {index}")
        if index not in self._scenes:
            self._scenes[index] = draw_scene(self.size, index, self.seed)
        return self._scenes[index]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scene(index)
        image = torch.from_numpy(scene.picture).permute(2, 0, 1).float().div_(255)
        return image.sub_(MEAN).div_(STD), torch.from_numpy(scene.label).long()

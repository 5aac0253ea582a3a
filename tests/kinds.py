"""Drawn parts that are no discs, with other defects than nicks; photographs of them would differ.

Every part has its own texture, light and place, so that no two images are alike.
"""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw


def cell(rng: np.random.Generator, defect: bool) -> np.ndarray:
    """A square of grown crystals under thin lines; the defect is an area that stays darker."""
    side = 260
    seeds = rng.uniform(0, side, (40, 2))
    y, x = np.mgrid[:side, :side]
    nearest = ((x[..., None] - seeds[:, 0]) ** 2 + (y[..., None] - seeds[:, 1]) ** 2).argmin(-1)
    grey = rng.normal(0, 9, 40)[nearest] + 8 * smooth_noise(rng, (side, side), 30)
    grey += rng.uniform(110, 170)
    grey += rng.uniform(-0.08, 0.08) * (x - side / 2) + rng.uniform(-0.08, 0.08) * (y - side / 2)
    if defect:
        field = smooth_noise(rng, (side, side), rng.uniform(25, 60))
        left, top = rng.uniform(-0.2, 0.7, 2) * side
        wide, tall = rng.uniform(0.25, 0.5, 2) * side
        inside = (x > left) & (x < left + wide) & (y > top) & (y < top + tall)
        area = cv2.GaussianBlur((inside & (field > -0.9)).astype(np.float32), (0, 0), 3)
        grey *= 1 - rng.uniform(0.18, 0.45) * area
    grey[8::9] *= 0.93
    for column in (side // 3, 2 * side // 3):
        grey[:, column - 4 : column + 4] = 60
    return taken(rng, grey)


def panel(rng: np.random.Generator, defect: bool) -> np.ndarray:
    """A long plate with slots and eight screws; the defect is a screw that is missing."""
    height, width = 150, 360
    picture = Image.new("L", (width, height), int(rng.uniform(20, 60)))
    pen = ImageDraw.Draw(picture)
    left, top = rng.uniform(8, 20), rng.uniform(8, 20)
    right, bottom = left + rng.uniform(315, 325), top + rng.uniform(108, 114)
    pen.rectangle((left, top, right, bottom), fill=int(rng.uniform(130, 190)))
    for number in range(5):
        x = left + 52 + number * 48
        pen.rectangle((x, top + 36, x + 18, bottom - 36), fill=int(rng.uniform(40, 70)))
    gone = rng.integers(8) if defect else -1
    for number in range(8):
        x = left + 20 + (number % 4) * (right - left - 40) / 3 + rng.uniform(-1, 1)
        y = (top + 16) if number < 4 else (bottom - 16)
        r = 8.5
        pen.ellipse((x - r, y - r, x + r, y + r), fill=int(rng.uniform(45, 65)))
        if number != gone:
            r, light = 7, int(rng.uniform(150, 230))
            pen.ellipse((x - r, y - r, x + r, y + r), fill=light)
            turn = rng.uniform(0, np.pi)
            dx, dy = 6 * np.cos(turn), 6 * np.sin(turn)
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=light // 3, width=2)
    grey = np.asarray(picture, np.float32) + 5 * smooth_noise(rng, (height, width), 20)
    return taken(rng, grey)


def cap(rng: np.random.Generator, defect: bool) -> np.ndarray:
    """A coloured box with a label; the defect is a part of it in a wrong colour, equally bright."""
    height, width = 240, 200
    base = np.array([40, 95, 170], np.float32)
    picture = np.full((height, width, 3), rng.uniform(180, 220), np.float32)
    left, top = rng.uniform(18, 38), rng.uniform(18, 38)
    box = (slice(int(top), int(top) + 180), slice(int(left), int(left) + 140))
    picture[box] = base * rng.uniform(0.85, 1.15)
    label = (slice(int(top) + 60, int(top) + 115), slice(int(left) + 20, int(left) + 120))
    picture[label] = rng.uniform(215, 235)
    for line in range(4):
        row = int(top) + 68 + 11 * line
        picture[row : row + 4, int(left) + 28 : int(left) + 28 + rng.integers(40, 85)] = 60
    if defect:
        luminance = base @ [0.299, 0.587, 0.114]
        other = [np.array(c, np.float32) for c in ((110, 75, 95), (45, 115, 80), (95, 85, 90))]
        colour = other[rng.integers(len(other))]
        colour = colour * luminance / (colour @ [0.299, 0.587, 0.114])
        radius = rng.uniform(14, 32)
        x, y = left + rng.uniform(30, 110), top + rng.choice([30, 145])
        yy, xx = np.mgrid[:height, :width]
        area = cv2.GaussianBlur(
            ((xx - x) ** 2 + (yy - y) ** 2 < radius**2).astype(np.float32), (0, 0), 2
        )[..., None]
        picture = picture * (1 - area) + colour * area
    picture += 5 * smooth_noise(rng, (height, width), 25)[..., None]
    return taken(rng, picture)


def tile(rng: np.random.Generator, defect: bool) -> np.ndarray:
    """A marbled surface; the defect is a thin crack across."""
    side = 280
    grey = rng.uniform(100, 160) + 14 * smooth_noise(rng, (side, side), 12)
    grey += 8 * smooth_noise(rng, (side, side), 3) + 18 * smooth_noise(rng, (side, side), 60)
    if defect:
        points = [np.array([rng.uniform(0, side), 0.0])]
        heading = rng.uniform(-0.5, 0.5)
        while points[-1][1] < side * rng.uniform(0.6, 1.2):
            heading = np.clip(heading + rng.normal(0, 0.35), -1.2, 1.2)
            points.append(points[-1] + 9 * np.array([np.sin(heading), np.cos(heading)]))
        path = np.array(points) - [0, 0]
        if rng.uniform() < 0.5:
            path = path[:, ::-1]
        crack = np.zeros((side, side), np.float32)
        cv2.polylines(crack, [np.int32(path * 16)], False, 1, 1, cv2.LINE_AA, 4)
        crack = cv2.GaussianBlur(crack, (0, 0), 0.8)
        grey -= rng.uniform(35, 70) * crack / max(crack.max(), 0.1)
    return taken(rng, grey)


def bracket(rng: np.random.Generator, defect: bool) -> np.ndarray:
    """An L-shaped sheet with two holes; the defect is a leg that is bent or cut short."""
    side = 240
    picture = Image.new("L", (side, side), int(rng.uniform(200, 230)))
    pen = ImageDraw.Draw(picture)
    x, y = rng.uniform(30, 45, 2)
    wide, tall, thick = 150 + rng.uniform(-3, 3), 150 + rng.uniform(-3, 3), 46 + rng.uniform(-2, 2)
    bend = 0.0
    if defect:
        if rng.uniform() < 0.5:
            bend = rng.choice([-1, 1]) * rng.uniform(0.12, 0.25) * wide
        else:
            wide -= rng.uniform(18, 40)
    bottom = y + tall
    leg = [(x, y), (x + thick, y), (x + thick, bottom - thick), (x + wide, bottom - thick - bend)]
    leg += [(x + wide, bottom - bend), (x + thick, bottom), (x, bottom)]
    pen.polygon(leg, fill=int(rng.uniform(70, 110)))
    for cx, cy in ((x + thick / 2, y + 28), (x + thick / 2, bottom - thick / 2)):
        pen.ellipse((cx - 9, cy - 9, cx + 9, cy + 9), fill=225)
    grey = np.asarray(picture, np.float32) + 6 * smooth_noise(rng, (side, side), 8)
    return taken(rng, grey)


KINDS: dict[str, Callable[[np.random.Generator, bool], np.ndarray]] = {
    "cell": cell,
    "panel": panel,
    "cap": cap,
    "tile": tile,
    "bracket": bracket,
}


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Return a random field of variance 1 that changes over `scale` pixels."""
    coarse = [max(2, round(one / scale) + 2) for one in shape]
    field = cv2.resize(rng.normal(size=coarse), shape[::-1], interpolation=cv2.INTER_CUBIC)
    return (field - field.mean()) / field.std()


def taken(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """Photograph a drawing: other light, focus and noise each time; uint8."""
    picture = picture * rng.uniform(0.85, 1.15)
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 1.0))
    picture = picture + rng.normal(0, 3, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def draw_folders(data: Path, kind: str, counts: dict[str, int], seed: int = 0) -> Path:
    """Draw as many images of each class as `counts` says for `train` and `test`; return `data`."""
    for side, (split, count) in enumerate(counts.items()):
        for name in ("def_front", "ok_front"):
            folder = data / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([seed, side, name == "def_front", number])
                image = KINDS[kind](rng, name == "def_front")
                Image.fromarray(image).save(folder / f"{kind}_{number:03}.png")
    return data

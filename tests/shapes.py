"""Captioned pictures of plain shapes, drawn by code, and a check that decides whether a picture shows what it should.

`draw` and `caption` make one example from a seed, `write_folder` a data set in the imagefolder layout of `datasets`.
`mismatch` is the check: geometry and colour alone, no learned judge, and nothing shared with the drawing code.
"""

import json
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("circle", "square", "triangle")
NEW_SHAPE = "star"
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (245, 200, 30),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (150, 60, 180),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
TEMPLATES = (
    "a {colour} {shape} on {background}",
    "a {colour} {shape} on a {background} background",
    "a drawing of a {colour} {shape} on {background}",
    "{colour} {shape}, {background} background",
)

# Radius of the inner corners of a regular pentagram over that of its tips.
PENTAGRAM = 1 / ((1 + math.sqrt(5)) / 2) ** 2
# Range of the distance from the centre to the farthest point, as a fraction of the picture's width. The ranges differ
# so that no shape is recognised by its area.
RADII = {"circle": (0.24, 0.29), "square": (0.28, 0.34), "triangle": (0.31, 0.37), "star": (0.32, 0.38)}
MAX_TILT = math.radians(6)
MAX_SHIFT = 0.05  # of the centre from the middle, as a fraction of the width: a world this plain is learned in minutes


# ----------------------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------------------


def draw(shape, colour, background, seed, size=SIZE):
    """Draws one shape near the middle, in a random size and slightly tilted.

    Args:
        shape: one of `SHAPES` or `NEW_SHAPE`.
        colour: a key of `COLOURS`.
        background: a key of `BACKGROUNDS`.
        seed: int; the same arguments give the same picture.
        size: width and height in pixels.

    Returns:
        An RGB `PIL.Image` of size x size pixels, antialiased.

    Raises:
        KeyError: an unknown shape, colour or background.
    """
    rng = random.Random(f"{seed} picture")
    radius = rng.uniform(*RADII[shape])
    centre = (0.5 + rng.uniform(-MAX_SHIFT, MAX_SHIFT), 0.5 + rng.uniform(-MAX_SHIFT, MAX_SHIFT))
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)

    scale = 8 * size  # supersampled, then averaged down
    image = Image.new("RGB", (scale, scale), BACKGROUNDS[background])
    corners = [(scale * (centre[0] + radius * x), scale * (centre[1] + radius * y)) for x, y in _corners(shape, tilt)]
    ImageDraw.Draw(image).polygon(corners, fill=COLOURS[colour])
    return image.resize((size, size), Image.Resampling.BOX)


def _corners(shape, tilt):
    """Corners of a shape of circumradius 1, upright at tilt 0, y pointing down."""
    count, start, inner = {
        "circle": (96, 0.0, 1.0),
        "square": (4, math.pi / 4, 1.0),
        "triangle": (3, -math.pi / 2, 1.0),
        "star": (10, -math.pi / 2, PENTAGRAM),
    }[shape]
    angles = [start + tilt + 2 * math.pi * k / count for k in range(count)]
    radii = [inner if k % 2 else 1.0 for k in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, radii, strict=True)]


def caption(shape, colour, background, seed):
    """Words the caption of an example by one of `TEMPLATES`, which the seed picks."""
    template = random.Random(f"{seed} caption").choice(TEMPLATES)
    return template.format(shape=shape, colour=colour, background=background)


def examples(shapes, count, seed):
    """Names `count` examples in which every combination of shape, colour and background is as frequent as any other.

    Args:
        shapes: sequence of shape names.
        count: number of examples.
        seed: int.

    Returns:
        List of (shape, colour, background, seed of the example).
    """
    combinations = [(s, c, b) for s in shapes for c in COLOURS for b in BACKGROUNDS]
    return [(*combinations[k % len(combinations)], seed * 1_000_003 + k) for k in range(count)]


def write_folder(folder, shapes, count, seed, size=SIZE):
    """Writes a data set in the imagefolder layout of `datasets`: PNG files and `metadata.jsonl`.

    Args:
        folder: path of the folder, made if it is missing.
        shapes: sequence of shape names.
        count: number of pictures.
        seed: int; the same arguments give the same files.
        size: width and height in pixels.

    Returns:
        The list of captions, in the order of the files. The columns are `file_name` and `text`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, example in enumerate(examples(shapes, count, seed)):
        name = f"{k:05d}.png"
        draw(*example, size=size).save(folder / name)
        rows.append({"file_name": name, "text": caption(*example)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["text"] for row in rows]


# ----------------------------------------------------------------------------------------------------------------------
# The check
# ----------------------------------------------------------------------------------------------------------------------

MAX_BACKGROUND_ERROR = 48  # of the median border pixel, in 0..255, on its worst channel
MAX_COLOUR_ERROR = 80  # Euclidean, in RGB 0..255
MAX_STRAY = 0.02  # pixels that belong to neither the shape nor the background nor the line between, over all pixels
AREA = (0.04, 0.40)  # of the shape over the picture
MIN_BLOB = 0.97  # area of the largest connected blob over that of all foreground
# Intersection over union with the ideal shape. The circle's keeps pentagons out; thin tips lose more to blur.
MIN_OVERLAP = {"circle": 0.90, "square": 0.86, "triangle": 0.84, "star": 0.82}
MIN_LEAD = 0.04  # by which that overlap exceeds the one with the best other shape
TILTS = 24


def mismatch(image, shape, colour, background):
    """Says why a picture does not show the named shape in the named colour on the named background.

    The background is the median of the picture's border, the foreground what is nearer to the shape's colour than to
    it. The foreground must be one blob of the right colour whose soft mask overlaps the ideal shape of equal area and
    centre, at its best tilt, well, and clearly better than every other shape.

    Args:
        image: RGB `PIL.Image`, or array of shape (height, width, 3) in 0..255; height and width equal.
        shape: one of `SHAPES` or `NEW_SHAPE`.
        colour: a key of `COLOURS`.
        background: a key of `BACKGROUNDS`.

    Returns:
        The reason as a few words, or "" where the picture matches.

    Raises:
        ValueError: an image of another shape than (n, n, 3).
    """
    pixels = np.asarray(image, dtype=np.float64)
    if pixels.ndim != 3 or pixels.shape[0] != pixels.shape[1] or pixels.shape[2] != 3:
        raise ValueError(f"expected a square RGB image, got an array of shape {pixels.shape}")

    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    if np.abs(ground - BACKGROUNDS[background]).max() > MAX_BACKGROUND_ERROR:
        return "background colour"

    distance = np.linalg.norm(pixels - ground, axis=2)
    far = distance > max(60.0, 0.6 * np.quantile(distance, 0.98))
    if far.mean() < AREA[0] / 2:
        return "nothing there"
    ink = np.median(pixels[far], axis=0)
    errors = {name: np.linalg.norm(ink - value) for name, value in COLOURS.items()}
    if min(errors, key=errors.get) != colour or errors[colour] > MAX_COLOUR_ERROR:
        return "colour"

    # Where each pixel lies on the way from the background's colour to the shape's, and how far beside that way.
    way = ink - ground
    along = ((pixels - ground) @ way) / (way @ way)
    beside = np.linalg.norm(pixels - ground - np.clip(along, 0, 1)[..., None] * way, axis=2)
    if (beside > 90).mean() > MAX_STRAY:
        return "other colours"

    mask = np.clip(along, 0, 1)
    blob = _largest_blob(mask > 0.5)
    if not AREA[0] <= blob.mean() <= AREA[1]:
        return "size"
    if blob.sum() < MIN_BLOB * (mask > 0.5).sum():
        return "several pieces"

    # Pixels at the blob's rim are partly covered; faint noise elsewhere is no part of the shape.
    mask = np.where(_grow(blob), mask, 0.0)
    overlaps = {name: _best_overlap(mask, name) for name in _SYMMETRY}
    best = overlaps.pop(shape)
    if best < MIN_OVERLAP[shape] or best < max(overlaps.values()) + MIN_LEAD:
        return "shape"
    return ""


def matches(image, shape, colour, background):
    """Whether the picture shows the named shape, colour and background: `mismatch` finds no reason against it."""
    return not mismatch(image, shape, colour, background)


def _grow(mask):
    """A boolean mask and its four-neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _largest_blob(mask):
    """The largest four-connected part of a boolean mask."""
    largest = np.zeros_like(mask)
    rest = mask.copy()
    while rest.sum() > largest.sum():
        blob = np.zeros_like(mask)
        blob[np.unravel_index(rest.argmax(), rest.shape)] = True
        while True:
            grown = _grow(blob) & rest
            if (grown == blob).all():
                break
            blob = grown
        rest &= ~blob
        if blob.sum() > largest.sum():
            largest = blob
    return largest


# Number of corners, and area over the square of the circumradius, of each ideal shape. A circle has no corner.
_SYMMETRY = {
    "circle": (1, math.pi),
    "square": (4, 2.0),
    "triangle": (3, 0.75 * math.sqrt(3)),
    "star": (5, 5 * PENTAGRAM * math.sin(math.pi / 5)),
}


def _ideal(shape, x, y, radius, tilt):
    """Coverage in 0..1 of the pixels at offsets x, y from the centre by the ideal shape, from its signed distance."""
    corners, _ = _SYMMETRY[shape]
    length = np.hypot(x, y)
    if shape == "circle":
        return np.clip(radius - length + 0.5, 0, 1)
    # Fold the plane into half of one corner's sector, where the outline is one straight edge from the corner to the
    # next inner corner (of a star) or to the middle of a side (of a polygon).
    sector = 2 * math.pi / corners
    angle = np.abs((np.arctan2(y, x) - tilt + sector / 2) % sector - sector / 2)
    inner = PENTAGRAM if shape == "star" else math.cos(sector / 2)
    edge = np.array([inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    outside = normal[0] * (length * np.cos(angle) - radius) + normal[1] * length * np.sin(angle)
    return np.clip(0.5 - outside, 0, 1)


@cache
def _grid(size):
    return np.mgrid[:size, :size].astype(np.float64)


def _best_overlap(mask, shape):
    """Best intersection over union of a soft mask with the ideal shape of its area and centre, over all tilts."""
    area = mask.sum()
    rows, columns = _grid(len(mask))
    x = columns - (mask * columns).sum() / area
    y = rows - (mask * rows).sum() / area
    corners, unit_area = _SYMMETRY[shape]
    radius = math.sqrt(area / unit_area)
    tilts = [0.0] if shape == "circle" else np.arange(TILTS) * (2 * math.pi / corners / TILTS)
    ideals = (_ideal(shape, x, y, radius, tilt) for tilt in tilts)
    return max(np.minimum(mask, ideal).sum() / np.maximum(mask, ideal).sum() for ideal in ideals)

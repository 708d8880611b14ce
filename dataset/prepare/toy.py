"""The toy set: generated scenes on which semi-supervised segmentation can be tried in minutes on a CPU.

A scene is a mottled, greyish background under three to five overlapping objects. An object's class is its *pattern*:
bars (upright stripes), bands (level stripes), checks or dots. Colours, outlines, sizes, light and noise are drawn alike
for these four, so a pixel's colour says nothing about which one it is. Eight labelled images show few of these
combinations; the unlabelled ones show many.

Every pixel comes from integers and from +, -, *, / and square roots, which round alike on every machine, and from a
generator seeded by (seed, subset, index): the set is the same each time and each image is independent of the others.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.errors import DataError
from dataset.files import IGNORE_INDEX

CLASSES = ("background", "bars", "bands", "checks", "dots")
PALETTE = ((0, 0, 0), (60, 140, 240), (250, 200, 40), (60, 180, 75), (170, 80, 220))

NUM_LABELED = 8
NUM_UNLABELED = 296
NUM_VAL = 128
# The first NUM_LABELED images of train are the labelled ones.
SUBSETS = {"train": NUM_LABELED + NUM_UNLABELED, "val": NUM_VAL}

VERSION = 2  # raise it with every change of a pixel: sets of another version are made again
MANIFEST = "manifest.json"

# Classes of the topmost objects, in turn: any eight images in a row show every class.
TOP_CLASSES = (1, 3, 2, 4, 1, 3, 2, 4)
# Classes of the objects below are drawn from these: checks and dots are rarer.
CLASSES_BELOW = (1, 1, 1, 2, 2, 2, 3, 3, 4, 4)


def make_toy(root: str | Path, seed: int = 0, force: bool = False) -> None:
    """Write the toy set into the folder `root`, unless it is there and complete.

    `images/{train,val}/*.png`, `labels/{train,val}/*.png` (of the labelled and the validation images only), the lists
    `labeled.txt`, `unlabeled.txt` and `val.txt` with paths relative to `root`, and a manifest with every file's digest.
    An incomplete set is made again, so is one of another seed or version, and any with `force`. The folder appears
    as a whole or not at all; a killed run leaves at most a hidden folder beside it.

    Raises DataError if `root` holds anything else or, without `force`, files that were changed since, all of which is
    left untouched; if it cannot be written, and for a negative `seed`.
    """
    if seed < 0:
        raise DataError(f"seed {seed}: the toy set's seed must be 0 or more")
    root = Path(root).resolve()
    if not force and is_complete(root, seed):
        return
    _check_replaceable(root)
    if not force:
        _check_unchanged(root)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
            made = Path(scratch, "made")
            _write(made, seed)
            if root.exists():
                root.rename(Path(scratch, "old"))
            made.rename(root)
    except OSError as error:
        if is_complete(root, seed):
            return  # another process was faster
        raise DataError(f"{root}: cannot write the toy set: {error.strerror or error}") from None


def is_complete(root: Path, seed: int) -> bool:
    """Whether every file of the set of this seed and version is there, byte for byte."""
    manifest = _read_manifest(root)
    return (manifest.get("seed"), manifest.get("version")) == (seed, VERSION) and _digests(root) == manifest["files"]


def _read_manifest(root: Path) -> dict:
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else {}


def _files(root: Path) -> Iterator[str]:
    """Relative paths of the files under `root`, without the manifest and what macOS's Finder leaves in a folder."""
    paths = (path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())
    return (path for path in paths if path != MANIFEST and path.rpartition("/")[2] != ".DS_Store")


def _digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file by its relative path."""
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in sorted(_files(root))}


def _check_unchanged(root: Path) -> None:
    """Raise DataError if a file is not as it was written, be it damaged or edited; one may be missing."""
    written = _read_manifest(root).get("files", {})
    changed = [name for name, digest in _digests(root).items() if digest != written[name]]
    if changed:
        raise DataError(
            f"{root}: {len(changed)} files were changed since the set was made, such as {changed[0]}: python -m "
            f"scripts.make_toy --root {root} --force makes the whole set again; move what is to be kept away before"
        )


def _check_replaceable(root: Path) -> None:
    """Raise DataError if replacing `root` would lose anything but a toy set's own files."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: a file is where the toy set should go; choose another folder or move it away")
    own = _read_manifest(root).get("files", {})
    foreign = next((name for name in _files(root) if name not in own), None)
    if foreign:
        raise DataError(
            f"{root}: holds {foreign}, which is no part of a toy set; choose another folder or move it away"
        )


def _write(root: Path, seed: int) -> None:
    lists: dict[str, list[str]] = {"labeled": [], "unlabeled": [], "val": []}
    for subset, count in SUBSETS.items():
        for kind in ("images", "labels"):
            (root / kind / subset).mkdir(parents=True)
        for index in range(count):
            picture, label = scene(seed, subset, index)
            name = f"{subset}/{index:04}.png"
            Image.fromarray(picture).save(root / "images" / name)
            if subset == "train" and index >= NUM_LABELED:
                lists["unlabeled"].append(f"images/{name}")
                continue
            image = Image.fromarray(label)
            image.putpalette(_palette())
            image.save(root / "labels" / name)
            lists["val" if subset == "val" else "labeled"].append(f"images/{name} labels/{name}")
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    manifest = {"version": VERSION, "seed": seed, "files": _digests(root)}
    (root / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _palette() -> bytes:
    """`PALETTE`, with white for 255, so that image viewers show labels in colour."""
    return bytes(sum(PALETTE, ())).ljust(3 * IGNORE_INDEX, b"\0") + b"\xff\xff\xff"


def scene(seed: int, subset: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `index` of `subset`: the picture (H, W, 3) and its label (H, W), both uint8; sides of 60 to 80 pixels.

    A label holds indices into `CLASSES`, and 255 along the objects' outlines, as Pascal VOC's do.
    """
    rng = np.random.default_rng([seed, list(SUBSETS).index(subset), index])
    width, height = (int(side) for side in rng.integers(60, 81, 2))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)

    picture = _mix(_mottle(x, y, rng), *_colour_pair(rng, contrast=60, saturation=0.3))
    instance = np.zeros((height, width), np.int64)
    classes, centres = [0], []
    count = int(rng.integers(3, 6))
    for number in range(1, count + 1):
        if number == count:
            classes.append(TOP_CLASSES[index % len(TOP_CLASSES)])
        else:
            classes.append(CLASSES_BELOW[rng.integers(len(CLASSES_BELOW))])
        centres.append(_draw_centre(width, height, centres, rng))
        dx, dy = x - centres[-1][0], y - centres[-1][1]
        inside = _outline(dx, dy, rng)
        pattern = class_pattern(CLASSES[classes[-1]], dx, dy, rng)
        picture[inside] = _mix(pattern, *_colour_pair(rng, contrast=90))[inside]
        instance[inside] = number

    label = np.array(classes, np.uint8)[instance]
    label[_borders(instance)] = IGNORE_INDEX
    return _photograph(picture, x, y, rng), label


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _direction(t: float) -> tuple[float, float]:
    """Cosine and sine of the angle whose half has the tangent `t`: library cosines differ in the last bit."""
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


def _rotate(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, tangent: float = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates turned by up to 2 atan(`tangent`) either way; the default is up to a right angle."""
    cosine, sine = _direction(_uniform(rng, -tangent, tangent))
    return cosine * x + sine * y, cosine * y - sine * x


def _mix(share: np.ndarray, colour: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(H, W) shares in [0, 1] to (H, W, 3) colours: 0 is `colour`, 1 is `other`."""
    return colour + share[..., None] * (other - colour)


def _colour_pair(rng: np.random.Generator, contrast: int, saturation: float = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours at least `contrast` grey levels apart, so that patterns survive without colour."""
    while True:
        pair = rng.integers(20, 236, (2, 3)).astype(np.float64)
        grey = (pair[:, :1] + pair[:, 1:2] + pair[:, 2:]) / 3
        first, second = grey + saturation * (pair - grey)
        red, green, blue = first - second
        if abs(299 * red + 587 * green + 114 * blue) >= 1000 * contrast:
            return first, second


def _draw_centre(width: int, height: int, taken: list, rng: np.random.Generator) -> tuple[float, float]:
    """The candidate farthest from the centres taken: objects overlap, but seldom hide each other."""
    candidates = [(_uniform(rng, 0.1, 0.9) * width, _uniform(rng, 0.1, 0.9) * height) for _ in range(6)]

    def room(point: tuple[float, float]) -> float:
        return min(((point[0] - x) ** 2 + (point[1] - y) ** 2 for x, y in taken), default=0.0)

    return max(candidates, key=room)


def _outline(dx: np.ndarray, dy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where an ellipse, box, hexagon or triangle about the origin lies: (H, W) bool."""
    u, v = _rotate(dx, dy, rng)
    radius = _uniform(rng, 13, 22)
    stretch = _uniform(rng, 0.8, 1.25)
    u, v = u / (radius * stretch), v / (radius / stretch)
    kind = int(rng.integers(4))
    if kind == 0:
        return u * u + v * v < 1
    if kind == 1:
        return np.maximum(abs(u), abs(v)) < 0.88
    if kind == 2:
        return np.maximum(abs(v), abs(v) / 2 + abs(u) * 0.8660254) < 0.95
    return np.maximum(-v, v / 2 + abs(u) * 0.8660254) < 0.7


def class_pattern(name: str, dx: np.ndarray, dy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The class's pattern, tilted by up to 20 degrees, as shares of two colours: (H, W) in [0, 1]."""
    u, v = _rotate(dx, dy, rng, tangent=0.18)
    period = _uniform(rng, 7, 10)
    if name in ("bars", "bands"):
        return _soft(_wave((u if name == "bars" else v) / period) - _uniform(rng, 0.4, 0.6), period)
    period *= 1.5  # a check is half a period wide, and blur would merge smaller ones
    u, v = u / period + _uniform(rng, 0, 1), v / period + _uniform(rng, 0, 1)
    if name == "checks":
        return _soft(4 * (_wave(u) - 0.5) * (_wave(v) - 0.5), period)
    u, v = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    return _soft(_uniform(rng, 0.26, 0.32) - np.sqrt(u * u + v * v), 2 * period)


def _wave(t: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between 0 and 1."""
    return abs(2 * (t - np.floor(t)) - 1)


def _soft(height: np.ndarray, slope: float) -> np.ndarray:
    """A step at height 0, a pixel or two wide."""
    return np.clip(height * slope / 2 + 0.5, 0, 1)


def _mottle(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in [0, 1] of two grain sizes: random values on a grid, interpolated."""
    grain = _uniform(rng, 5, 10)
    total = np.zeros_like(x)
    for size, weight in ((grain, 0.65), (grain / 2, 0.35)):
        u, v = _rotate(x, y, rng)
        u, v = (u - u.min()) / size, (v - v.min()) / size
        i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
        u, v = u - i, v - j
        u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
        grid = rng.random((int(i.max()) + 2, int(j.max()) + 2))
        near = grid[i, j] + u * (grid[i + 1, j] - grid[i, j])
        far = grid[i, j + 1] + u * (grid[i + 1, j + 1] - grid[i, j + 1])
        total += weight * (near + v * (far - near))
    return total


def _borders(instance: np.ndarray) -> np.ndarray:
    """Pixels beside another object or the background, two pixels wide in all: (H, W) bool."""
    edge = np.zeros(instance.shape, bool)
    across, down = instance[:, 1:] != instance[:, :-1], instance[1:] != instance[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _photograph(image: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light and sensor noise, as uint8."""
    u, _ = _rotate(x, y, rng)
    u = (u - u.min()) / (u.max() - u.min())
    low, high = _uniform(rng, 0.65, 0.95), _uniform(rng, 0.95, 1.25)
    image = image * (low + (high - low) * u)[..., None]
    # The sum of four uniform integers is close enough to a normal deviate, and exact.
    amplitude = int(rng.integers(2, 7))
    image = image + rng.integers(-amplitude, amplitude + 1, (4, *image.shape)).sum(0)
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)

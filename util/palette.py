"""Colours for classes that people with colour-blindness can tell apart as well as there are any."""

from __future__ import annotations

import functools

import numpy as np

# Okabe and Ito (2008), "Color Universal Design": eight colours that can be told apart with every kind of colour vision.
OKABE_ITO = (
    *((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115)),
    *((240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
)
# Machado, Oliveira and Fernandes (2009), severity 1: what people without red, green or blue cones see, in linear RGB.
BLINDNESS = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = TO_XYZ.sum(axis=1)


@functools.cache
def colorblind_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """`count` colours, [red, green, blue] of 0 to 255: Okabe and Ito's eight, then each as far as possible from all.

    Far for those who see it worst: the distance is the smallest over the kinds of colour vision. From some twenty
    colours on, neighbours are hard to tell apart for everybody; names and numbers then have to help.
    """
    if count <= len(OKABE_ITO):
        return OKABE_ITO[:count]
    steps = np.linspace(0, 255, 10).round().astype(int)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    seen = perceived(candidates)
    # White is the page, so it counts as taken.
    taken = perceived(np.array([*OKABE_ITO, (255, 255, 255)]))
    distance = np.min([_distance(seen, taken[:, None, index]) for index in range(taken.shape[1])], axis=0)
    colours = list(OKABE_ITO)
    while len(colours) < count:
        best = int(distance.argmax())
        colours.append(tuple(map(int, candidates[best])))
        distance = np.minimum(distance, _distance(seen, seen[:, None, best]))
    return tuple(colours)


def perceived(colours: np.ndarray) -> np.ndarray:
    """CIELAB (kinds of vision, N, 3) of sRGB colours (N, 3) of 0 to 255; distances in it are as large as they look."""
    values = np.asarray(colours) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(np.einsum("kij,nj->kni", BLINDNESS, linear), 0, 1) @ TO_XYZ.T / WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _distance(seen: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,): of N colours to another one, for those who see the smallest difference."""
    return np.linalg.norm(seen - other, axis=-1).min(axis=0)

"""The built-in data: coronal MR slices of a synthetic male pelvis, in the layout of HipMRI.

No patient is in it. Each *case* is a body: tables of rods and blobs describe an average pelvis,
and a case bends, scales and tilts it. Each *week* is a scan of that body: bladder, rectum and
bowel are filled anew, the body lies slightly differently, the scanner picks another scale. A scan
is painted from the skin inwards with soft edges, then shaded by a coil and covered with noise.

Positions are in millimetres from the point midway between the femoral heads: x to the side
(tables give one side and are mirrored), y to the front, z to the head. Arrays are (x, y, z) too.
"""

import argparse
import gzip
import math
import multiprocessing
import os
import signal
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter1d
from tqdm import tqdm

VERSION = 3  # bump it when the pictures change: caches made from older ones are then stale
SHAPE = (256, 128)  # of a slice: left to right, foot to head
PIXEL = (1.68, 1.56)  # mm, along the same axes
FRONT, BACK, FOOT = 44.0, -58.0, -99.0  # mm: the ends of the slab that is cut into slices
FIRST_CASE = 4  # HipMRI counts its patients from 004
SCANS = (1, 1, 2, 1, 1, 1)  # scans per case, in turn
EDGE = 1.7  # mm over which a boundary is blurred: one pixel
SPREAD = 0.6  # pixels: standard deviation of the scanner's point spread within a slice
SIGMA = 2.2  # noise, in the units of TISSUES: 1 % of the brightest fat


def _turn(a, b, degrees):
    """The coordinates `a` and `b` in axes turned from a towards b."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return a * cos + b * sin, b * cos - a * sin


class Rod(NamedTuple):
    """A straight tube from `a` to `b` with round ends, of radius `ra` and `rb` there.

    `taper` is the share of its radius lost towards both ends, which makes the belly of a muscle.
    """

    a: tuple
    b: tuple
    ra: float
    rb: float
    taper: float = 0.0

    def bounds(self):
        ends = np.array([self.a, self.b])
        radii = np.array([[self.ra], [self.rb]])
        return (ends - radii).min(axis=0), (ends + radii).max(axis=0)

    def distance(self, x, y, z):
        (ax, ay, az), (ux, uy, uz) = self.a, np.subtract(self.b, self.a).tolist()
        x, y, z = x - ax, y - ay, z - az
        t = np.clip((x * ux + y * uy + z * uz) / (ux * ux + uy * uy + uz * uz), 0, 1)
        away = np.sqrt((x - t * ux) ** 2 + (y - t * uy) ** 2 + (z - t * uz) ** 2)
        return away - (self.ra + (self.rb - self.ra) * t) * (1 - self.taper * (2 * t - 1) ** 2)


class Blob(NamedTuple):
    """An ellipsoid of radii `r` about `c`, its upper end leant to the side by `lean` degrees."""

    c: tuple
    r: tuple
    lean: float = 0.0

    def bounds(self):
        rx, ry, rz = self.r
        reach = (max(rx, rz), ry, max(rx, rz)) if self.lean else self.r
        return np.subtract(self.c, reach), np.add(self.c, reach)

    def distance(self, x, y, z):
        (cx, cy, cz), (rx, ry, rz) = self.c, self.r
        x, z = _turn(x - cx, z - cz, -self.lean)
        x, y, z = x / rx, (y - cy) / ry, z / rz
        k = np.sqrt(x * x + y * y + z * z)
        # Dividing by the gradient keeps the soft edge one pixel wide along every axis.
        return k * (k - 1) / (np.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2) + 1e-6)


HEAD_OF_FEMUR = (88, 0, 0)
FEMUR = (
    Rod((94, 0, -5), (124, -5, -32), 15, 17),  # neck
    Blob((137, -12, -20), (14, 20, 23), -12),  # trochanters
    Blob((109, -20, -53), (10, 11, 15)),
    Rod((125, -5, -40), (117, 3, -150), 19, 14),  # shaft
)
HIP_BONE = (
    Blob((84, -2, 30), (26, 26, 15), -20), Blob((61, 0, 2), (8, 27, 31), -8),  # socket
    Blob((82, -30, -2), (20, 10, 25)), Blob((76, 27, 4), (16, 8, 18)),
    Rod((86, -4, 36), (101, 2, 74), 15, 9), Blob((113, 4, 98), (8, 50, 56), 22),  # ilium
    Rod((90, -26, 36), (56, -44, 110), 11, 11), Rod((90, -24, 42), (52, -66, 88), 13, 15),
    Rod((70, 22, -5), (17, 46, -28), 11, 10), Blob((12.5, 46, -36), (10, 12, 18)),  # pubis
    Rod((16, 42, -48), (46, -8, -66), 8, 10),
    Rod((80, -26, -6), (62, -36, -48), 17, 16), Blob((58, -30, -60), (15, 22, 19), 12),  # ischium
)
SACRUM = (
    Rod((0, -46, 96), (0, -84, 26), 22, 12),
    Blob((27, -58, 84), (26, 18, 30), 20),
    Blob((-27, -58, 84), (26, 18, 30), -20),
    Rod((0, -84, 26), (0, -70, 2), 9, 5),
)
MUSCLES = (  # from the deep to the shallow, each in a thin sheath of fat
    Blob((51, 0, -4), (9, 38, 46), 7), Rod((44, 16, -42), (106, -20, -28), 14, 8, 0.6),  # obturator
    Rod((30, -60, 52), (124, -24, 10), 14, 8, 0.6),  # piriformis, quadratus femoris
    Rod((66, -30, -50), (108, -26, -52), 15, 15, 0.6),
    Rod((40, -12, -78), (92, -8, -150), 20, 30, 0.3),  # adductors
    Rod((34, 42, -28), (104, 8, -66), 13, 12, 0.6), Rod((18, 38, -48), (96, 14, -140), 12, 17, 0.3),
    Rod((18, 14, -64), (34, 2, -150), 9, 9, 0.3),
    Rod((60, -38, -68), (88, -46, -150), 15, 22, 0.3),  # hamstrings
    Rod((120, 24, -58), (112, 30, -150), 17, 24, 0.3),  # vasti
    Rod((146, -2, -50), (138, 8, -150), 18, 26, 0.3),
    Blob((125, 4, 46), (13, 34, 38), 18), Blob((145, -8, 62), (19, 42, 50), 16),  # glutei
    Rod((42, -64, 66), (138, -44, 14), 20, 17, 0.6),
    Rod((34, -68, 40), (132, -48, -18), 21, 18, 0.6),
    Rod((30, -70, 12), (122, -50, -52), 21, 18, 0.6),
    Blob((98, 14, 84), (12, 34, 44), 24), Rod((46, 0, 120), (82, 32, 22), 21, 15, 0.3),  # iliopsoas
    Rod((82, 32, 22), (106, -4, -48), 15, 9, 0.3),
    Rod((98, 46, 2), (112, 56, -150), 9, 18, 0.3),  # rectus femoris, sartorius, tensor fasciae
    Rod((124, 52, 30), (72, 56, -120), 10, 9, 0.3), Blob((154, 30, 18), (11, 18, 52), -6),
)
FAT_PADS = (Blob((80, 48, -14), (20, 18, 46), 6), Blob((30, -42, -42), (17, 32, 32), 12))
ARTERY = ((44, 8, 120), (68, 42, 20), (77, 50, -25), (82, 36, -150))

TEXTURES = ("grain", "mottle", "blotch", "fibre", "septa", "streak")
TISSUES = {  # mean, in the units of HipMRI, then the weights of TEXTURES relative to it
    "skin": (70,),
    "fat": (140, 0.05, 0.06, 0.11, 0.02, -0.21),
    "inner fat": (132, 0.08, 0.12, 0.12, 0.00, -0.22, 0.11),
    "muscle": (31, 0.11, 0.11, 0.12, 0.12, 0.11, 0.90),
    "cortex": (9, 0.15, 0.15),
    "marrow": (86, 0.08, 0.12, 0.10, 0.00, -0.08, 0.09),
    "yellow marrow": (112, 0.06, 0.10, 0.07, 0.02, -0.09, -0.09),
    "cartilage": (58, 0.08, 0.08),
    "wall": (47, 0.09, 0.11, 0.08, 0.00, 0.08),
    "urine": (80, 0.04, 0.06, 0.17),
    "prostate": (110, 0.11, 0.19, 0.08, 0.00, -0.11),
    "gland": (82, 0.09, 0.21, 0.09, 0.00, 0.34),
    "vesicle": (140, 0.11, 0.22, 0.00, 0.00, -0.45),
    "stool": (80, 0.12, 0.26, 0.11, 0.00, 0.15, 0.15),
    "fluid": (210, 0.04, 0.09, 0.08, 0.00, -0.19),
    "gas": (4,),
    "artery": (16, 0.15, 0.15),
    "vein": (165, 0.06, 0.08),
    "erectile": (120, 0.06, 0.09, 0.06),
    "testis": (165, 0.04, 0.04, 0.04, 0.00, -0.08),
}


def _vary(part, rng, mm):
    """`part` with its centre or its ends moved by about `mm`."""
    ends = {name: v for name, v in part._asdict().items() if name in "abc"}
    return part._replace(**{k: np.add(v, rng.normal(0, mm, 3)).tolist() for k, v in ends.items()})


def _union(a, b, fillet):
    """The smaller of two distances (mm), rounded where they meet."""
    h = np.clip(0.5 + (b - a) / (2 * fillet), 0, 1)
    return b + (a - b) * h - fillet * h * (1 - h)


def _waves(rng, shape, cells):
    """Smooth noise, float32 `shape` of variance 1, with about `cells` bumps along each axis."""
    field = rng.standard_normal([c + 3 for c in cells], dtype=np.float32)
    # einsum, not matmul: BLAS may sum in another order when it has other threads. The first axis
    # comes last, because its product runs along contiguous memory.
    for axis, product in ((2, "kc,abc->abk"), (1, "jb,abk->ajk"), (0, "ia,ajk->ijk")):
        n, c = shape[axis], cells[axis]
        at = (np.arange(n)[:, None] + 0.5) / n * c - np.arange(-1, c + 2)
        weight = np.exp(-at * at)
        weight /= np.sqrt((weight**2).sum(axis=1, keepdims=True))
        field = np.einsum(product, weight.astype(np.float32), field)
    return field


def _speckle(rng, shape, sigmas):
    """White noise blurred by `sigmas` voxels along each axis, float32 `shape` of variance 1."""
    field = rng.standard_normal(shape, dtype=np.float32)
    for axis, sigma in enumerate(sigmas):
        if sigma:
            field = gaussian_filter1d(field, sigma, axis, mode="wrap", truncate=2.5)
    return field / field.std()


class _Scene:
    """A scan being painted: `image`, and `place`, the point of the average body in each voxel."""

    def __init__(self, body, weave, scan, n_slices):
        """`body`, `weave`, `scan`: the generators of a case's form, its textures and a week."""
        shape = (SHAPE[0], n_slices, SHAPE[1])
        self.image = np.zeros(shape, np.float32)
        shift = scan.integers(-2, 3, 2)  # pixels
        foot = FOOT + body.normal(0, 5)
        axes = (
            (np.arange(SHAPE[0]) - (SHAPE[0] - 1) / 2 - shift[0]) * PIXEL[0],
            FRONT + (BACK - FRONT) * (np.arange(n_slices) + 0.5) / n_slices,
            (np.arange(SHAPE[1]) - shift[1]) * PIXEL[1] + foot,
        )
        x, y, z = np.meshgrid(*(a.astype(np.float32) for a in axes), indexing="ij", sparse=True)
        x, z = _turn(x, z, body.normal(0, 1.3) + scan.normal(0, 0.5))
        y, z = _turn(y, z, body.normal(0, 4) + scan.normal(0, 0.7))
        size, wide = body.normal(1, 0.03), body.normal(1, 0.025)
        self.place, self.reach = [], []
        for axis, p in enumerate((x / (size * wide), y / size, z / size)):
            bend = 3.2 * _waves(body, shape, (6, 2, 3)) + 1.2 * _waves(body, shape, (22, 5, 11))
            self.place.append(p + bend)
            others = tuple({0, 1, 2} - {axis})
            self.reach.append((self.place[-1].min(others), self.place[-1].max(others)))
        lobes = _speckle(weave, shape, (3.2, 0.6, 3.2))
        fibre = _speckle(weave, shape, (0.8, 0.5, 4))
        texture = {
            "grain": _speckle(weave, shape, (0.7, 0, 0.7)),
            "mottle": _speckle(weave, shape, (1.8, 0.6, 1.8)),
            "blotch": _waves(weave, shape, (24, 6, 12)),
            "fibre": fibre,
            "septa": np.maximum(0, 1 - np.abs(lobes) / 0.16),
            "streak": np.maximum(0, np.abs(fibre) - 1.5),
        }
        self.texture = {name: np.roll(t, shift, (0, 2)) for name, t in texture.items()}
        self.gain = {name: math.exp(scan.normal(0, 0.08)) for name in TISSUES}

    def box(self, low, high, side):
        """The smallest block of voxels that holds all that lies between `low` and `high`."""
        if side < 0:
            low, high = np.array((-high[0], *low[1:])), np.array((-low[0], *high[1:]))
        index = []
        for least, most, (start, stop) in zip(low, high, self.reach, strict=True):
            hit = np.flatnonzero((start <= most) & (stop >= least))
            index.append(slice(hit[0], hit[-1] + 1) if len(hit) else slice(0, 0))
        return tuple(index)

    def shape(self, parts, side=1, fillet=5.0):
        """The block of voxels around the union of `parts`, and the signed distance (mm) there."""
        margin = EDGE + fillet
        bounds = [(low - margin, high + margin) for low, high in (p.bounds() for p in parts)]
        lows, highs = zip(*bounds, strict=True)
        outer = self.box(np.min(lows, axis=0), np.max(highs, axis=0), side)
        distance = np.full(self.image[outer].shape, 99, np.float32)
        for part, bound in zip(parts, bounds, strict=True):
            box = self.box(*bound, side)
            x, y, z = (p[box] for p in self.place)
            inner = tuple(
                slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True)
            )
            distance[inner] = _union(distance[inner], part.distance(x * side, y, z), fillet)
        return outer, distance

    def fill(self, box, distance, tissue):
        """Paint `tissue` where `distance` is negative."""
        mean, *weights = TISSUES[tissue]
        value = 1.0
        for name, weight in zip(TEXTURES, weights, strict=False):
            if weight:
                value = value + weight * self.texture[name][box]
        cover = np.clip(0.5 - distance / EDGE, 0, 1)
        self.image[box] += cover * (value * (mean * self.gain[tissue]) - self.image[box])

    def paint(self, tissue, *parts, side=1, rim=None, thick=2.0, fillet=5.0):
        """Fill the union of `parts`, inside a `rim` of another tissue about `thick` mm wide."""
        box, distance = self.shape(parts, side, fillet)
        if rim:
            self.fill(box, distance, rim)
            distance = distance + thick * (1 + 0.15 * self.texture["blotch"][box])
        self.fill(box, distance, tissue)


def _paint_body(scene, rng):
    """Skin, fat and a bed of muscle, two thighs below; returns the distance (mm) to the fascia."""
    x, y, z = np.abs(scene.place[0]), scene.place[1], scene.place[2]
    width, depth = rng.uniform(166, 190), rng.uniform(100, 120)
    fat, apart = rng.uniform(9, 30), rng.uniform(1, 8)
    rise = np.clip((z + 20) / 110, 0, 1)
    wide = width * (1 - rng.uniform(-0.02, 0.1) * rise * rise * (3 - 2 * rise))
    floor = np.minimum(z + 14, 0) / 48
    trunk = np.sqrt((x / wide) ** 2 + ((y + 22) / depth) ** 2 + floor * floor)
    half = (0.97 * width - apart) / 2 + 0.07 * np.minimum(z + 60, 40)
    dome = np.maximum(z + 30, 0) / 60
    thigh = np.sqrt(((x - apart - half) / half) ** 2 + ((y + 8) / 84) ** 2 + dome * dome)
    trunk = (trunk - 1) * wide / (1 - 2.6 * floor)  # mm below the floor as well as beside it
    skin = _union(trunk, (thigh - 1) * half, 22)
    fat = fat * (0.35 + 0.65 * np.clip(x / 110, 0, 1)) * (1 + 0.15 * scene.texture["blotch"])
    fascia = skin + 3 + fat
    for distance, tissue in ((skin, "skin"), (skin + 2.2, "fat"), (fascia, "muscle")):
        scene.fill((slice(None),) * 3, distance, tissue)
    return fascia


def _paint_cavity(scene, rng):
    """The fat of the pelvis and belly, and the loops of bowel that lie in it this week."""
    pelvis, belly = Rod((0, -6, -22), (0, 0, 40), 38, 56), Rod((0, 0, 40), (0, 8, 120), 56, 104)
    scene.paint("inner fat", pelvis, belly)
    for _ in range(34):
        centre, turn = rng.uniform((-80, -35, 52), (80, 50, 112)), rng.normal(0, 13, 3)
        wide = rng.uniform(8, 15)
        content = rng.choice(["stool", "fluid", "gas", "wall"], p=[0.45, 0.2, 0.15, 0.2])
        loop = Rod((centre - turn).tolist(), (centre + turn).tolist(), wide, wide * 0.9)
        scene.paint(str(content), loop, rim="wall", thick=2.4)


def _paint_frame(scene, rng, fascia):
    """Muscles, vessels and bones: what does not change by week."""
    head = rng.normal(24, 1.2)
    for side in (1, -1):
        for pad in FAT_PADS:
            scene.paint("inner fat", pad, side=side)
        for muscle in MUSCLES:
            box, belly = scene.shape([_vary(muscle, rng, 2.5)], side)
            belly = np.maximum(belly, fascia[box])
            scene.fill(box, belly, "inner fat")
            # The blotches let the sheath come and go, as it does where bellies touch.
            scene.fill(box, belly + 0.6 + 0.6 * scene.texture["blotch"][box], "muscle")
        for a, b in zip(ARTERY, ARTERY[1:], strict=False):
            vein = Rod((a[0] - 9, *a[1:]), (b[0] - 9, *b[1:]), 5, 5)
            scene.paint("vein", vein, side=side, rim="wall", thick=1)
            scene.paint("artery", Rod(a, b, 4.5, 4), side=side)
        box, hip = scene.shape([_vary(part, rng, 1) for part in HIP_BONE], side, fillet=8)
        x, y, z = (p[box] for p in scene.place)
        socket = Blob(HEAD_OF_FEMUR, (head + 4,) * 3).distance(x * side, y, z)
        hip = np.maximum(hip, -socket)
        scene.fill(box, hip, "cortex")
        scene.fill(box, hip + 2.2, "marrow")
        scene.paint("cartilage", Blob(HEAD_OF_FEMUR, (head + 3,) * 3), side=side)
        femur = [Blob(HEAD_OF_FEMUR, (head,) * 3), *(_vary(part, rng, 1.5) for part in FEMUR)]
        box, femur = scene.shape(femur, side, fillet=8)
        below = np.clip((-38 - scene.place[2][box]) / 20, 0, 1)  # the shaft has a thicker wall
        scene.fill(box, femur, "cortex")
        scene.fill(box, femur + 2.2 + 2.8 * below, "yellow marrow")
    scene.paint("marrow", *SACRUM, rim="cortex", fillet=14)
    for side in (1, -1):
        for z in (90, 70, 52):  # the holes by which the nerves leave
            scene.paint("inner fat", Rod((17, -30, z), (15, -100, z - 6), 4, 4), side=side)
    scene.paint("wall", Blob((0, 46, -36), (4.5, 12, 17)))  # the disc between the pubic bones


def _paint_organs(scene, body, scan):
    """Bladder, rectum, prostate and genitals; the first two are filled as they are this week."""
    mid, gland = body.normal(0, 2), body.uniform(0.85, 1.3)
    full, wind = scan.uniform(0.2, 1), scan.uniform(11, 21)
    wide, deep, tall = 30 + 20 * full, 24 + 10 * full, 14 + 20 * full
    lean = mid + scan.normal(0, 3)
    base = Blob((lean, 18, 3 + tall), (wide, deep, tall), scan.normal(0, 4))
    dome = (lean + scan.normal(0, 8), 24, 6 + 1.5 * tall)
    dome = Blob(dome, (wide * 0.75, deep * 0.8, tall * 0.8))
    scene.paint("urine", base, dome, rim="wall", thick=body.uniform(2.5, 5), fillet=12)

    box, sling = scene.shape([Rod((0, -14, -58), (0, 0, 6), 13, 52)])  # the pelvic floor, a funnel
    scene.fill(box, np.maximum(np.abs(sling) - 1.8, scene.place[2][box]), "muscle")

    skin, bend, bulge = (mid, -22, -68), (mid, -34, -30), (mid + scan.normal(0, 4), -44, 18)
    upper = Rod(bulge, (scan.normal(8, 10), -30, 58), wind, 13)
    scene.paint("stool", Rod(skin, bend, 10, 11), rim="wall", thick=6)
    scene.paint("stool", Rod(bend, bulge, 12, wind), upper, rim="wall", thick=3)
    gas = scan.uniform(0, 1)
    if gas > 0.35:
        bubble = (wind * 0.7, wind * 0.6, 30 * gas)
        scene.paint("gas", Blob((bulge[0], -38, 10 + 20 * gas), bubble))

    for side in (1, -1):
        scene.paint("vesicle", Blob((18 + side * mid, -9, 7), (19, 8, 8), -20), side=side)
    outer, inner = (25 * gland, 17 * gland, 19 * gland), (16 * gland, 12 * gland, 14 * gland)
    scene.paint("prostate", Blob((mid, 5, 3 - 19 * gland), outer), rim="wall", thick=1.2)
    scene.paint("gland", Blob((mid, 9, 5 - 17 * gland), inner), rim="wall", thick=0.6)
    scene.paint("urine", Rod((mid, 8, 6), (mid, 8, -60), 2.2, 2.2))
    scene.paint("erectile", Blob((0, 10, -64), (9, 16, 11)), rim="cortex", thick=1.2)
    scene.paint("erectile", Rod((0, 54, -60), (0, 60, -130), 13, 12), rim="cortex", thick=1.5)
    sac = body.normal(-98, 5)
    scene.paint("muscle", Blob((0, 44, sac), (36, 22, 30)), rim="skin")
    for side in (1, -1):
        crus = Rod((10, 32, -52), (36, -2, -66), 6, 5)
        scene.paint("erectile", crus, side=side, rim="wall", thick=1)
        scene.paint("testis", Blob((17, 44, sac), (13, 15, 19)), side=side, rim="cortex", thick=1.2)


def volume(seed: int, case: int, week: int, n_slices: int = 16) -> np.ndarray:
    """Scan `case` in `week`: int16 (n_slices, 256, 128), MR units of at least 0, front to back.

    A pure function of its arguments. Cases share nothing; the weeks of a case share the body.
    """
    body = np.random.default_rng([seed, case])
    weave = np.random.default_rng([seed, case, 0, 2])
    scan = np.random.default_rng([seed, case, week, 1])
    scene = _Scene(body, weave, scan, n_slices)
    if scan.random() < 0.2:
        scene.gain["urine"] *= scan.uniform(1.5, 2.2)
    fascia = _paint_body(scene, body)
    _paint_cavity(scene, scan)
    _paint_frame(scene, body, fascia)
    _paint_organs(scene, body, scan)

    image = scene.image
    for axis in (0, 2):
        image = gaussian_filter1d(image, SPREAD, axis, truncate=3)
    image = image * np.exp(0.17 * _waves(scan, image.shape, (3, 1, 2)))  # the coil
    noise = SIGMA * scan.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.sqrt((image + noise[0]) ** 2 + noise[1] ** 2)
    image[image < 2 * SIGMA] = 0  # scanners blank the air: most of it is exactly 0
    image *= math.exp(scan.uniform(math.log(0.6), math.log(1.6)))
    return np.rint(image).astype(np.int16).transpose(1, 0, 2)


def _write(root, seed, n_slices, job):
    """Write the slices of one scan; `job` is (split, case, week)."""
    split, case, week = job
    thick = (FRONT - BACK) / n_slices
    affine = np.zeros((4, 4))
    affine[0, 0], affine[2, 1], affine[1, 2] = *PIXEL, -thick
    for i, pixels in enumerate(volume(seed, case, week, n_slices)):
        affine[:, 3] = -PIXEL[0] * (SHAPE[0] - 1) / 2, FRONT - thick * (i + 0.5), FOOT, 1
        image = nib.Nifti1Image(pixels, affine)
        image.header["descrip"] = f"synthetic phantom v{VERSION}, no patient"
        name = f"case_{case:03d}_week_{week}_slice_{i}.nii.gz"
        # A file name or a time in the gzip header would make equal slices unequal files.
        data = gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
        (root / f"keras_slices_{split}" / name).write_bytes(data)


def _for_each(function, jobs, workers, progress):
    """Call `function` on each of `jobs` in `workers` processes, behind a progress bar."""
    # Forking spares the workers a second import of the caller, who may have loaded torch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    quiet = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    with ProcessPoolExecutor(workers, context, initializer=quiet) as pool:
        try:
            results = pool.map(function, jobs)
            for _ in tqdm(results, "phantom", len(jobs), unit="scan", disable=not progress):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def make_phantom(
    root: Path,
    seed: int = 0,
    n_cases: int = 180,
    weeks: int | None = None,
    slices_per_volume: int = 16,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Write the data set under `root`, which must be empty or absent.

    `weeks` is the number of scans of every case (default: 1 or 2). Of 180 cases 150 train, 12
    validate and 18 test; other numbers, at least 3, keep these shares. The files do not depend on
    `workers`, the number of processes (default: one per core). `root` appears only when complete.
    """
    root = Path(root)
    if n_cases < 3:
        raise ValueError(f"{n_cases} cases cannot fill three splits: use at least 3")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not empty")
    n_validate, n_test = max(1, round(n_cases / 15)), max(1, round(n_cases / 10))
    n_train = n_cases - n_validate - n_test
    splits = ["train"] * n_train + ["validate"] * n_validate + ["test"] * n_test
    jobs = [
        (split, FIRST_CASE + i, week)
        for i, split in enumerate(splits)
        for week in range(weeks or SCANS[i % len(SCANS)])
    ]
    about = (
        "Synthetic coronal MR slices of the male pelvis. No patient is in them: phantom.py\n"
        f"computed them (version {VERSION}, seed {seed}, {n_cases} cases, {len(jobs)} scans of "
        f"{slices_per_volume} slices).\n"
    )
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as draft:
        draft = Path(draft, root.name)
        for split in ("train", "validate", "test"):
            (draft / f"keras_slices_{split}").mkdir(parents=True)
        (draft / "README.txt").write_text(about)
        write = partial(_write, draft, seed, slices_per_volume)
        _for_each(write, jobs, min(workers or os.cpu_count() or 1, len(jobs)), progress)
        try:
            os.replace(draft, root)
        except OSError:
            # Another process may have been faster; that is fine if it made the same set.
            readme = root / "README.txt"
            if not readme.is_file() or readme.read_text() != about:
                raise


def main():
    parser = argparse.ArgumentParser(
        description="Write a synthetic pelvis as NIfTI slices in the layout of the HipMRI study.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out = {"type": Path, "required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--out", **out, help="directory to make; must be empty or absent")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other bodies")
    parser.add_argument("--n_cases", type=int, default=180, help="synthetic patients, at least 3")
    parser.add_argument("--slices", type=int, default=16, help="slices per scan")
    args = parser.parse_args()
    try:
        make_phantom(args.out, args.seed, args.n_cases, slices_per_volume=args.slices)
    except (FileExistsError, ValueError) as error:
        parser.exit(2, f"phantom.py: {error}\n")


if __name__ == "__main__":
    main()

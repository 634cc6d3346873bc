"""What a slice is: find the images, tell the patients apart, split, read, normalise, cache.

    data = load("/data/HipMRI_study_keras_slices_data")
    data["train"].batch([0, 1, 2])  # (3, 1, 256, 128) float32 in [0, 1]

    python dataset.py --data PATH   # what is there: text, contact sheet, histogram

Layouts, recognised by looking:
  (a) HipMRI 2D   keras_slices_{train,validate,test}/case_004_week_0_slice_0.nii.gz
  (b) HipMRI 3D   semantic_MRs_anon/Case_004_Week0_LFOV.nii.gz, cut into slices
  (c) ADNI 2D     AD_NC/{train,test}/{AD,NC}/<scan>_<slice>.jpeg, meta_data_with_label.json
  (d) any folder  of NIfTI, PNG, JPEG or TIFF slices, or of NIfTI volumes, with or without folders
                  for the splits (train, val, test and their synonyms) and the classes
Label maps (folders or files named seg, label, mask, semantic) are passed over and counted.

The first of these that fits a name tells the patient; --group_regex takes the place of all:
  1. case_NNN_week_W[_slice_S]            patient case_NNN, volume case_NNN_week_W
  2. an identifier in the name            sub-XX (BIDS), OAS1_NNNN (OASIS), NNN_S_NNNN (ADNI)
  3. a folder named after a patient       sub-XX, case12, patient_3, P7, 1001, NNN_S_NNNN
  4. <letters><digits>[_...]_<slice>      s003_01, 1001_axi_12, scan7_slice_4
The volume is the path without the slice number, the last number of the name.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import math
import mmap
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.nifti1 import header_dtype
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import phantom
import plots
import utils
from utils import UserError

FORMAT = 5  # of the cache; raise it whenever the same files would give other pixels
PERCENTILE = 99.5
SPLITS = ("train", "validate", "test")
HELD_OUT = 0.15  # share of the patients for each split that the data does not bring
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the world axis that crosses each plane
NIFTI, RASTER = (".nii", ".nii.gz"), (".png", ".jpg", ".jpeg", ".tif", ".tiff")
RASTER_FORMATS = ("PNG", "JPEG", "TIFF")
MOST_VOXELS = 1 << 28  # of a NIfTI file, likewise: 512 x 512 x 1024
HELD_PIXELS = 1 << 24  # of one volume in memory at once: 64 MiB in each process
NOT_UTF8 = "its name is not UTF-8; rename it"
ADNI_JSON = "meta_data_with_label.json"
ADNI_CLASSES = {"AD", "NC", "CN", "MCI", "EMCI", "LMCI"}

_SPLIT = re.compile(
    r"(?:^|[-_ ])(train(?:ing)?|val(?:id(?:ate|ation)?)?|test(?:ing)?)(?:[-_ ]images?)?$", re.I
)
_LABELS = (
    r"(?:^|[^a-z])(?:(?:[ad]|prob)?segs?|segmentations?|labels?(?:t[rs])?|(?:brain)?masks?{})"
    r"(?:[^a-z]|$)"
)
_LABEL_FOLDER = re.compile(_LABELS.format(""), re.I)
_LABEL_FILE = re.compile(_LABELS.format("|semantic"), re.I)
_CASE = re.compile(r"case_?(\d+)_week_?(\d+)(?:.*?_slice_?(\d+))?", re.I)
_ADNI = re.compile(r"\d{3}_S_\d{4,5}")
_SCAN = re.compile(r"I?(\d+)")  # what ADNI's JSON knows a patient's scans by
_KNOWN = re.compile(r"sub-[a-z0-9]+|OAS\d_\d{4}|\d{3}_S_\d{4,5}", re.I)
_FOLDER = re.compile(
    r"sub-[a-z0-9]+|(?:case|patient|subject|sub|p|s)[-_ ]?\d+|\d{3,}|\d{3}_S_\d{4,5}", re.I
)
_COUNTER = r"(?:slice|image|img|im|frame|z)"  # numbers behind these, or T1, are no patient's
_GENERAL = re.compile(
    rf"(?!{_COUNTER}[-_ ]?\d|t[12][-_ ])[a-z]*[-_ ]?\d+(?=[-_ ](?:.*[-_ ])?{_COUNTER}?\d+$)", re.I
)
_LAST_NUMBER = re.compile(rf"(?:^|[-_ ])(?:{_COUNTER}[-_ ]?)?(\d+)(?:[-_ ]of[-_ ]\d+)?$", re.I)


# ------------------------------------------------------------------------------------------------
# What callers see
# ------------------------------------------------------------------------------------------------


class Slice(NamedTuple):
    """One 2D image on disk."""

    path: str
    split: str
    patient: str
    volume: str
    label: str | None
    position: float  # in [0, 1] within its volume
    index: int  # which plane of a 3D file, else 0


@dataclass
class SliceSplit:
    """The N slices of one split, sorted by volume and position.

    images: (N, H, W) uint16, value / 65535 in [0, 1], memory-mapped. labels: (N,) int64, index into
    `SliceData.classes`, -1 without a class. positions: (N,) float32 in [0, 1]. patients: N names.
    """

    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    patients: list[str]
    slices: list[Slice] = field(repr=False)

    def __len__(self):
        return len(self.slices)

    def batch(self, indices):
        """(B,) indices -> (B, 1, H, W) float32 tensor in [0, 1]."""
        images = self.images[np.asarray(indices, dtype=np.int64)]
        mapped = getattr(self.images, "_mmap", None)
        if hasattr(mapped, "madvise"):  # or the pages of a whole epoch would stay resident
            mapped.madvise(mmap.MADV_DONTNEED)
        scaled = np.multiply(images, np.float32(1 / 65535), dtype=np.float32)
        return torch.from_numpy(scaled)[:, None]


@dataclass
class SliceData:
    """What `load` returns: `data["train"]`, `data["validate"]`, `data["test"]`, and their story.

    affine: (4, 4) and zooms: (3,) in mm, of the first train slice on the grid of `size`, for NIfTI
    files that imitate the data. intensity_scale, intensity_shift: medians over the train volumes;
    scale times pixel plus shift is in the data's own units. fingerprint: changes with the pixels,
    the splits and the names, not with the place.
    """

    name: str
    is_phantom: bool
    layout: str
    size: tuple[int, int]
    classes: list[str]
    report: dict
    fingerprint: str
    affine: np.ndarray
    zooms: tuple[float, ...]
    intensity_scale: float
    intensity_shift: float
    splits: dict[str, SliceSplit] = field(repr=False)
    common: tuple[int, int] | None  # size of most slices as stored; None: each is seen alone
    cut: dict[str, int] = field(repr=False)  # array axis across which a volume was cut, by path

    def affine_of(self, item: Slice) -> np.ndarray:
        """Affine (4, 4) of the image in use of a slice: lays a map of its pixels on the file."""
        return _grid_affine(item.path, item.index, self.cut.get(item.path), self.common, self.size)

    def __getitem__(self, split) -> SliceSplit:
        return self.splits[split]

    def describe(self) -> str:
        """The data in one line."""
        report = self.report
        line = "PHANTOM (synthetic, no patients)" if self.is_phantom else self.name
        line += f": {self.layout}, {self.size[0]} x {self.size[1]}"
        who = "bodies" if self.is_phantom else "patients"
        for split, n in report["splits"].items():
            line += f"; {split} {n['slices']} slices of {n['patients']} {who}"
        line += f"; split {report['split_origin']}"
        for what in ("cropped", "padded", "shrunk", "unreadable"):
            line += f"; {report[what]} {what}" if report[what] else ""
        return line if report["patients_separable"] else f"{line}; PATIENTS CANNOT BE TOLD APART"


def load(
    data="phantom",
    *,
    image_size=None,
    split_seed=0,
    cache_dir=None,
    workers=None,
    split_policy="patient",
    group_regex=None,
    plane="coronal",
    slices=60,
    skip_unreadable=False,
    progress=True,
) -> SliceData:
    """Find, split, read and cache the slices of a folder, or of the built-in phantom.

    data: "phantom" or a folder. image_size: (H, W) in pixels, default the most common one in train;
    others are cropped or padded. split_seed: of a split that the data does not bring. cache_dir: a
    folder, None for the user's cache, "none" for a temporary folder that goes when the program
    ends. workers: decoding processes, default one per core. split_policy: "as_given" keeps split
    folders that share patients, "patient" does not. group_regex: groups patient, volume, slice,
    searched in relative paths. plane, slices: which planes of a 3D volume, and how many central
    ones.

    Raises UserError for what the user can mend; it lists all unreadable files unless
    skip_unreadable.
    """
    if plane not in PLANES or slices < 1 or min(image_size or [1]) < 1:
        what = f"plane {plane}, {slices} slices of {image_size or 'any size'}"
        raise UserError(f"{data}: no data can be read with {what}; give others")
    default = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = cache_dir or os.environ.get("MRCODES_CACHE") or os.path.join(default, "mrcodes")
    try:
        cache = Path(_temporary_folder().name if cache == "none" else cache).expanduser()
    except RuntimeError:  # no such user
        raise UserError(f"{cache}: no such home folder; give another --cache_dir") from None
    is_phantom = data == "phantom"
    root = cache / f"phantom-v{phantom.VERSION}-seed0" if is_phantom else Path(data)
    try:
        if is_phantom and not root.is_dir():
            phantom.make_phantom(root, workers=workers, progress=progress)
        files, bad, ignored = _walk(root)
        places = (root / "AD_NC", root, *root.absolute().parents[:2])
        meta = next((p / ADNI_JSON for p in places if os.path.isfile(p / ADNI_JSON)), None)
        choices = {
            "format": FORMAT, "percentile": PERCENTILE, "plane": plane, "slices": slices,
            "image_size": image_size and [int(n) for n in image_size], "split_seed": split_seed,
            "split_policy": split_policy, "group_regex": group_regex,
        }  # fmt: skip
        place = str(root.resolve())  # the times of files do not tell two copies apart
        key = repr((place, files, sorted(bad.items()), meta and meta.stat().st_mtime_ns, choices))
        name = os.path.basename(place) or "root"
        entry = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
        if not (found := _open(entry, skip_unreadable)):
            _build(root, files, bad, meta, choices, entry, skip_unreadable, workers, progress)
            found = _open(entry, skip_unreadable)
    except OSError as error:
        why = f"cannot write the cache ({error.strerror or error})"
        raise UserError(f"{cache}: {why}; free some space, or give another --cache_dir") from None
    index, images = found
    report = {"name": name, "root": str(root), "is_phantom": is_phantom, **index["report"]}
    report |= {"ignored": ignored, "preprocessing": choices}
    report["cache"] = "none" if cache_dir == "none" else str(entry)
    for text in report["warnings"]:
        print(f"warning: {root}: {text}", file=sys.stderr)
    numbers = {label: i for i, label in enumerate(report["classes"])}
    splits, start = {}, 0
    for split, counts in report["splits"].items():
        rows = slice(start, start := start + counts["slices"])
        items = [Slice(f"{root}/{path}", *rest) for path, *rest in index["slices"][rows]]
        labels = np.array([numbers.get(item.label, -1) for item in items], dtype=np.int64)
        positions = np.array([item.position for item in items], dtype=np.float32)
        patients = [item.patient for item in items]
        splits[split] = SliceSplit(images[rows], labels, positions, patients, items)
    affine = np.array(index["affine"])
    return SliceData(
        "phantom" if is_phantom else name, is_phantom, report["layout"], tuple(report["size"]),
        report["classes"], report, index["fingerprint"], affine,
        tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()), index["intensity_scale"],
        index["intensity_shift"], splits,
        tuple(index["common"]), {f"{root}/{path}": axis for path, axis in index["cut"].items()},
    )  # fmt: skip


def load_alone(path, size, label=None, position=-1.0) -> SliceData:
    """A slice, or a folder of slices, of no data set: one split, "input", nothing cached.

    Each slice is scaled by its own percentile, shrunk, cropped or padded to size (H, W). label and
    position are those of all; None and -1 where they are not known. A file whose name does not tell
    the patient counts as one.

    Raises UserError for what the user can mend.
    """
    path = Path(path).expanduser()
    if path.is_file():
        root, names, bad = path.parent, [path.name], {}
    else:
        root = path
        files, bad, _ = _walk(path, "--input")
        names = [os.path.join(folder, name).lstrip("/") for folder, name, *_ in files]
    images, slices, unknown, sizes = [], [], [], Counter()
    for name in names:
        if (plain := _plain(name)) != name:
            bad[plain] = NOT_UTF8
            continue
        who = _identify(name, Path(name).parent.parts)
        if who is None:
            unknown.append(name)
        patient, volume, _ = who or (name, name, None)
        found = _images(str(root), name, None, [0])
        if isinstance(found, str):
            bad[name] = found
            continue
        shift, scale, *_ = _window(found)
        shape = found[0].shape
        sizes[shape] += 1
        image = _fit((found[0] - shift) * np.float32(1 / scale), shape, size)
        images.append(np.rint(image.clip(0, 1) * 65535).astype(np.uint16))
        slices.append(Slice(f"{root}/{name}", "input", patient, volume, label, position, 0))
    if bad:
        first = "; ".join(f"{name} ({why})" for name, why in sorted(bad.items())[:10])
        what = f"cannot be read: {first}; give slices, one image in each file"
        raise UserError(f"{_plain(path)}: {what}")
    n, patients = len(slices), [s.patient for s in slices]
    labels, positions = np.full(n, -1), np.full(n, position, np.float32)
    split = SliceSplit(np.stack(images), labels, positions, patients, slices)
    fingerprint = hashlib.sha256(split.images.tobytes()).hexdigest()[:32]
    counts = {"input": {"slices": n, "patients": len(set(patients))}}
    report = {"splits": counts, "split_origin": "not needed"}
    report |= _fitted(sizes, {shape: _placed(shape, shape, size)[0] for shape in sizes}, size)
    report |= {"unreadable": 0, "patients_separable": n == 1 or not unknown}
    report |= {"intensity_rule": f"{PERCENTILE}th percentile of each slice"}
    return SliceData(
        path.name, False, "single slices", tuple(size), [], report, fingerprint, np.eye(4),
        (1.0, 1.0, 1.0), 1.0, 0.0, {"input": split}, None, {},
    )  # fmt: skip


@lru_cache
def _temporary_folder():
    return tempfile.TemporaryDirectory(prefix="mrcodes-")  # goes when the program ends


def _open(entry, skip):
    """(index, images) of a cache entry, or None if it is not there, whole and wanted."""
    try:
        index = json.loads((entry / "index.json").read_text())
        shape = (len(index["slices"]), *index["report"]["size"])
        whole = os.path.getsize(entry / "images.u16") == 2 * math.prod(shape)
        if not whole or (index["bad"] and not skip):  # mended by now, or to be listed
            return None
        return index, np.memmap(entry / "images.u16", np.uint16, "r", shape=shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------
# Find the files, read their names, split by patient
# ------------------------------------------------------------------------------------------------


def _plain(name):
    """A file's name in letters that can be printed."""
    return os.fspath(name).encode("utf8", "backslashreplace").decode()


def _is_image(name):
    return name.lower().endswith(NIFTI + RASTER)


def _walk(root, flag="--data"):
    """Images below root as sorted [(folder, name, size, mtime_ns)], bad files, what was ignored.

    A link back into root is not followed and no folder is read twice, so a loop ends, and no split
    is read under another name. A folder named like an image is looked into.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; give {flag} the folder that holds the slices")
    files, bad, ignored, seen = [], {}, Counter(), set()
    top = Path(root).resolve()

    def note(error):
        bad[os.path.relpath(error.filename, root)] = _why(error)

    for here, folders, names in os.walk(root, onerror=note, followlinks=True):
        folder, stat = os.path.relpath(here, root).removeprefix("."), os.stat(here)
        if (stat.st_dev, stat.st_ino) in seen:
            ignored["links to folders already read"] += 1
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        for name in sorted(folders):
            path = Path(here, name)
            if path.is_symlink() and path.resolve().is_relative_to(top):
                ignored["links to folders already read"] += 1
            elif _LABEL_FOLDER.search(name):
                ignored["folders of label maps"] += 1
            elif not name.startswith("."):
                continue
            folders.remove(name)
        before = len(files)
        for name in names:
            path = os.path.join(folder, name)
            if (plain := _plain(path)) != path:
                bad[plain] = NOT_UTF8
            elif name.startswith("."):
                ignored["hidden files"] += 1
            elif not _is_image(name):
                ignored[f"{os.path.splitext(name)[1].lower() or 'other'} files"] += 1
            elif _LABEL_FILE.search(name):
                ignored["label maps"] += 1
            else:
                try:
                    stat = os.stat(f"{here}/{name}")
                    files.append((folder, name, stat.st_size, stat.st_mtime_ns))
                except OSError:
                    bad[path] = "a broken link"
        if _is_image(folder) and len(files) == before:
            bad[folder] = "a folder named like an image, with no image in it"
    if not files:
        found = "; ".join(f"{k}: {v}" for k, v in [*bad.items(), *ignored.items()]) or "it is empty"
        raise UserError(f"{root}: no NIfTI, PNG, JPEG or TIFF image in it ({found}); check {flag}")
    return sorted(files), bad, dict(ignored)


@dataclass(slots=True)
class _File:
    path: str  # relative
    given: str | None  # the split folder it lies in
    label: str | None
    patient: str
    volume: str
    number: int | None  # of the slice in its volume
    position: float = 0.5
    split: str = "train"


def _plan(root, files, choices, meta):
    """Every file with its patient, volume, label, position and split, sorted; and the report."""
    warnings, regex = [], choices["group_regex"]
    try:
        regex = regex and re.compile(regex)
        if regex and "patient" not in regex.groupindex:
            raise re.error("no group (?P<patient>...)")
    except re.error as error:
        raise UserError(f"--group_regex {choices['group_regex']}: {error}; mend it") from None
    places = {folder: _place(folder) for folder in {f[0] for f in files}}
    # not the study's own folder, whose name has the word too: a stray picture may lie there
    study = {f for f, (given, *_) in places.items() if given and "keras_slices" in f.lower()}
    chosen = study or {f for f, (given, *_) in places.items() if given} or set(places)
    inner = [places[f][1] for f in chosen if not places[f][0]]
    wrap = len(os.path.commonprefix(inner)) if inner else 0  # folders around everything
    plan, unknown = [], []
    for folder, name, *_ in files:
        if folder in chosen:
            path, (given, folders, _) = os.path.join(folder, name), places[folder]
            folders = folders if given else folders[wrap:]
            label = folders[0] if folders and not _FOLDER.fullmatch(folders[0]) else None
            found = _identify(path, folders, regex)
            if not found:
                unknown.append(path)
            plan.append(_File(path, given, label, *(found or (path, path, None))))
    classes = sorted({f.label for f in plan} - {None})
    if len(classes) < 2:
        classes = []
        for file in plan:
            file.label = None
    layout = "folder of slices" + (" in class folders" if classes else "")
    if unknown:
        warnings.append(
            f"{len(unknown)} of {len(plan)} names do not tell the patient (first: {unknown[0]}); "
            "each such file counts as a patient, so one may be in two splits; give --group_regex"
        )
    names = [os.path.basename(f.path) for f in plan]
    cases = [_CASE.match(name) for name in names]
    groups = {f.upper() for _, inner, _ in places.values() for f in (root.name, *inner)}
    if all(cases):
        layout = "HipMRI 2D slices" if any(case[3] for case in cases) else "HipMRI 3D volumes"
    elif (meta or groups & ADNI_CLASSES) and any(re.match(r"I?\d+_\d+\.", n) for n in names):
        layout = "ADNI 2D slices" + (f" ({'_'.join(classes)})" if classes else "")
        unknown += _name_adni_patients(plan, meta, warnings)
    numbers = defaultdict(set)
    for file in plan:
        numbers[file.volume] |= {file.number} - {None}
    ranks = {v: {n: i / max(1, len(known) - 1) for i, n in enumerate(sorted(known))}
             for v, known in numbers.items()}  # fmt: skip
    for file in plan:
        rank = ranks[file.volume]
        file.position = rank.get(file.number, 0.5) if len(rank) > 1 else 0.5
    origin, shared = _set_splits(root, plan, layout, choices, warnings)
    if new := set(classes) - {file.label for file in plan if file.split == "train"}:
        warnings.append(f"no training slice is of class {', '.join(sorted(new))}")
    plan.sort(key=lambda f: (SPLITS.index(f.split), f.volume, f.number or 0, f.path))
    return plan, {
        "layout": layout, "classes": classes, "split_origin": origin, "shared_patients": shared,
        "patients_separable": not unknown, "names_without_patient": len(unknown),
        "renamed_splits": {word: given for given, _, word in places.values() if word != given},
        "warnings": warnings, "outside_split_folders": len(files) - len(plan),
    }  # fmt: skip


def _place(folder):
    """Split and other folders: x/val/AD -> validate, (AD,), val; x/AD -> None, (x, AD), None."""
    folders = tuple(f for f in folder.split("/") if f and not _is_image(f))
    for i in reversed(range(len(folders))):  # the innermost knows best
        if match := _SPLIT.search(folders[i]):
            split = next(s for s in SPLITS if s.startswith(match[1].lower()[:3]))
            return split, folders[i + 1 :], match[1]
    return None, folders, None


def _identify(path, folders, regex=None):
    """Patient, volume and slice number of a file, or None where its name does not tell."""
    stem = re.sub(r"(?i)(\.nii(\.gz)?)?(\.[^.]*)?$", "", os.path.basename(path))
    if regex:
        found = (match := regex.search(path)) and match.groupdict()
        if not found or not found["patient"]:
            return None
        volume, number = (found.get(k) or "" for k in ("volume", "slice"))
        number = int(number) if number.isdecimal() else None
        return found["patient"], f"{found['patient']}/{volume}", number
    if match := _CASE.match(stem):
        patient = f"case_{int(match[1]):03d}"
        return patient, f"{patient}_week_{int(match[2])}", match[3] and int(match[3])
    patient, end = next(filter(_FOLDER.fullmatch, folders), None), 0
    if match := _KNOWN.search(stem) or (not patient and _GENERAL.match(stem)):
        patient, end = match[0], match.end()
    if not patient:
        return None
    tail = _LAST_NUMBER.search(stem, end)  # behind the patient's own number
    volume = "/".join((*folders, stem[: tail.start()] if tail else stem))
    return patient, volume, int(tail[1]) if tail else None


def _name_adni_patients(plan, meta, warnings):
    """Put the patients that ADNI's JSON knows in the place of scans; returns the scans left."""
    patients = {}
    try:
        known = json.loads(meta.read_text(encoding="utf-8-sig")) if meta else {}
        if not isinstance(known, dict | list):
            raise ValueError("no records in it")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{meta}: not readable as JSON ({error}); fetch it again") from None
    for record in known.items() if isinstance(known, dict) else known:
        # {"<scan>": {"raw": ".../ADNI_068_S_0473_...", ...}, ...}, or a list of such records
        text = json.dumps(record)
        if len(found := set(_ADNI.findall(text))) == 1:
            for scan in re.findall(r'["/]I?(\d+)(?:_\d+)?(?:\.\w+)?"', text):
                patients[scan] = min(found)
    for file in plan:
        if scan := _SCAN.fullmatch(file.patient):
            file.patient = patients.get(scan[1], file.patient)
    scans = sorted({f.patient for f in plan if _SCAN.fullmatch(f.patient)})
    if scans:
        why = f"{meta} does not list them" if meta else f"no {ADNI_JSON} beside the images"
        warnings.append(
            f"the patients of {len(scans)} scans are unknown ({why}); each scan counts as a "
            "patient, so one may be in two splits; put the complete JSON there"
        )
    return scans


def _set_splits(root, plan, layout, choices, warnings):
    """Set the split of every file: (where it comes from, number of shared patients)."""
    if layout == "HipMRI 3D volumes" and not any(f.given for f in plan):
        for file in plan:  # as the 2D release splits the same cases
            case = int(_CASE.match(os.path.basename(file.path))[1])
            file.given = "train" if case < 36 else "validate" if case < 40 else "test"
    given, held = {f.given for f in plan}, defaultdict(set)
    for file in plan:
        held[file.patient].add(file.given)
    shared = sum(len(splits) > 1 for splits in held.values()) if None not in given else 0
    keep = "train" in given and None not in given and len(given) > 1
    keep = keep and (not shared or choices["split_policy"] == "as_given")
    if shared:
        then = "kept, so test scores will flatter" if keep else "split anew by patient"
        warnings.append(f"{shared} patients are in more than one of the given splits; {then}")
    for file in plan:
        file.split = file.given if keep else "train"
    origin = "as given" if keep else "replaced" if shared else "not given"
    missing = [s for s in SPLITS[1:] if not keep or s not in given]
    if missing:
        pool = [file for file in plan if file.split == "train"]
        patients, seed = {file.patient for file in pool}, choices["split_seed"]
        if len(patients) <= len(missing):
            everyone, need, where = {file.patient for file in plan}, list(SPLITS), ""
            if len(everyone) >= len(SPLITS):  # enough, were they not in the other splits
                everyone, need, where = patients, ["train", *missing], " in train"
            who = f"{len(everyone)} patient{'s' * (len(everyone) > 1)}{where}"
            need = f"{len(need)} are needed, one each for {', '.join(need[:-1])} and {need[-1]}"
            raise UserError(
                f"{root}: found {who} ({', '.join(sorted(everyone))}), {need}; add patients, put "
                "slices into train/validate/test folders, or name them with --group_regex"
            )
        # a hash gives every patient the same rank on every machine
        salted = {p: f"{seed}:{p}".encode("utf8", "replace") for p in patients}
        ranked = sorted(patients, key=lambda p: hashlib.sha256(salted[p]).digest())
        n = max(1, round(HELD_OUT * len(ranked)))
        moved = {p: s for i, s in enumerate(missing) for p in ranked[i * n : (i + 1) * n]}
        for file in pool:
            file.split = moved.get(file.patient, "train")
        origin += f", {' and '.join(missing)} taken from train by patient, split seed {seed}"
    return origin, shared


# ------------------------------------------------------------------------------------------------
# Read one file
# ------------------------------------------------------------------------------------------------


class _Unreadable(Exception):
    """Why a file cannot be used, in words for the user."""


_REASONS = {
    PermissionError: "no permission to read it",
    FileNotFoundError: "vanished",
    EOFError: "truncated gzip",
    (zlib.error, gzip.BadGzipFile): "damaged gzip",
    UnidentifiedImageError: "not an image, whatever its name says",
    nibabel.filebasedimages.ImageFileError: "not a NIfTI file, whatever its name says",
}


def _why(error):
    """One line on what an exception says about a file."""
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return reason
    first_line = (str(error).splitlines() or [""])[0][:120]
    plain = isinstance(error, OSError | _Unreadable)
    return first_line if plain else f"{type(error).__name__}: {first_line}"


def _squeezed(shape):
    """Shape of a slice or a volume without its dimensions of 1; refuses what is neither."""
    squeezed = tuple(shape) if len(shape) == 2 else tuple(n for n in shape if n != 1)
    full = " x ".join(map(str, shape))
    if min(shape, default=1) < 1:
        raise _Unreadable(f"no pixels, its header says {full}")
    if math.prod(shape) > MOST_VOXELS:
        raise _Unreadable(f"its header says {full}, too many pixels for slices or a volume")
    if len(squeezed) not in (2, 3) or len(shape) > 4:
        raise _Unreadable(f"{len(shape)}D ({full}), neither a slice nor a volume")
    return squeezed


_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2"}  # code: numpy


def _read_nifti(path):
    """(H, W) or (X, Y, Z) array of a NIfTI file, with the values that nibabel gives.

    Plain NIfTI-1 is decoded here, at less than half of nibabel's time; all else is left to nibabel.
    """
    data = Path(path).read_bytes()
    is_packed = data[:2] == b"\x1f\x8b"
    head = _unpacked(data, 352) if is_packed else data[:352]
    if len(head) == 352:
        head = np.frombuffer(head, header_dtype, 1)[0]
        dtype, (n, *dim) = _DTYPES.get(int(head["datatype"])), head["dim"].tolist()
        offset, slope, inter = (float(head[k]) for k in ("vox_offset", "scl_slope", "scl_inter"))
        plain = (head["sizeof_hdr"], head["magic"]) == (348, b"n+1") and dtype and 0 < n < 8
        if plain and min(dim[:n]) > 0 and 352 <= offset < 1e6 and math.isfinite(slope + inter):
            shape = _squeezed(dim[:n])
            count = math.prod(shape)
            size = int(offset) + count * np.dtype(dtype).itemsize
            if size > 1032 * len(data):  # deflate cannot shrink any further
                raise _Unreadable(f"truncated: too short for {count} pixels")
            if is_packed:
                data = _unpacked(data, size + 1)  # 1 more, to come to the checksum
            if len(data) >= size:
                image = np.frombuffer(data, dtype, count, int(offset))
                image = image.reshape(shape, order="F")
                as_stored = slope == 0 or (slope, inter) == (1, 0)
                return image if as_stored else image.astype(np.float64) * slope + inter
    if is_packed:
        with gzip.open(path) as file:  # damage is told from other formats here
            while file.read(1 << 20):
                pass
    image = _opened(path)
    if not isinstance(image, nibabel.spatialimages.SpatialImage):
        raise _Unreadable(f"a {type(image).__name__}, not a picture")
    shape = _squeezed(image.shape)
    if (count := math.prod(shape)) > 1032 * len(data):  # deflate cannot shrink any further
        raise _Unreadable(f"truncated: too short for {count} pixels")
    array = np.asanyarray(image.dataobj).reshape(shape)
    if array.dtype.names:  # colour, weighed as Pillow does
        rgb = np.stack([array[c] for c in array.dtype.names[:3]], -1).reshape(-1, 1, 3)
        return np.asarray(Image.fromarray(rgb).convert("L")).reshape(array.shape)
    if array.dtype.kind not in "uifb":
        raise _Unreadable(f"holds {array.dtype} values, not real numbers")
    return array


def _opened(path):
    """nibabel's image of a file, which reads what lies between header and pixels at once."""
    with open(path, "rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    with (gzip.open if is_packed else open)(path, "rb") as file:
        head = file.read(348)
    for order, (code, where, size) in itertools.product("<>", [("f", 108, 348), ("q", 168, 540)]):
        if len(head) == 348 and struct.unpack_from(f"{order}i", head)[0] == size:
            offset = struct.unpack_from(order + code, head, where)[0]
            if not offset < 1e6:
                raise _Unreadable(f"its header says that the pixels begin at byte {offset:g}")
    return nibabel.load(path)


def _unpacked(data, limit):
    """The first `limit` bytes, at most, of what a .gz holds: a small file may hold any number."""
    unpack = zlib.decompressobj(31)
    unpacked = unpack.decompress(data, limit)
    if len(unpacked) == limit:
        return unpacked
    if unpack.eof and not unpack.unused_data.strip(b"\0"):
        return unpacked
    with gzip.open(io.BytesIO(data)) as file:  # in several pieces, or cut short
        return file.read(limit)


def _read_raster(path):
    """(H, W) array of a PNG, JPEG or TIFF; 16 bits and floats are kept, colour becomes grey."""
    with Image.open(path, formats=RASTER_FORMATS) as image:
        if image.width * image.height > utils.MOST_PIXELS:
            raise _Unreadable(f"{image.width} x {image.height} pixels are too many for a slice")
        if getattr(image, "n_frames", 1) > 1:
            raise _Unreadable(f"{image.n_frames} pages in one file; save each as its own")
        deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
        return np.asarray(image if deep else image.convert("L"))


def _images(root, path, axis, planes):
    """The float32 (H, W) images of a file, or the reason why there are none.

    axis, planes: where to cut a 3D file; axis is None for a slice.
    """
    path = f"{root}/{path}"
    try:
        if not os.path.getsize(path):
            raise _Unreadable("empty, 0 bytes")
        array = (_read_nifti if path.lower().endswith(NIFTI) else _read_raster)(path)
        if axis is None and array.ndim == 3:
            raise _Unreadable(f"a 3D volume {array.shape} among slices; move it elsewhere")
        images = [array] if axis is None else [np.take(array, p, axis) for p in planes]
        images = [np.ascontiguousarray(image, dtype=np.float32) for image in images]
        if not all(np.isfinite(image).all() for image in images):
            raise _Unreadable("contains NaN or infinity")
        return images
    except MemoryError as error:  # no fault of the file: another time it may be read
        raise MemoryError(f"{path}: {utils.first_line(error) or 'too large'}") from error
    except Exception as error:  # whatever a broken file does, the others are still read
        return _why(error)


def _header(path):
    """Shape and affine, without the pixels; None if unreadable, which decoding will report."""
    try:
        if not path.lower().endswith(NIFTI):
            with Image.open(path, formats=RASTER_FORMATS) as image:
                return (image.height, image.width), np.eye(4)
        image = _opened(path)
        shape, affine = _squeezed(image.shape), image.affine
        if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
            zooms = np.abs((*image.header.get_zooms(), 1, 1)[:3])
            affine = np.diag((*np.where((zooms > 0) & (zooms < np.inf), zooms, 1), 1))
        # a slice may be stored edgeways, as 1 x H x W
        thin = (*image.shape, 1)[:3].index(1) if len(shape) == 2 else 2
        return shape, _turned(affine, thin, 0)
    except Exception:
        return None


def _turned(affine, axis, plane):
    """Affine of one plane across an array axis, which becomes the third."""
    turned = affine[:, [a for a in range(3) if a != axis] + [axis, 3]]
    turned[:, 3] += plane * affine[:, axis]
    return turned


def _grid_affine(path, plane, axis, common, size):
    """Affine of an image as `_fit` places it; axis: the one a volume is cut across, else None."""
    shape, affine = _header(path) or (size, np.eye(4))
    if axis is not None:
        affine = _turned(affine, axis, plane)
        shape = [n for a, n in enumerate(shape[:3]) if a != axis]
    grid = np.eye(4)
    placed = _placed(shape[:2], common or shape[:2], size)
    for a, (small, offset) in enumerate(zip(*placed, strict=True)):
        ratio = shape[a] / small
        grid[a, a], grid[a, 3] = ratio, (offset + 0.5) * ratio - 0.5  # pixel centres
    return affine @ grid


# ------------------------------------------------------------------------------------------------
# Decode everything, on every core
# ------------------------------------------------------------------------------------------------


def _percentile(pixels, percent):
    """np.percentile(pixels, percent), ten times faster: numpy is quick where it seeks one rank."""
    rank = (len(pixels) - 1) * percent / 100
    k = int(rank)
    pixels = np.partition(pixels, k)
    low, high = float(pixels[k]), float(pixels[k + 1 :].min(initial=np.inf))
    return low + (high - low) * (rank - k) if rank > k else low


def _window(images):
    """(shift, scale, lowest, highest) of a volume: value = (raw - shift) / scale."""
    pixels = np.concatenate([image.ravel() for image in images])
    low, top = float(pixels.min()), float(pixels.max())
    high = _percentile(pixels, PERCENTILE)
    floor = _percentile(pixels, 100 - PERCENTILE) if low < 0 else 0.0
    shift = floor if floor < -0.02 * abs(high) else 0.0  # ringing is clipped, the air of CT shifted
    high = high if high > shift else top  # nearly all background
    return shift, high - shift if high > shift else 1.0, low, top


def _placed(shape, common, size):
    """What an image is shrunk to, and where the output begins in it along each axis."""
    shrink = max(size[0] / common[0], size[1] / common[1])
    shrink = shrink if shrink < 0.9 else 1.0  # a resampling for less costs sharpness
    small = tuple(max(1, round(n * shrink)) for n in shape)
    return small, [int((have - want) / 2) for have, want in zip(small, size, strict=True)]


def _fitted(sizes, shrunk, size):
    """What a report says of sizes: a Counter of them, what each was shrunk to, what all became."""
    return {
        "size": list(size),
        "sizes": {f"{h} x {w}": n for (h, w), n in sizes.most_common()},
        "shrunk": sum(n for s, n in sizes.items() if shrunk[s] != s),
        "cropped": sum(n for s, n in sizes.items() if (np.array(shrunk[s]) > size).any()),
        "padded": sum(n for s, n in sizes.items() if (np.array(shrunk[s]) < size).any()),
    }


def _fit(image, common, size):
    """Shrink isotropically, then crop or zero-pad around the centre to size (H, W)."""
    (h, w), (top, left) = _placed(image.shape, common, size)
    if (h, w) != image.shape:
        image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.HAMMING))
    image = image[max(top, 0) :, max(left, 0) :][: size[0], : size[1]]
    whole, (h, w) = np.zeros(size, image.dtype), image.shape
    whole[max(-top, 0) :, max(-left, 0) :][:h, :w] = image
    return whole


def _decode(root, out, common, size, group):
    """Write the slices of a volume within one split, (first row, files), into the file `out`.

    A volume too large for memory is measured on every step-th file, and the others are read when
    their turn to be written comes.

    Returns the `_window`, and (path, reason or None, [(shape, crc) of each image]) of each file.
    """
    row, files = group
    step = 1 + len(files) * math.prod(common) // HELD_PIXELS
    held = {i: _images(root, *files[i]) for i in range(0, len(files), step)}
    sample = [image for x in held.values() if isinstance(x, list) for image in x]
    window = shift, scale, _, _ = _window(sample) if sample else (0.0, 1.0, 0.0, 0.0)
    answers = []
    with open(out, "r+b") as sink:
        sink.seek(row * 2 * math.prod(size))
        for i, file in enumerate(files):
            images, done = held.pop(i, None) or _images(root, *file), []
            if isinstance(images, str):
                answers.append((file[0], images, done))
                continue
            for image in images:
                pixels = _fit((image - shift) * np.float32(1 / scale), common, size)
                pixels = np.rint(pixels.clip(0, 1) * 65535).astype(np.uint16)
                sink.write(pixels)
                done.append((image.shape, zlib.crc32(pixels)))
            answers.append((file[0], None, done))
    return window, answers


def _map(work, groups, workers):
    """`map` over processes, one per core unless workers says how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, len(groups))
    if workers == 1:
        yield from map(work, groups)
        return
    some = 1 + len(groups) // (16 * workers)
    try:
        with ProcessPoolExecutor(workers, initializer=_leave_signals_to_the_parent) as pool:
            yield from pool.map(work, groups, chunksize=some)
    except BrokenProcessPool:
        raise UserError("--workers: a decoding process was killed; give --workers 1") from None


def _leave_signals_to_the_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _rows(root, plan, plane, n_slices):
    """Every `Slice`, groups (first row, [(path, axis, planes)]), a guess of the common shape."""
    sampled = [_header(f"{root}/{f.path}") for f in plan[:: max(1, len(plan) // 64)]]
    shapes = [header[0] for header in sampled if header]
    cut = sum(len(s) == 3 for s in shapes) * 2 > len(shapes)  # a lone volume is a mistake
    rows, groups, last = [], [], None
    for file in plan:
        axis, planes, positions = None, [0], [file.position]
        header = _header(f"{root}/{file.path}") if cut else None
        if header and len(header[0]) == 3:
            axes = nibabel.orientations.io_orientation(header[1])[:, 0]
            axis = next((a for a in range(3) if axes[a] == PLANES[plane]), None)
        if axis is not None:
            count = min(n_slices, header[0][axis])
            first = (header[0][axis] - count) // 2
            planes = list(range(first, first + count))
            positions = np.linspace(0, 1, count).tolist() if count > 1 else [0.5]
            shapes.append(tuple(np.delete(header[0], axis).tolist()))
        if last != (last := (file.split, file.volume)):
            groups.append((len(rows), []))
        groups[-1][1].append((file.path, axis, planes))
        who = (file.path, file.split, file.patient, file.volume, file.label)
        rows += [Slice(*who, x, p) for x, p in zip(positions, planes, strict=True)]
    flat = Counter(s for s in shapes if len(s) == 2)
    return rows, groups, max(flat, key=flat.get, default=(1, 1))


def _build(root, files, bad, meta, choices, entry, skip, workers, progress):
    """Decode everything once, into a new cache entry that appears when it is whole."""
    common, n_files = None, len(files)
    entry.parent.mkdir(parents=True, exist_ok=True)
    for left in [*entry.parent.glob(".building-*"), *entry.parent.glob(".phantom-*")]:
        with contextlib.suppress(OSError):  # by a process that was killed, or gone by now
            if time.time() - left.stat().st_mtime > 24 * 3600:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=entry.parent) as draft:
        out, text = Path(draft, "images.u16"), Path(draft, "index.json")
        while True:  # again without the bad files, or with the right size where the guess is wrong
            plan, notes = _plan(root, files, choices, meta)
            rows, groups, guess = _rows(root, plan, choices["plane"], choices["slices"])
            common = common or guess
            size = tuple(choices["image_size"] or common)
            out.unlink(missing_ok=True)
            room, needed = shutil.disk_usage(draft).free, 2 * len(rows) * math.prod(size)
            if needed > room:
                text = f"{len(rows)} slices of {size[0]} x {size[1]} take {needed / 1e9:.1f} GB"
                raise UserError(f"{entry.parent}: {text}, and {room / 1e9:.1f} GB are free")
            with open(out, "wb") as file:
                file.truncate(needed)
            work, windows, answers = partial(_decode, str(root), out, common, size), [], []
            with tqdm(total=len(rows), desc="decoding", disable=not progress) as bar:
                for window, done in _map(work, groups, workers):
                    windows.append(window)
                    answers += done
                    bar.update(sum(len(images) for *_, images in done))
            new = {path: reason for path, reason, _ in answers if reason}
            bad = bad | new
            if bad and not skip:
                first = "; ".join(f"{path} ({why})" for path, why in sorted(bad.items())[:10])
                more = "; ..." if len(bad) > 10 else ""
                what = f"{len(bad)} of {n_files} files cannot be read: {first}{more}"
                raise UserError(f"{root}: {what}; mend or remove them, or give --skip_unreadable")
            if new:
                files = [file for file in files if os.path.join(*file[:2]) not in new]
                if not files:
                    raise UserError(f"{root}: no readable image is left; mend the files")
                continue
            images = [image for *_, found in answers for image in found]
            sizes = Counter(image[0] for image, row in zip(images, rows, strict=True)
                            if row.split == "train")  # fmt: skip
            most = max(sizes, key=lambda shape: (sizes[shape], shape))
            if sizes[common] == sizes[most]:
                break
            common = most
        index = _index(root, rows, groups, images, windows, common, size)
        index["bad"] = bad
        notes |= {"unreadable": len(bad), "first_unreadable": dict(sorted(bad.items())[:10])}
        index["report"] |= notes
        text.write_text(json.dumps(index))
        entry.mkdir(exist_ok=True)
        for path in (out, text):  # another process can only put the same in their place
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # or a power cut may leave slices of zeros
            os.replace(path, entry / path.name)


def _index(root, rows, groups, images, windows, common, size):
    """What a later start needs to know beside the pixels; images: (shape, crc) of each row."""
    placed = {shape: _placed(shape, common, size) for shape, _ in images}
    sizes = Counter(shape for shape, _ in images)
    shifts, scales, lows, tops = zip(*windows, strict=True)
    train = [window for window, (row, _) in zip(windows, groups, strict=True)
             if rows[row].split == "train"]  # fmt: skip
    splits = {}
    for split in SPLITS:
        mine = [row for row in rows if row.split == split]
        patients, volumes = ({getattr(row, k) for row in mine} for k in ("patient", "volume"))
        splits[split] = dict(slices=len(mine), patients=len(patients), volumes=len(volumes))
    cut = {path: axis for _, files in groups for path, axis, _ in files if axis is not None}
    first = rows[0]
    place = (f"{root}/{first.path}", first.index, cut.get(first.path))
    stamps = [(row.path, row.index, row.split, row.label, image[1])
              for row, image in zip(rows, images, strict=True)]  # fmt: skip
    return {
        "slices": rows,
        "affine": _grid_affine(*place, common, size).tolist(),
        "common": common,
        "cut": cut,
        "intensity_scale": float(np.median([scale for _, scale, *_ in train])),
        "intensity_shift": float(np.median([shift for shift, *_ in train])),
        "fingerprint": hashlib.sha256(json.dumps([size, stamps]).encode()).hexdigest()[:32],
        "report": {
            "splits": splits,
            **_fitted(sizes, {s: placed[s][0] for s in sizes}, size),
            "volumes_cut": len(cut),
            "intensity_rule": f"(raw - shift) / scale clipped to [0, 1]; scale: {PERCENTILE}th "
            "percentile of the volume within its split, or of the slice where no volume is known",
            "intensity_raw_range": [min(lows), max(tops)],
            "intensity_scale_range": [min(scales), max(scales)],
            "volumes_shifted": sum(shift != 0 for shift in shifts),
        },
    }


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def add_data_arguments(parser, suppress_default=False):
    """Add the flags that say which data to use; see `load`.

    suppress_default: leave a flag that is not given out of the parsed arguments.
    """
    group = parser.add_argument_group("data")

    def add(flag, default, text, **options):
        text += "" if "default" in text else f" (default: {default})"
        default = argparse.SUPPRESS if suppress_default else default
        group.add_argument(flag, default=default, help=text, **options)

    n = {"type": utils.at_least(1), "metavar": "N"}
    text = "'phantom', or a folder of slices or volumes (default: what the run has, or phantom)"
    add("--data", "phantom", text, metavar="PATH")
    text = "pixels of every image (default: the most common size in train)"
    add("--image_size", None, text, type=utils.at_least(1), nargs=2, metavar=("H", "W"))
    text = "seed of a split that the data does not bring"
    add("--split_seed", 0, text, type=utils.at_least(0), metavar="N")
    text = "what to do with given splits that share patients: split anew, or keep"
    add("--split_policy", "patient", text, choices=("patient", "as_given"))
    text = "finds patient, volume, slice in relative paths (default: known names)"
    add("--group_regex", None, text, metavar="REGEX")
    add("--plane", "coronal", "plane that 3D volumes are cut along", choices=tuple(PLANES))
    add("--slices", 60, "central slices to take from a 3D volume", **n)
    text = "go on without unreadable files (default: list them and stop)"
    add("--skip_unreadable", False, text, action="store_true")
    text = "where decoded slices are kept, or 'none' (default: the user's cache)"
    add("--cache_dir", None, text, metavar="DIR")
    add("--workers", None, "decoding processes (default: one per core)", **n)


def main():
    parser = argparse.ArgumentParser(
        description="Tell what a data set holds, and draw it.", formatter_class=utils.HelpFormatter
    )
    add_data_arguments(parser)
    text = "folder for the two figures and report.json"
    parser.add_argument("--out", type=Path, default=Path("runs/dataset"), metavar="DIR", help=text)
    args = parser.parse_args()
    data = load(**utils.data_arguments(args, load))
    utils.make_folder(args.out)
    utils.write_json(args.out / "report.json", data.report)
    plots.data_set(data, args.out)
    print(data.describe())
    for key, value in data.report.items():
        if key != "warnings":
            print(f"  {key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    for a, b in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        print(f"patients in both {a} and {b}: {len({*data[a].patients} & {*data[b].patients})}")
    print(f"wrote contact_sheet.png, histogram.png and report.json in {args.out}")


if __name__ == "__main__":
    utils.run_main(main)

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
  2. an identifier in the name            sub-XX (BIDS), OAS1_NNNN, NNN_S_NNNN, TCGA-XX-XXXX
  3. a folder named after a patient       sub-XX, case12, patient_3, P7, 1001, NNN_S_NNNN
  4. <letters><digits>[_...]_<slice>      s003_01, 1001_axi_12, scan7_slice_4
"""

import argparse
import atexit
import errno
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import utils
from utils import UserError

FORMAT = 1  # of the cache; raise it whenever the same files would give other pixels
PERCENTILE = 99.5
SPLITS = ("train", "validate", "test")
HELD_OUT = 0.15  # share of the patients for each split that the data does not bring
POLICIES = ("patient", "as_given")
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}  # the world axis that crosses each plane
NIFTI, RASTER = (".nii", ".nii.gz"), (".png", ".jpg", ".jpeg", ".tif", ".tiff")
HELD_PIXELS = 1 << 24  # of one volume in memory at once: 64 MiB in each process
ADNI_JSON = "meta_data_with_label.json"

_SPLIT = re.compile(
    r"(?:^|[-_ ])(?:(train(?:ing)?)|(val|valid|validat(?:e|ion))|(test(?:ing)?))$", re.I
)
_LABELS = r"(?:^|[^a-z])(?:segs?|segmentations?|labels?|masks?{})(?:[^a-z]|$)"
_LABEL_FOLDER = re.compile(_LABELS.format(""), re.I)
_LABEL_FILE = re.compile(_LABELS.format("|semantic"), re.I)
_CASE = re.compile(r"case_?(\d+)_week_?(\d+)(?:.*?_slice_?(\d+))?", re.I)
_ADNI = re.compile(r"\d{3}_S_\d{4,5}")
_KNOWN = re.compile(r"sub-[a-z0-9]+|OAS\d_\d{4}|\d{3}_S_\d{4,5}|TCGA[-_]\w\w[-_][a-z0-9]{4}", re.I)
_FOLDER = re.compile(
    r"sub-[a-z0-9]+|(?:case|patient|subject|subj|sub|pat|p|s)[-_ ]?\d+|\d{3,}|\d{3}_S_\d{4,5}", re.I
)
_NUMBER = r"(?:(?:slice|img|im|z)[-_ ]?)?(\d+)"
_GENERAL = re.compile(r"(([a-z]*[-_ ]?\d+)(?:[-_ ].*?)??)[-_ ]" + _NUMBER, re.I)
_LAST_NUMBER = re.compile(r"(.*?)(?:^|[-_ ])" + _NUMBER, re.I)


# ------------------------------------------------------------------------------------------------
# What callers see
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
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
    columns: dict = field(repr=False)  # of `slices`, made into objects only when asked for

    @cached_property
    def slices(self) -> list[Slice]:
        columns = [self.columns[name] for name in Slice.__dataclass_fields__]
        return [Slice(*row) for row in zip(*columns, strict=True)]

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        """(B,) indices -> (B, 1, H, W) float32 tensor in [0, 1]."""
        import torch

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
    files that imitate the data. intensity_scale: median scale of the train volumes, in the data's
    own units. fingerprint: changes with the pixels, the splits and the names, not with the place.
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
    splits: dict[str, SliceSplit] = field(repr=False)

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
    seed=0,
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
    others are cropped or padded. seed: of a split that the data does not bring. cache_dir: a
    folder, None for the user's cache, "none" to write nothing and keep the decoded slices in memory
    (2 bytes a pixel). workers: decoding processes, default all cores. split_policy: "as_given"
    keeps split folders that share patients. group_regex: groups patient, volume, slice, searched in
    relative paths. plane, slices: which planes of a 3D volume, and how many central ones.

    Raises UserError for what the user can mend; it lists all unreadable files unless
    skip_unreadable.
    """
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 1):
        raise UserError(f"--image_size {image_size}: not a height and a width; give e.g. 256 128")
    if plane not in PLANES or split_policy not in POLICIES:
        raise UserError(f"--plane {plane}, --split_policy {split_policy}: unknown; see --help")
    if slices < 1 or (workers is not None and workers < 1):
        raise UserError("--slices, --workers: less than 1; give a positive number")
    workers = workers or _cores()
    cache, is_phantom = _cache_folder(cache_dir), data == "phantom"
    root = _phantom(cache, workers, progress) if is_phantom else Path(data)
    files, bad, ignored = _walk(root)
    near = (root / "AD_NC", root, root.absolute().parent, root.absolute().parent.parent)
    meta = next((p / ADNI_JSON for p in near if os.path.isfile(p / ADNI_JSON)), None)
    choices = {
        "format": FORMAT, "percentile": PERCENTILE, "plane": plane, "slices": slices, "seed": seed,
        "image_size": image_size and [int(n) for n in image_size], "split_policy": split_policy,
        "group_regex": group_regex,
    }  # fmt: skip
    stamp = meta and meta.stat().st_mtime_ns
    name = root.resolve().name or "root"
    key = hashlib.sha256(repr((files, sorted(bad.items()), stamp)).encode(errors="surrogateescape"))
    entries = [_entry(cache, name, key, choices | {"seed": s}) for s in (None, seed)]
    for entry in entries:  # most sets bring their split: then all seeds share one entry
        index, images = _open(entry, skip_unreadable)
        if index:
            break
    else:
        run = partial(_run, workers, progress)
        plan, notes = _plan(root, files, choices, meta)
        entry = entries["seed" in notes["split_origin"]]
        index, images = _build(root, plan, notes, choices, bad, entry, skip_unreadable, run)
    report = {"name": name, "root": str(root), "is_phantom": is_phantom, **index["report"]}
    report |= {"ignored": ignored, "preprocessing": choices, "cache": str(entry or "none")}
    for text in report["warnings"]:
        print(f"warning: {root}: {text}", file=sys.stderr)
    return SliceData(
        name="phantom" if is_phantom else name,
        is_phantom=is_phantom,
        layout=report["layout"],
        size=tuple(report["size"]),
        classes=list(report["classes"]),
        report=report,
        fingerprint=index["fingerprint"],
        affine=np.array(index["affine"]),
        zooms=tuple(np.linalg.norm(np.array(index["affine"])[:3, :3], axis=0).tolist()),
        intensity_scale=index["intensity_scale"],
        splits=_splits(root, index, images),
    )


def _splits(root, index, images):
    numbers = {c: i for i, c in enumerate(index["report"]["classes"])}
    splits, start = {}, 0
    for split, counts in index["report"]["splits"].items():
        rows = slice(start, start + counts["slices"])
        start = rows.stop
        columns = {name: column[rows] for name, column in index["columns"].items()}
        columns["path"] = [f"{root}/{rel}" for rel in columns["path"]]
        columns["split"] = [split] * len(columns["path"])
        splits[split] = SliceSplit(
            images[rows],
            np.array([numbers.get(label, -1) for label in columns["label"]], dtype=np.int64),
            np.array(columns["position"], dtype=np.float32),
            columns["patient"],
            columns,
        )
    return splits


# ------------------------------------------------------------------------------------------------
# Find the files, read their names, split by patient
# ------------------------------------------------------------------------------------------------


def _is_image(name):
    return name.lower().endswith(NIFTI + RASTER)


def _walk(root):
    """Images below root as [(folder, name, size, mtime_ns, mode)], bad files, what was ignored.

    Folders behind links are read after the real ones and never twice, so a link does not hide a
    split folder and a loop of links ends. A folder named like an image is looked into.
    """
    if not os.path.isdir(root):
        what = "a file, not a folder" if os.path.exists(root) else "no such folder"
        raise UserError(f"{root}: {what}; give --data the folder that holds the slices")
    files, bad, ignored, seen = [], {}, Counter(), set()
    real, links = [""], []
    while real or links:
        folder = real.pop() if real else links.pop(0)
        try:
            here = os.stat(root / folder)
            if (here.st_dev, here.st_ino) in seen:
                ignored["links to folders already read"] += 1
                continue
            seen.add((here.st_dev, here.st_ino))
            with os.scandir(root / folder) as found:
                entries = sorted(found, key=lambda e: e.name)
        except OSError as error:
            bad[folder or "."] = _why(error)
            continue
        before = len(files)
        for entry in entries:
            name, path = entry.name, f"{folder}/{entry.name}" if folder else entry.name
            try:
                if name.startswith(".") or name == "__MACOSX":
                    ignored["hidden files"] += 1
                elif entry.is_dir():
                    if _LABEL_FOLDER.search(name):
                        ignored["folders of label maps"] += 1
                    else:
                        (links if entry.is_symlink() else real).append(path)
                elif not _is_image(name):
                    ignored[f"{os.path.splitext(name)[1].lower() or 'other'} files"] += 1
                elif _LABEL_FILE.search(name):
                    ignored["label maps"] += 1
                else:
                    stat = entry.stat()
                    files.append((folder, name, stat.st_size, stat.st_mtime_ns, stat.st_mode))
            except OSError:
                if _is_image(name):
                    bad[path] = "a broken link"
        if _is_image(folder) and len(files) == before:
            bad[folder] = "a folder named like an image, with no image in it"
    if not files:
        found = "; ".join(f"{k}: {v}" for k, v in [*bad.items(), *ignored.items()]) or "it is empty"
        raise UserError(f"{root}: no NIfTI, PNG, JPEG or TIFF image in it ({found}); check --data")
    files.sort()
    return files, bad, dict(ignored)


@dataclass(slots=True)
class _File:
    path: str  # relative
    given: str | None  # the split folder it lies in
    label: str | None
    patient: str = ""
    volume: str = ""
    number: int | None = None  # of the slice in its volume
    position: float = 0.5
    split: str = "train"


def _plan(root, files, choices, meta):
    """Every file with its patient, volume, label, position and split, sorted; and the report."""
    warnings, regex = [], _compiled(choices["group_regex"])
    places = {folder: _place(folder) for folder in {f[0] for f in files}}
    study = {folder for folder in places if "keras_slices" in folder.lower()}
    chosen = study or {f for f, (given, *_) in places.items() if given} or set(places)
    kept = [f for f in files if f[0] in chosen]
    inner = [places[f][1] for f in chosen if not places[f][0]]
    wrap = len(os.path.commonprefix(inner)) if inner else 0  # folders around everything
    plan, unknown = [], []
    for folder, name, *_ in kept:
        given, folders, _ = places[folder]
        stem = re.sub(r"(?i)\.nii(\.gz)?$|\.[^.]*$", "", name)
        folders = folders if given else folders[wrap:]
        level = folders[:1]
        label = level[0] if level and not _FOLDER.fullmatch(level[0]) else None
        file = _File(f"{folder}/{name}" if folder else name, given, label)
        found = _identify(file.path, stem, folders, regex)
        if not found:
            unknown.append(file.path)
        file.patient, file.volume, file.number = found or (file.path, file.path, None)
        plan.append(file)
    if len(classes := Counter(f.label for f in plan if f.label)) < 2:
        classes = {}
        for file in plan:
            file.label = None
    layout = "folder of slices" + (" in class folders" if classes else "")
    if all(_CASE.match(os.path.basename(f.path)) for f in plan):
        layout = "HipMRI 3D volumes" if plan[0].number is None else "HipMRI 2D slices"
    elif {*classes} == {"AD", "NC"} and any(f.patient.isdecimal() for f in plan):
        layout = "ADNI 2D slices (AD_NC)"
        unknown += _name_adni_patients(plan, meta, warnings)
    elif unknown:
        warnings.append(
            f"{len(unknown)} of {len(plan)} names do not tell the patient (first: {unknown[0]}); "
            "each such file counts as a patient, so one may be in two splits; give --group_regex"
        )
    _set_positions(plan)
    origin, shared, separable = _set_splits(plan, layout, choices, warnings)
    plan.sort(key=lambda f: (SPLITS.index(f.split), f.volume, f.number or 0, f.path))
    renamed = {spelled: given for given, _, spelled in places.values() if spelled != given}
    return plan, {
        "layout": layout, "classes": dict(sorted(classes.items())), "split_origin": origin,
        "shared_patients": shared, "patients_separable": separable and not unknown,
        "names_without_patient": len(unknown), "renamed_splits": renamed,
        "warnings": warnings, "outside_split_folders": len(files) - len(kept),
        "folders_named_like_files": sum(_is_image(f) for f in chosen),
    }  # fmt: skip


def _place(folder):
    """Split and other folders: x/val/AD -> validate, (AD,), val; x/AD -> None, (x, AD), None."""
    folders = tuple(f for f in folder.split("/") if f and not _is_image(f))
    for i, name in enumerate(folders):
        if match := _SPLIT.search(name):
            return SPLITS[match.lastindex - 1], folders[i + 1 :], match[match.lastindex]
    return None, folders, None


def _compiled(group_regex):
    try:
        regex = group_regex and re.compile(group_regex)
    except re.error as error:
        raise UserError(f"--group_regex {group_regex}: {error}; mend the expression") from None
    if regex and "patient" not in regex.groupindex:
        raise UserError(f"--group_regex {group_regex}: no group (?P<patient>...); add it")
    return regex


def _identify(path, stem, folders, regex):
    """Patient, volume and slice number of a file, or None where its name does not tell."""
    if regex:
        found = (match := regex.search(path)) and match.groupdict()
        if not found or not found["patient"]:
            return None
        volume, number = (found.get(k) or "" for k in ("volume", "slice"))
        return found["patient"], f"{found['patient']}/{volume}", _integer(number)
    if match := _CASE.match(stem):
        patient = f"case_{int(match[1]):03d}"
        return patient, f"{patient}_week_{int(match[2])}", _integer(match[3])
    tail = _LAST_NUMBER.fullmatch(stem)
    if match := _KNOWN.search(stem):
        if not tail or tail.start(2) < match.end():  # the last number is the patient's own
            return match[0], stem, None
        return match[0], tail[1], int(tail[2])
    for i, folder in enumerate(folders):
        if _FOLDER.fullmatch(folder):
            rest, number = (tail[1], int(tail[2])) if tail else (stem, None)
            return folder, "/".join((*folders[i:], rest)), number
    match = _GENERAL.fullmatch(stem)
    return match and (match[2], match[1], int(match[3]))


def _integer(text):
    return int(text) if text and text.isdecimal() else None


def _name_adni_patients(plan, meta, warnings):
    """Put the patients that ADNI's JSON knows in the place of scans; returns the scans left."""
    patients = {}

    def visit(key, node):
        if isinstance(node, dict):  # {scan: {"raw": ".../ADNI_068_S_0473_...", ...}, ...}
            texts = [str(v) for v in (node.get("raw"), *node.values()) if isinstance(v, str | int)]
            if patient := next(filter(None, map(_ADNI.search, texts)), None):
                for text in (str(key), *texts):
                    if scan := re.fullmatch(r"I?(\d+)(_\d+)?(\.\w+)?", os.path.basename(text)):
                        patients.setdefault(scan[1], patient[0])
        if isinstance(node, dict | list):
            for k, child in node.items() if isinstance(node, dict) else enumerate(node):
                visit(k if isinstance(node, dict) else None, child)

    try:
        visit(None, json.loads(meta.read_text(encoding="utf-8-sig")) if meta else None)
    except (OSError, ValueError) as error:
        raise UserError(f"{meta}: not readable as JSON ({error}); fetch it again") from None
    for file in plan:
        file.patient = patients.get(file.patient, file.patient)
    scans = {f.patient for f in plan if not _ADNI.fullmatch(f.patient)}
    if scans:
        why = f"{meta} does not list them" if meta else f"no {ADNI_JSON} beside the images"
        warnings.append(
            f"the patients of {len(scans)} scans are unknown ({why}); each scan counts as a "
            "patient, so one may be in two splits; put the complete JSON there"
        )
    return sorted(scans)


def _set_positions(plan):
    volumes = defaultdict(list)
    for file in plan:
        volumes[file.volume].append(file)
    for files in volumes.values():
        numbers = sorted({f.number for f in files if f.number is not None})
        rank = {n: i / (len(numbers) - 1) for i, n in enumerate(numbers)} if numbers[1:] else {}
        for file in files:
            file.position = rank.get(file.number, 0.5)


def _set_splits(plan, layout, choices, warnings):
    """Set the split of every file: (where it comes from, shared patients, patients separable)."""
    given = {f.given for f in plan}
    if layout == "HipMRI 3D volumes" and given == {None}:  # the split of the 2D release, by case
        for file in plan:
            case = int(file.patient[5:])
            file.given = "train" if case < 36 else "validate" if case < 40 else "test"
        given = {f.given for f in plan}
        given = given if len(given) == len(SPLITS) else {None}
    held = defaultdict(set)
    for file in plan:
        held[file.patient].add(file.given)
    shared = sum(len(splits) > 1 for splits in held.values()) if None not in given else 0
    keep = "train" in given and None not in given and len(given) > 1
    keep = keep and (not shared or choices["split_policy"] == "as_given")
    if shared:
        then = "kept, so test scores will flatter" if keep else "split anew by patient"
        warnings.append(f"{shared} patients are in more than one of the given splits; {then}")
    missing = [s for s in SPLITS[1:] if not keep or s not in given]
    for file in plan:
        file.split = file.given if keep else "train"
    origin = "as given" if keep else "replaced" if shared else "not given"
    if not missing:
        return origin, shared, True
    pool = [f for f in plan if f.split == "train"]
    for unit in ("patient", "volume", "path"):
        units = {getattr(f, unit) for f in pool}
        if len(units) > len(missing):
            break
    else:
        raise UserError(f"--data: {len(pool)} images cannot fill every split; give more")
    if unit != "patient":
        warnings.append(
            f"too few patients can be told apart for a split; split by {unit}, so a patient is in "
            "two splits and test scores will flatter; give --group_regex or more patients"
        )
    # a hash gives every patient the same rank on every machine
    salt = f"{choices['seed']}:"
    ranked = sorted(
        units, key=lambda u: hashlib.sha256((salt + u).encode(errors="replace")).digest()
    )
    n = max(1, round(HELD_OUT * len(ranked)))
    moved = {u: s for i, s in enumerate(missing) for u in ranked[i * n : (i + 1) * n]}
    for file in pool:
        file.split = moved.get(getattr(file, unit), "train")
    made = f"{' and '.join(missing)} taken from train by {unit}, seed {choices['seed']}"
    return f"{origin}, {made}", shared, unit == "patient"


# ------------------------------------------------------------------------------------------------
# Read one file
# ------------------------------------------------------------------------------------------------


class _Unreadable(Exception):
    """Why a file cannot be used, in words for the user."""


def _why(error):
    """One line on what an exception says about a file."""
    if isinstance(error, _Unreadable):
        return str(error)
    known = {
        PermissionError: "no permission to read it",
        FileNotFoundError: "vanished",
        MemoryError: "too large for this machine's memory",
    }
    first_line = (str(error).splitlines() or [""])[0][:120]
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return known.get(type(error), kind + first_line)


_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}


def _plain_header(head):
    """shape, dtype, offset, slope, intercept of a plain NIfTI-1 file, else None."""
    order = {b"\x5c\1\0\0": "<", b"\0\0\1\x5c": ">"}.get(head[:4])
    if len(head) < 352 or head[344:348] != b"n+1\0" or not order:
        return None
    dim = np.frombuffer(head, order + "i2", 8, 40).tolist()
    dtype = _DTYPES.get(int(np.frombuffer(head, order + "i2", 1, 70)[0]))
    offset, slope, inter = np.frombuffer(head, order + "f4", 3, 108).tolist()
    shape = tuple(dim[1 : 1 + dim[0]]) if 1 <= dim[0] <= 7 else (0,)
    if not dtype or min(shape) < 1 or not 352 <= offset < 1e6 or not math.isfinite(slope + inter):
        return None
    return shape, np.dtype(order + dtype), int(offset), slope, inter


def _squeezed(shape):
    """Shape without extra dimensions of 1, the last ones first; refuses what is not 2D or 3D."""
    full, shape = " x ".join(map(str, shape)), list(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    if len(shape) == 3 and 1 in shape:
        shape.remove(1)
    if len(shape) not in (2, 3):
        raise _Unreadable(f"{len(shape)}D ({full}), neither a slice nor a volume; split it first")
    return tuple(shape)


def _read_nifti(path):
    """(H, W) or (X, Y, Z) array of a NIfTI file, with the values that nibabel gives.

    Plain NIfTI-1 is decoded here, at less than half of nibabel's time; all else is left to nibabel.
    """
    data = Path(path).read_bytes()
    if not data:
        raise _Unreadable("empty, 0 bytes")
    zipped = data[:2] == b"\x1f\x8b"
    try:
        head = zlib.decompressobj(31).decompress(data, 352) if zipped else data[:352]
        if header := _plain_header(head):
            shape, dtype, offset, slope, inter = header
            count = math.prod(shape)
            end = offset + count * dtype.itemsize
            shape = _squeezed(shape)
            if end > len(data) * (1032 if zipped else 1):  # deflate cannot shrink any further
                raise _Unreadable(f"truncated: {len(data)} bytes cannot hold {count} pixels")
            stream = zlib.decompressobj(31)
            if zipped:
                data = stream.decompress(data, end)
                if not stream.eof:  # go on to the checksum
                    stream.decompress(stream.unconsumed_tail, 64)
                if not stream.eof and not stream.unconsumed_tail:
                    raise _Unreadable("truncated gzip")
            if len(data) >= end:
                image = np.frombuffer(data, dtype, count, offset).reshape(shape, order="F")
                plain = slope == 0 or (slope, inter) == (1, 0)
                return image if plain else image.astype(np.float64) * slope + inter
    except zlib.error as error:
        raise _Unreadable(f"damaged gzip ({error})") from None
    image = _nibabel(path)
    shape = _squeezed(image.shape)
    try:
        array = np.asanyarray(image.dataobj).reshape(shape)
    except (OSError, EOFError):
        raise _Unreadable("truncated") from None
    if array.dtype.names:  # colour, weighed as Pillow does
        rgb = np.stack([array[c] for c in array.dtype.names[:3]], -1).reshape(-1, 1, 3)
        return np.asarray(Image.fromarray(rgb).convert("L")).reshape(array.shape)
    if array.dtype.kind not in "uifb":
        raise _Unreadable(f"holds {array.dtype} values, not real numbers")
    return array


def _nibabel(path):
    import nibabel

    try:
        image = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError:
        raise _Unreadable("not a NIfTI file, whatever its name says") from None
    if not isinstance(image, nibabel.spatialimages.SpatialImage):
        raise _Unreadable(f"a {type(image).__name__}, not a picture")
    size, count = os.path.getsize(path), math.prod(image.shape)
    if min(image.shape, default=0) < 1 or count > 1032 * size:  # see _read_nifti
        raise _Unreadable(f"truncated: {size} bytes cannot hold {count} pixels")
    return image


def _read_raster(path):
    """(H, W) array of a PNG, JPEG or TIFF; 16 bits and floats are kept, colour becomes grey."""
    data = Path(path).read_bytes()
    if not data:
        raise _Unreadable("empty, 0 bytes")
    try:
        image = Image.open(BytesIO(data), formats=("PNG", "JPEG", "TIFF"))
    except OSError:
        raise _Unreadable("not an image, whatever its name says") from None
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise _Unreadable(f"{image.width} x {image.height} pixels, beyond Pillow's safe limit")
    if getattr(image, "n_frames", 1) > 1:
        raise _Unreadable(f"{image.n_frames} pages in one file; save each as its own")
    deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    return np.asarray(image if deep else image.convert("L"))


def _header(path):
    """Shape and affine, without the pixels; None if unreadable, which decoding will report."""
    try:
        if path.lower().endswith(NIFTI):
            image = _nibabel(path)
            shape, affine = image.shape, np.array(image.affine, dtype=float)
            if len(shape) > 2 and shape[2] > 1 and 1 in shape[:2]:  # a slice stored edgeways
                affine = _turned(affine, shape.index(1), 0)
            return _squeezed(shape), affine
        with Image.open(path) as image:
            return (image.height, image.width), np.eye(4)
    except Exception:
        return None


def _turned(affine, axis, plane):
    """Affine of one plane across an array axis, which becomes the third."""
    turned = affine[:, [a for a in range(3) if a != axis] + [axis, 3]]
    turned[:, 3] += plane * affine[:, axis]
    return turned


def _axis(affine, plane):
    """Array axis that crosses an anatomical plane, or None for an affine that does not tell."""
    from nibabel.orientations import io_orientation

    found = np.flatnonzero(io_orientation(affine)[:, 0] == PLANES[plane])
    return int(found[0]) if len(found) else None


# ------------------------------------------------------------------------------------------------
# Decode everything, on every core
# ------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Rows that share one intensity scale: the slices of a volume within one split."""

    row: int  # the first one
    paths: list[str]
    axis: int = 0  # of the one 3D file, when planes are wanted
    planes: list[int] | None = None

    def __len__(self):
        return len(self.planes or self.paths)

    def images(self, root):
        """The rows in turn as float32 (H, W), each replaced by a reason where there is no image."""
        for path in self.paths:
            read = _read_nifti if path.lower().endswith(NIFTI) else _read_raster
            try:
                array = read(f"{root}/{path}")
                if self.planes is not None:
                    images = [np.take(array, p, self.axis) for p in self.planes]
                elif array.ndim == 3:
                    raise _Unreadable(f"a 3D volume {array.shape} among slices; move it elsewhere")
                else:
                    images = [array]
                images = [np.ascontiguousarray(image, dtype=np.float32) for image in images]
                if not all(np.isfinite(image).all() for image in images):
                    raise _Unreadable("contains NaN or infinity")
            except Exception as error:  # whatever a broken file does, the others are still read
                images = [_why(error)] * len(self.planes or "1")
            yield from images


def _high_percentile(pixels):
    """np.percentile(pixels, PERCENTILE), sorting only the few pixels above a sampled guess."""
    rank = (len(pixels) - 1) * PERCENTILE / 100
    tail = pixels[pixels >= np.percentile(pixels[::101], PERCENTILE - 2)]
    rank -= len(pixels) - len(tail)
    if rank < 0:
        return float(np.percentile(pixels, PERCENTILE))
    tail.sort()
    low, high = tail[int(rank)], tail[min(int(rank) + 1, len(tail) - 1)]
    return float(low + (high - low) * (rank % 1))


def _window(sample, low, top):
    """(shift, scale) of a volume: value = (raw - shift) / scale; sample: its pixels."""
    high = _high_percentile(sample)
    floor = float(np.percentile(sample, 100 - PERCENTILE)) if low < 0 else 0.0
    shift = floor if floor < -0.02 * abs(high) else 0.0  # ringing is clipped, the air of CT shifted
    high = high if high > shift else top  # nearly all background
    return shift, high - shift if high > shift else 1.0


def _fit(image, shrink, size):
    """Shrink isotropically, then crop or zero-pad around the centre to size (H, W)."""
    if shrink < 1:
        h, w = _shrunk(image.shape, shrink)
        image = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.HAMMING))
    (top, left), (h, w) = _offsets(image.shape, size), size
    image = image[max(top, 0) :, max(left, 0) :][:h, :w]
    if image.shape != tuple(size):
        whole = np.zeros(size, image.dtype)
        top, left = max(-top, 0), max(-left, 0)
        whole[top : top + image.shape[0], left : left + image.shape[1]] = image
        image = whole
    return image


def _shrunk(shape, shrink):
    return tuple(max(1, round(n * shrink)) for n in shape)


def _offsets(shape, size):
    """Where the output begins in the image along each axis; negative where it begins before."""
    return [
        (have - want) // 2 if have > want else -((want - have) // 2)
        for have, want in zip(shape, size, strict=True)
    ]


def _decode(root, out, shrink, size, groups):
    """Write groups to rows of the file `out`, or return their images where out is None.

    Returns [(row, shape or None, reason or None, crc)], [(row, shift, scale, low, top)] of groups,
    {row: image}.
    """
    rows, windows, kept = [], [], {}
    with open(out, "r+b", buffering=1 << 20) if out else nullcontext() as file:
        for group in groups:
            sample, held, low, top, step = [], [], math.inf, -math.inf, 1
            for image in group.images(root):
                held.append(image)
                if not isinstance(image, str):
                    low, top = min(low, float(image.min())), max(top, float(image.max()))
                    # a volume beyond memory is measured on every step-th pixel and read twice
                    step = -(-image.size * len(group) // HELD_PIXELS)
                    sample.append(image.ravel()[::step])
                    held[-1] = image if step == 1 else None
            shift, scale = _window(np.concatenate(sample), low, top) if sample else (0, 1)
            if sample:
                windows.append((group.row, shift, scale, low, top))
            again = group.images(root) if any(image is None for image in held) else held
            for row, image in enumerate(again, group.row):
                if isinstance(image, str):
                    rows.append((row, None, image, 0))
                    continue
                pixels = _fit((image - shift) * np.float32(1 / scale), shrink, size)
                pixels = np.rint(pixels.clip(0, 1) * 65535).astype(np.uint16)
                rows.append((row, image.shape, None, zlib.crc32(pixels)))
                if file:
                    file.seek(row * pixels.nbytes)
                    file.write(pixels)
                else:
                    kept[row] = pixels
    return rows, windows, kept


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(workers, progress, groups, work, out):
    """Do `work` on all groups; images that come back go to the array `out`. -> rows, windows."""
    jobs = [[]]
    for group in groups:
        if sum(map(len, jobs[-1])) >= 64:
            jobs.append([])
        jobs[-1].append(group)
    rows, windows = [], []
    bar = tqdm(total=sum(map(len, groups)), desc="decoding", unit=" slices", disable=not progress)

    def take(answer):
        rows.extend(answer[0])
        windows.extend(answer[1])
        for row, image in answer[2].items():
            out[row] = image
        bar.update(len(answer[0]))

    with bar:
        if workers == 1 or len(jobs) < 3:
            for job in jobs:
                take(work(job))
            return sorted(rows), sorted(windows)
        torch = sys.modules.get("torch")  # forking is quick, and sound until CUDA has started
        forks = sys.platform == "linux" and not (torch and torch.cuda.is_initialized())
        pool = ProcessPoolExecutor(
            min(workers, len(jobs)),
            multiprocessing.get_context("fork" if forks else "spawn"),
            partial(signal.signal, signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's
        )
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                take(done.result())
        except BrokenProcessPool:
            raise UserError("--workers: a decoding process was killed; give --workers 1") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return sorted(rows), sorted(windows)


def _groups(root, plan, plane, n_slices):
    """What to decode: [(file, plane, position)] row by row, their groups, a sample of shapes."""
    sampled = [_header(f"{root}/{f.path}") for f in plan[:: max(1, len(plan) // 64)]]
    shapes = [h[0] for h in sampled if h]
    volumes = sum(len(s) == 3 for s in shapes) * 2 > len(shapes)  # a lone one is a mistake
    rows, groups, last = [], [], None
    for file in plan:
        header = _header(f"{root}/{file.path}") if volumes else None
        if header and len(header[0]) == 3 and (axis := _axis(header[1], plane)) is not None:
            count = min(n_slices, header[0][axis])
            first = (header[0][axis] - count) // 2
            groups.append(_Group(len(rows), [file.path], axis, list(range(first, first + count))))
            rows += [(file, first + i, i / (count - 1) if count > 1 else 0.5) for i in range(count)]
            shapes.append(tuple(np.delete(header[0], axis).tolist()))
            last = None
            continue
        if last != (file.split, file.volume):
            groups.append(_Group(len(rows), []))
        groups[-1].paths.append(file.path)
        rows.append((file, 0, file.position))
        last = (file.split, file.volume)
    return rows, groups, [s for s in shapes if len(s) == 2]


def _build(root, plan, notes, choices, bad, entry, skip, run):
    """Decode everything once, into a new cache entry or into memory: (index, images)."""
    rows, groups, shapes = _groups(root, plan, choices["plane"], choices["slices"])
    common = Counter(shapes).most_common(1)[0][0] if shapes else (1, 1)
    draft = None
    try:
        if entry:
            entry.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".building-", dir=entry.parent))
        while True:
            size, shrink = _geometry(common, choices["image_size"])
            n_bytes = 2 * len(rows) * size[0] * size[1]
            if entry:
                if shutil.disk_usage(draft).free < n_bytes:
                    raise OSError(errno.ENOSPC, "no space left on the disk")
                out = draft / "images.u16"
                with open(out, "wb") as file:
                    file.truncate(n_bytes)
            else:
                out = np.zeros((len(rows), *size), np.uint16)
            work = partial(_decode, str(root), str(out) if entry else None, shrink, size)
            decoded, windows = run(groups, work, out)
            train = Counter(d[1] for d in decoded if d[1] and rows[d[0]][0].split == "train")
            most = max(train, key=lambda s: (train[s], s), default=common)
            if train[common] == train[most]:
                break
            common = most  # the sample of headers misled: once more, with the right size
        bad = bad | {rows[d[0]][0].path: d[2] for d in decoded if d[2]}
        if bad and not skip:
            first = "; ".join(f"{path} ({why})" for path, why in sorted(bad.items())[:10])
            more = "; ..." if len(bad) > 10 else ""
            raise UserError(
                f"{root}: {len(bad)} of {len(plan)} files cannot be read: {first}{more}; mend or "
                "remove them, or give --skip_unreadable"
            )
        good = [d for d in decoded if d[1]]
        index = _index(root, rows, groups, good, windows, (common, size, shrink), bad)
        if index["report"]["volumes_cut"] and "HipMRI" not in notes["layout"]:
            notes["layout"] = notes["layout"].replace("slices", "3D volumes, cut into slices")
        index["report"] = notes | index["report"]
        if not entry:
            return index, out if len(good) == len(rows) else out[[d[0] for d in good]]
        _close_gaps(out, [d[0] for d in good], 2 * size[0] * size[1])
        (draft / "index.json").write_text(json.dumps(index))
        _publish(draft, entry, skip)
        found = _open(entry, skip)
        if found[0] is None:
            raise OSError(errno.EIO, "the new cache entry cannot be read back")
        return found
    except OSError as error:
        where, why = entry.parent if entry else root, error.strerror or error
        raise UserError(
            f"{where}: cannot write the cache ({why}); free some space, or give another "
            "--cache_dir or --cache_dir none"
        ) from None
    except MemoryError:
        raise UserError(f"{root}: too large for memory; give --cache_dir DIR") from None
    finally:
        if draft:
            shutil.rmtree(draft, ignore_errors=True)


def _geometry(common, wanted):
    """Output size (H, W), and the factor that every image is shrunk by before."""
    if wanted is None:
        return common, 1.0
    shrink = min(1.0, max(wanted[0] / common[0], wanted[1] / common[1]))
    return tuple(wanted), shrink if shrink < 0.9 else 1.0  # a resampling for less costs sharpness


def _index(root, rows, groups, good, windows, geometry, bad):
    """What a later start needs to know besides the pixels, JSON-able."""
    common, size, shrink = geometry
    mine = [rows[d[0]] for d in good]
    counts = Counter(file.split for file, *_ in mine)
    if missing := [s for s in SPLITS if not counts[s]]:
        raise UserError(f"{root}: no readable slice for {missing[0]}; mend the files or add some")
    scales = [w[2] for w in windows if rows[w[0]][0].split == "train"]
    sizes = Counter(d[1] for d in good)
    cut = {g.paths[0]: g.axis for g in groups if g.planes is not None}
    first, plane, _ = mine[0]
    affine = _grid(f"{root}/{first.path}", cut.get(first.path), plane, good[0][1], size, shrink)
    stamps = [(f.path, p, f.split, f.label, d[3]) for (f, p, _), d in zip(mine, good, strict=True)]
    return {
        "shape": [len(good), *size],
        "bad": bad,
        "affine": affine.tolist(),
        "intensity_scale": float(np.median(scales)),
        "fingerprint": hashlib.sha256(json.dumps([size, stamps]).encode()).hexdigest()[:32],
        "columns": {
            **{n: [getattr(r[0], n) for r in mine] for n in ("path", "patient", "volume", "label")},
            "index": [row[1] for row in mine],
            "position": [row[2] for row in mine],
        },
        "report": {
            "splits": {s: {"slices": counts[s], **_members(mine, s)} for s in SPLITS},
            "size": list(size),
            "sizes": {f"{h} x {w}": n for (h, w), n in sizes.most_common()},
            "most_common_size": list(common),
            "shrink_factor": shrink,
            "shrunk": len(good) if shrink < 1 else 0,
            "cropped": sum(n for s, n in sizes.items() if _any_longer(_shrunk(s, shrink), size)),
            "padded": sum(n for s, n in sizes.items() if _any_longer(size, _shrunk(s, shrink))),
            "volumes_cut": len(cut),
            "unreadable": len(bad),
            "first_unreadable": dict(sorted(bad.items())[:10]),
            "intensity_rule": f"(raw - shift) / scale clipped to [0, 1]; scale: {PERCENTILE}th "
            "percentile of the volume within its split, or of the slice where no volume is known",
            "intensity_raw_range": [min(w[3] for w in windows), max(w[4] for w in windows)],
            "intensity_scale_range": [min(w[2] for w in windows), max(w[2] for w in windows)],
            "volumes_shifted": sum(w[1] != 0 for w in windows),
            "volumes_constant": sum(w[3] == w[4] for w in windows),
        },
    }


def _members(rows, split):
    files = [row[0] for row in rows if row[0].split == split]
    return {f"{n}s": len({getattr(f, n) for f in files}) for n in ("patient", "volume")}


def _any_longer(a, b):
    return a[0] > b[0] or a[1] > b[1]


def _grid(path, axis, plane, shape, size, shrink):
    """Affine (4, 4) of the (H, W, 1) grid of a slice, after cutting, shrinking, cropping."""
    affine = (_header(path) or (None, np.eye(4)))[1]
    if axis is not None:
        affine = _turned(affine, axis, plane)
    small, grid = _shrunk(shape, shrink), np.eye(4)
    for a, offset in enumerate(_offsets(small, size)):
        ratio = shape[a] / small[a]
        grid[a, a], grid[a, 3] = ratio, (offset + 0.5) * ratio - 0.5  # pixel centres
    return affine @ grid


def _close_gaps(path, rows, n_bytes):
    """Move the rows that could be read to the front of the file, and cut the rest off."""
    with open(path, "r+b") as file:
        for to, row in enumerate(rows):
            if to != row:
                file.seek(row * n_bytes)
                pixels = file.read(n_bytes)
                file.seek(to * n_bytes)
                file.write(pixels)
        file.truncate(len(rows) * n_bytes)


# ------------------------------------------------------------------------------------------------
# The cache, the phantom
# ------------------------------------------------------------------------------------------------


def _cache_folder(cache_dir):
    if cache_dir == "none":
        return None
    default = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    chosen = cache_dir or os.environ.get("MRCODES_CACHE") or os.path.join(default, "mrcodes")
    return Path(chosen).expanduser()


def _entry(cache, name, key, choices):
    key = key.copy()
    key.update(json.dumps(choices, sort_keys=True).encode())
    return cache and cache / f"{name}-{key.hexdigest()[:20]}"


def _open(entry, skip):
    """(index, images) of a cache entry, or (None, None) if it is not there, whole and wanted."""
    try:
        index = json.loads((entry / "index.json").read_text())
        shape = tuple(index["shape"])
        if index["bad"] and not skip:  # they may have been mended; if not, they are to be listed
            return None, None
        if os.path.getsize(entry / "images.u16") != 2 * math.prod(shape):
            return None, None
        return index, np.memmap(entry / "images.u16", np.uint16, "r", shape=shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _publish(draft, entry, skip):
    """Put a finished entry in its place in one step, whoever else does the same."""
    for _ in range(2):
        with suppress(OSError):
            os.rename(draft, entry)
        if _open(entry, skip)[0]:  # mine, or that of somebody who was faster
            break
        with suppress(OSError), tempfile.TemporaryDirectory(dir=entry.parent) as aside:
            os.rename(entry, Path(aside, "broken"))


@lru_cache
def _temporary_folder():
    folder = Path(tempfile.mkdtemp(prefix="mrcodes-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _phantom(cache, workers, progress):
    """Folder of the built-in phantom, written on first use."""
    import phantom

    root = (cache or _temporary_folder()) / f"phantom-v{phantom.VERSION}-seed0"
    if not root.is_dir():
        try:
            phantom.make_phantom(root, seed=0, workers=workers, progress=progress)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{root}: cannot write ({why}); give another --cache_dir") from None
    return root


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def add_data_arguments(parser, suppress_default=False):
    """Add the flags that say which data to use; see `load`."""
    group = parser.add_argument_group("data")

    def add(flag, default, text, **options):
        text += "" if "default" in text else f" (default: {default})"
        default = argparse.SUPPRESS if suppress_default else default
        group.add_argument(flag, default=default, help=text, **options)

    number = {"type": utils.at_least(1), "metavar": "N"}
    add("--data", "phantom", "'phantom', or a folder of slices or volumes", metavar="PATH")
    text = "pixels of every image (default: the most common size in train)"
    add("--image_size", None, text, type=utils.at_least(1), nargs=2, metavar=("H", "W"))
    add("--workers", None, "decoding processes (default: one per core)", **number)
    text = "where decoded slices are kept, or 'none' (default: the user's cache)"
    add("--cache_dir", None, text, metavar="DIR")
    text = "what to do with given splits that share patients: split anew, or keep"
    add("--split_policy", "patient", text, choices=POLICIES)
    text = "finds patient, volume, slice in relative paths (default: known names)"
    add("--group_regex", None, text, metavar="REGEX")
    add("--plane", "coronal", "plane that 3D volumes are cut along", choices=tuple(PLANES))
    add("--slices", 60, "central slices to take from a 3D volume", **number)
    text = "go on without unreadable files (default: list them and stop)"
    add("--skip_unreadable", False, text, action="store_true")


def load_from_args(args, **overrides) -> SliceData:
    """`load` with the flags of `add_data_arguments` (and --seed, where args has one)."""
    return load(**{**utils.data_arguments(args, load), **overrides})


def _draw(data, out):
    """Write a contact sheet of every split, and a histogram of the intensities in use."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns, (h, w) = 8, data.size
    figure = Figure((14, 0.6 + 3 * (14 / columns * h / w + 0.4)), layout="constrained")
    axes = figure.subplots(3, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for split, row in zip(SPLITS, axes, strict=True):
        part = data[split]
        shown = min(columns, len(part))
        for k, axis in enumerate(row[:shown]):
            i = int((k + 0.618 * k % 1) * len(part) / shown)  # all volumes, at varied positions
            item = part.slices[i]
            axis.imshow(part.images[i], cmap="gray", vmin=0, vmax=65535)
            title = f"{split}: {item.volume[-24:]}\n{item.label or ''} at {item.position:.2f}"
            axis.set_title(title, fontsize=7)
    figure.suptitle(data.describe(), fontsize=8)
    figure.savefig(out / "contact_sheet.png", dpi=120)
    figure = Figure((7, 4), layout="constrained")
    axis = figure.subplots()
    for split in SPLITS:
        images = data[split].images
        some = images[:: max(1, len(images) // 500)] / 65535
        counts, edges = np.histogram(some, bins=100, range=(0, 1), density=True)
        axis.stairs(counts, edges, label=f"{split} ({len(some)} slices)")
    axis.set(yscale="log", xlabel="intensity in use", ylabel="density of pixels", title=data.name)
    axis.legend()
    figure.savefig(out / "histogram.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description="Tell what a data set holds, and draw it.", formatter_class=utils.HelpFormatter
    )
    add_data_arguments(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    text = "folder for the two figures and report.json"
    parser.add_argument("--out", type=Path, default=Path("runs/dataset"), metavar="DIR", help=text)
    args = parser.parse_args()
    data = load_from_args(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(data.report, indent=2))
    _draw(data, args.out)
    print(data.describe())
    for key, value in data.report.items():
        if key != "warnings":
            print(f"  {key}: {json.dumps(value) if isinstance(value, dict | list) else value}")
    for a, b in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        print(f"patients in both {a} and {b}: {len({*data[a].patients} & {*data[b].patients})}")
    print(f"wrote contact_sheet.png, histogram.png and report.json in {args.out}")


if __name__ == "__main__":
    utils.run_main(main)

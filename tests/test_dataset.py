"""dataset.py against nibabel, Pillow and numpy: layouts, patients, pixels, cache, bad files."""

import gzip
import json
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
import types
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import dataset
import utils
from dataset import SPLITS
from utils import UserError

REPO = Path(dataset.__file__).parent
SIZE = (12, 8)


@pytest.fixture
def load(tmp_path):
    def call(root, **options):
        options = {"cache_dir": tmp_path / "cache", "workers": 1, "progress": False} | options
        return dataset.load(root, **options)

    return call


def pixels(seed, size=SIZE, top=300):
    return np.random.default_rng(seed).integers(0, top, size).astype(np.int16)


def save(path, array, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    else:
        Image.fromarray(array).save(path)
    return path


def hipmri(root, cases=((4, 5, 6), (36,), (40, 41)), weeks=2, slices=4, ending=".nii.gz"):
    for split, members in zip(SPLITS, cases, strict=True):
        for case in members:
            for week in range(weeks):
                for i in range(slices):
                    name = f"case_{case:03d}_week_{week}_slice_{i}{ending}"
                    array = pixels(1000 * case + 10 * week + i, top=100 * (1 + week))
                    save(root / f"keras_slices_{split}" / name, array)
                    save(root / f"keras_slices_seg_{split}" / f"seg_{name[5:]}", array // 100)
    return root


def folder(root, names, size=SIZE):
    for i, name in enumerate(names):
        save(root / name, pixels(i, size).astype(np.uint8))
    return root


def python(*words):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)


def patients(data):
    return {s: set(data[s].patients) for s in SPLITS}


def assert_no_patient_in_two_splits(data):
    train, validate, test = patients(data).values()
    assert train
    assert validate
    assert test
    assert not train & validate
    assert not train & test
    assert not validate & test


def expected(arrays):
    """A volume in [0, 1] as DESIGN.md has it, by numpy alone."""
    volume = np.stack(arrays).astype(np.float64)
    return np.clip(volume / np.percentile(volume, 99.5), 0, 1)


def by_path(data):
    return {item.path: split.images[i] for split in (data[s] for s in SPLITS)
            for i, item in enumerate(split.slices)}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Layouts, patients, labels
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_hipmri_2d(tmp_path, load, ending):
    data = load(hipmri(tmp_path / "hip", ending=ending))
    assert data.layout == "HipMRI 2D slices"
    assert [len(data[s]) for s in SPLITS] == [24, 8, 16]
    assert patients(data)["test"] == {"case_040", "case_041"}
    assert data.report["split_origin"] == "as given"
    assert data.report["ignored"] == {"folders of label maps": 3}
    item = data["train"].slices[1]
    assert item.volume == "case_004_week_0"
    assert (item.split, item.label, item.index) == ("train", None, 0)
    assert item.position == pytest.approx(1 / 3)
    assert data.describe().startswith("hip: HipMRI 2D slices, 12 x 8")
    json.dumps(data.report)


def test_a_picture_beside_the_splits_does_not_cost_the_split(tmp_path, load):
    root = hipmri(tmp_path / "HipMRI_study_keras_slices_data")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(root / "preview.png")
    data = load(tmp_path)
    assert data.layout == "HipMRI 2D slices"
    assert data.report["split_origin"] == "as given"
    assert data.report["outside_split_folders"] == 1


def test_intensity_is_that_of_the_volume_and_of_no_other_split(tmp_path, load):
    root = hipmri(tmp_path / "hip")
    images = by_path(load(root))
    for split in SPLITS:
        for volume in {p.name.rsplit("_", 1)[0] for p in root.glob(f"keras_slices_{split}/*")}:
            paths = sorted(root.glob(f"keras_slices_{split}/{volume}_*"))
            want = expected([nibabel.load(p).get_fdata() for p in paths])
            got = np.stack([images[str(p)] for p in paths]) / 65535
            assert np.abs(got - want).max() <= 1 / 65535


def test_batch_is_a_float_tensor(tmp_path, load):
    train = load(hipmri(tmp_path / "hip"))["train"]
    batch = train.batch([5, 0])
    assert (tuple(batch.shape), str(batch.dtype)) == ((2, 1, *SIZE), "torch.float32")
    assert np.array_equal((batch[:, 0].numpy() * 65535).round(), train.images[[5, 0]])
    assert (batch.min() >= 0, batch.max()) == (True, 1)


@pytest.mark.parametrize(("plane", "axis"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_hipmri_3d_is_cut_along_a_plane(tmp_path, load, plane, axis, order):
    affine = np.diag([-1.7, -1.6, 1.5, 1])[:, [*order, 3]]  # LPS, axes stored in any order
    volumes = {}
    for case in (4, 5, 36, 40):
        array = pixels(case, (10, 9, 8)).transpose(order)
        name = f"Case_{case:03d}_Week1_LFOV.nii.gz"
        volumes[case] = array
        save(tmp_path / "hip/semantic_MRs_anon" / name, array, affine)
        label = name.replace("LFOV", "SEMANTIC_LFOV")
        save(tmp_path / "hip/semantic_labels_anon" / label, array // 100, affine)
    data = load(tmp_path / "hip", plane=plane, slices=5)
    assert data.layout == "HipMRI 3D volumes"
    assert patients(data) == {"train": {"case_004", "case_005"}, "validate": {"case_036"},
                              "test": {"case_040"}}  # fmt: skip
    stored, n = order.index(axis), (10, 9, 8)[axis]
    first = (n - 5) // 2
    wanted = np.moveaxis(volumes[36], stored, 0)[first : first + 5]
    assert np.abs(data["validate"].images / 65535 - expected(wanted)).max() <= 1 / 65535
    assert [s.index for s in data["validate"].slices] == list(range(first, first + 5))
    assert data["validate"].positions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert data["validate"].slices[0].volume == "case_036_week_1"
    kept = [a for a in range(3) if a != stored]  # voxel (2, 3) of the first slice, by hand
    voxel = np.zeros(4)
    voxel[[*kept, stored, 3]] = 2, 3, first, 1
    assert np.allclose(data.affine @ (2, 3, 0, 1), affine @ voxel)
    assert len(load(tmp_path / "hip", plane=plane)["validate"]) == n  # fewer than 60 there


def adni(root, shared=2, known=True, listed=True):
    """12 patients of 2 scans in train, 6 in test, of whom `shared` are in both."""
    records, scan = {}, 100
    for split, members in (("train", range(12)), ("test", range(12 - shared, 18 - shared))):
        for patient in members:
            for _ in range(2):
                scan += 1
                label = ("AD", "NC")[patient % 2]
                raw = f"/x/ADNI_{patient:03d}_S_{patient:04d}_MR_br_raw_S{scan}.nii"
                records[str(scan)] = {"c1": "x", "raw": raw, "label": 2 * (patient % 2)}
                names = [f"AD_NC/{split}/{label}/{scan}_{i}.jpeg" for i in (78, 79, 100)]
                folder(root, names)
    if not listed:
        records = [{"image": f"{k}.nii", **v} for k, v in records.items()]
    if known:
        (root / dataset.ADNI_JSON).write_text(json.dumps(records))
    return root


@pytest.mark.parametrize("start", ["", "AD_NC"])
@pytest.mark.parametrize("listed", [True, False])
def test_adni_split_is_replaced_by_one_of_patients(tmp_path, load, capsys, start, listed):
    data = load(adni(tmp_path / "adni", listed=listed) / start)
    assert data.layout == "ADNI 2D slices (AD_NC)"
    assert_no_patient_in_two_splits(data)
    assert sum(map(len, patients(data).values())) == 16
    assert "2 patients are in more than one of the given splits" in capsys.readouterr().err
    assert data.report["shared_patients"] == 2
    assert data.report["patients_separable"]
    assert data.classes == ["AD", "NC"]
    for item, label in zip(data["train"].slices, data["train"].labels, strict=True):
        assert dataset._ADNI.fullmatch(item.patient)
        assert f"/{item.label}/" in item.path
        assert data.classes[label] == item.label
    assert data["train"].positions[:3].tolist() == [0, 0.5, 1]


def test_adni_as_given_keeps_the_leak_and_says_so(tmp_path, load, capsys):
    data = load(adni(tmp_path / "adni"), split_policy="as_given")
    seen = patients(data)
    assert len((seen["train"] | seen["validate"]) & seen["test"]) == 2
    assert all("/test/" in s.path for s in data["test"].slices)
    assert len(data["test"]) == 6 * 2 * 3
    assert "flatter" in capsys.readouterr().err
    assert data.report["shared_patients"] == 2


def test_adni_without_its_json_says_that_scans_stand_for_patients(tmp_path, load, capsys):
    data = load(adni(tmp_path / "adni", known=False))
    assert data.report["patients_separable"] is False
    assert "no meta_data_with_label.json" in capsys.readouterr().err
    assert "CANNOT BE TOLD APART" in data.describe()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("classes", [("AD", "CN"), ("AD",), ("MCI", "x"), ("AD", "MCI", "NC")])
def test_adni_with_other_classes(tmp_path, load, capsys, classes, known):
    root = tmp_path / "set"
    folder(root, [f"{classes[i % len(classes)]}/{100 + i}_7.png" for i in range(12)])
    if known:  # two scans of each patient
        raw = {100 + i: {"raw": f"/x/ADNI_002_S_{i // 2:04d}_MR"} for i in range(12)}
        (root / dataset.ADNI_JSON).write_text(json.dumps(raw))
    data = load(root)
    assert data.layout.startswith("ADNI")
    assert data.report["patients_separable"] is known
    assert ("12 scans are unknown" in capsys.readouterr().err) is not known
    assert_no_patient_in_two_splits(data)
    assert sum(map(len, patients(data).values())) == (6 if known else 12)


@pytest.mark.parametrize("text", ["5", "null", "{"])
def test_adni_with_a_json_of_something_else(tmp_path, load, text):
    (adni(tmp_path / "adni") / dataset.ADNI_JSON).write_text(text)
    with pytest.raises(UserError, match="not readable as JSON"):
        load(tmp_path / "adni")


def test_adni_with_a_json_that_lacks_some_scans(tmp_path, load, capsys):
    root = adni(tmp_path / "adni")
    records = json.loads((root / dataset.ADNI_JSON).read_text())
    del records["101"], records["102"], records["103"]
    (root / dataset.ADNI_JSON).write_text(json.dumps(records))
    data = load(root)
    assert "the patients of 3 scans are unknown" in capsys.readouterr().err
    assert data.report["patients_separable"] is False
    assert sum(map(len, patients(data).values())) == 18  # 16, less one, plus three scans


@pytest.mark.parametrize("words", [("train", "validate", "test"), ("Training", "val", "testing"),
                                   ("x_train", "x-valid", "x_test"),
                                   ("train_images", "val-images", "test_images"),
                                   ("d_test/train", "d_test/val", "d_test/test")])  # fmt: skip
def test_split_folders_and_class_folders(tmp_path, load, words):
    names = [f"{w}/{c}/s{10 * k + j:03d}{c}_{i}.png" for k, w in enumerate(words)
             for j, c in enumerate("ab") for i in range(3)]  # fmt: skip
    data = load(folder(tmp_path / "set", [n.replace("a_", "_").replace("b_", "_") for n in names]))
    assert [len(data[s]) for s in SPLITS] == [6, 6, 6]
    assert data.classes == ["a", "b"]
    assert data["test"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.report["split_origin"] == "as given"


def test_one_folder_is_divided_by_patient_with_the_seed(tmp_path, load):
    root = folder(tmp_path / "set", [f"s{p:03d}_{i}.png" for p in range(20) for i in range(2)])
    first, again, other = load(root), load(root, cache_dir="none"), load(root, split_seed=1)
    for data in (first, other):
        assert_no_patient_in_two_splits(data)
        assert [len(v) for v in patients(data).values()] == [14, 3, 3]
    assert patients(first) == patients(again) != patients(other)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.classes == []
    assert set(first["train"].labels.tolist()) == {-1}


def test_a_missing_validation_split_is_taken_from_train(tmp_path, load):
    names = [f"train/s{p:03d}_0.png" for p in range(10)] + ["test/s100_0.png"]
    data = load(folder(tmp_path / "set", names))
    assert_no_patient_in_two_splits(data)
    assert patients(data)["test"] == {"s100"}
    assert "validate taken from train by patient" in data.report["split_origin"]


def test_the_same_patient_in_two_given_splits(tmp_path, load, capsys):
    names = [f"{s}/s{p:03d}_{i}.png" for i, s in enumerate(SPLITS) for p in range(i, i + 6)]
    data = load(folder(tmp_path / "set", names))
    assert_no_patient_in_two_splits(data)
    assert data.report["shared_patients"] == 6  # 1 to 6; 0 and 7 are in one split only
    assert "6 patients are in more than one of the given splits" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_ever_in_two_splits(tmp_path, load, seed):
    rng = random.Random(seed)
    names = {f"{rng.choice(['', 'train/', 'val/', 'test/'])}{rng.choice(['', 'a/', 'b/'])}"
             f"p{rng.randrange(9)}_{rng.choice(['x_', ''])}{i}.png" for i in range(60)}  # fmt: skip
    assert_no_patient_in_two_splits(load(folder(tmp_path / "set", sorted(names))))


@pytest.mark.parametrize(("path", "patient", "volume", "number"), [
    ("case_004_week_2_slice_17.nii.gz", "case_004", "case_004_week_2", 17),
    ("CASE_4_WEEK_2_SLICE_17.nii", "case_004", "case_004_week_2", 17),
    ("Case_004_Week0_LFOV.nii.gz", "case_004", "case_004_week_0", None),
    ("s003_01.jpg", "s003", "s003", 1),
    ("1001_axi_12.png", "1001", "1001_axi", 12),
    ("218391_78.jpeg", "218391", "218391", 78),
    ("scan7_slice_4.png", "scan7", "scan7", 4),
    ("sub-02/anat/sub-02_T1w.nii.gz", "sub-02", "sub-02/anat/sub-02_T1w", None),
    ("sub-02_ses-1_slice-005.png", "sub-02", "sub-02_ses-1", 5),
    ("OAS1_0028_MR1_mpr-1_100.jpg", "OAS1_0028", "OAS1_0028_MR1_mpr-1", 100),
    ("patient_3/t2/014.png", "patient_3", "patient_3/t2/", 14),
    ("002_S_0295/scan_5.png", "002_S_0295", "002_S_0295/scan", 5),
    ("photo.png", None, None, None),
    ("img_12.png", None, None, None),
    ("26 (19).jpg", None, None, None),
    ("case_001_slice_0.nii.png", "case_001", "case_001", 0),
    ("case_001_week_2_slice_3.nii.gz.png", "case_001", "case_001_week_2", 3),
    ("slice_1_of_20.png", None, None, None),
    ("s3_slice_1_of_20.png", "s3", "s3", 1),
    ("image_003_256.png", None, None, None),
    ("img_1_x_0.png", None, None, None),
    ("T1_p00_1.png", None, None, None),
])  # fmt: skip
def test_names(path, patient, volume, number):
    *folders, name = path.split("/")
    found = dataset._identify(path, folders)
    assert (found or (None,) * 3) == (patient, volume, number)


def test_names_that_match_no_pattern(tmp_path, load, capsys):
    data = load(folder(tmp_path / "set", [f"{w}.png" for w in ("red", "green", "blue", "grey")]))
    assert data.report["patients_separable"] is False
    assert data.report["names_without_patient"] == 4
    assert "4 of 4 names do not tell the patient" in capsys.readouterr().err
    assert data["test"].positions.tolist() == [0.5]


def test_group_regex(tmp_path, load):
    root = folder(tmp_path / "set", [f"{w}/v-{i}.png" for w in ("red", "green", "blue")
                                     for i in (3, 1, 2)])  # fmt: skip
    data = load(root, group_regex=r"(?P<patient>\w+)/(?P<volume>v)-(?P<slice>\d)")
    assert_no_patient_in_two_splits(data)
    assert data["test"].positions.tolist() == [0, 0.5, 1]
    assert [Path(s.path).name for s in data["test"].slices] == ["v-1.png", "v-2.png", "v-3.png"]
    with pytest.raises(UserError, match="no group"):
        load(root, group_regex="x")
    with pytest.raises(UserError, match="mend it"):
        load(root, group_regex="(")


@pytest.mark.parametrize("ending", ["_slice_1.nii", ".nii"])
@pytest.mark.parametrize("regex", [r"ase_(?P<patient>\d+)", r"(?P<patient>case_\d+)_(?P<volume>w)"])
def test_group_regex_on_hipmri_names(tmp_path, load, ending, regex):
    size = (*SIZE, 4) if ending == ".nii" else SIZE
    for case in (4, 5, 36, 40):
        save(tmp_path / f"case_{case:03d}_week_0{ending}", pixels(case, size))
    data = load(tmp_path, group_regex=regex)
    assert_no_patient_in_two_splits(data)
    assert ("3D" in data.layout) == (ending == ".nii")


@pytest.mark.parametrize(("names", "message"), [
    (["s1_1", "s1_2"], r"found 1 patient \(s1\), 3 are needed, one each for train, validate and"),
    (["s1_1", "s2_2"], r"found 2 patients \(s1, s2\), 3 are needed"),
    (["train/s1_1", "test/s2_2"], r"found 2 patients \(s1, s2\), 3 are needed"),
    (["train/s1_1", "test/s2_2", "test/s3_2"],
     r"found 1 patient in train \(s1\), 2 are needed, one each for train and validate; add"),
])  # fmt: skip
def test_too_few_patients_to_split(tmp_path, load, names, message):
    with pytest.raises(UserError, match=f"{tmp_path / 'set'}: {message}"):
        load(folder(tmp_path / "set", [f"{name}.png" for name in names]))


def test_label_maps_are_passed_over(tmp_path, load):
    names = [f"imagesTr/sub-{i}.png" for i in range(4)]
    for kind in ("dseg", "aseg", "brainmask", "label-GM_probseg"):
        names.append(f"imagesTr/sub-1_{kind}.png")
    data = load(folder(tmp_path, [*names, "labelsTr/sub-1.png", "labelsTs/sub-1.png"]))
    assert sum(len(data[s]) for s in SPLITS) == 4
    assert data.report["ignored"] == {"label maps": 4, "folders of label maps": 2}


# ------------------------------------------------------------------------------------------------
# Pixels
# ------------------------------------------------------------------------------------------------


def nifti_variants():
    array = pixels(1).astype(np.int32) - 20
    yield "plain", nibabel.Nifti1Image(array, np.eye(4))
    for dtype in ("u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8", "i8"):
        values = np.abs(array) % 100
        yield dtype, nibabel.Nifti1Image(values.astype(dtype), np.eye(4), dtype=np.dtype(dtype))
    yield (
        "big endian",
        nibabel.Nifti1Image(array.astype(">i2"), np.eye(4), nibabel.Nifti1Header(endianness=">")),
    )
    scaled = nibabel.Nifti1Image(array.astype(np.int16), np.eye(4))
    scaled.header.set_slope_inter(0.37, 5.5)
    yield "scaled", scaled
    yield "trailing dimension", nibabel.Nifti1Image(array[..., None], np.eye(4))
    yield "two of them", nibabel.Nifti1Image(array[..., None, None], np.eye(4))
    yield "leading dimension", nibabel.Nifti1Image(array[None], np.eye(4))
    yield "NIfTI-2", nibabel.Nifti2Image(array, np.eye(4))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("image", [pytest.param(i, id=n) for n, i in nifti_variants()])
def test_nifti_values_are_those_of_nibabel(tmp_path, image, ending):
    path = tmp_path / f"x{ending}"
    nibabel.save(image, path)
    want = nibabel.load(path).get_fdata().reshape(SIZE)
    got = dataset._read_nifti(path)
    assert got.shape == SIZE
    assert np.allclose(got, want, rtol=1e-12)


def test_colour_nifti_is_grey_as_in_pillow(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    array = np.zeros((*SIZE, 1), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for i, c in enumerate("RGB"):
        array[c][..., 0] = rgb[..., i]
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "x.nii.gz")
    want = np.asarray(Image.fromarray(rgb).convert("L"))
    assert np.array_equal(dataset._read_nifti(tmp_path / "x.nii.gz"), want)


@pytest.mark.parametrize(("name", "array"), [
    ("grey.png", pixels(1).astype(np.uint8)),
    ("grey.jpeg", pixels(1).astype(np.uint8)),
    ("colour.png", pixels(1, (*SIZE, 3)).astype(np.uint8)),
    ("colour.jpg", pixels(1, (*SIZE, 3)).astype(np.uint8)),
    ("alpha.png", pixels(1, (*SIZE, 4)).astype(np.uint8)),
    ("deep.png", pixels(1, top=30000).astype(np.uint16) * 2),
    ("deep.tif", pixels(1, top=30000).astype(np.uint16) * 2),
    ("float.tiff", pixels(1).astype(np.float32) / 7),
    ("bilevel.png", pixels(1) > 150),
])  # fmt: skip
def test_raster_values_are_those_of_pillow(tmp_path, name, array):
    got = dataset._read_raster(save(tmp_path / name, array))
    with Image.open(tmp_path / name) as image:
        keep = array.dtype in (np.uint16, np.float32)
        assert np.array_equal(got, np.asarray(image if keep else image.convert("L")))
    if name.endswith((".png", ".tif", ".tiff")) and array.ndim == 2 and array.dtype != bool:
        assert np.array_equal(got, array)


def test_values_negative_constant_and_sparse(tmp_path, load):
    rng = np.random.default_rng(0)
    ct = rng.integers(-1000, 400, SIZE).astype(np.int16)
    ringing = np.abs(rng.normal(100, 30, SIZE)).astype(np.float32)
    ringing[0, 0] = -0.5
    sparse = np.zeros((40, 40), np.int16)
    sparse[0, 0] = 7
    for name, array in {"s1": ct, "s2": ringing, "s3": np.full(SIZE, 9), "s4": np.zeros(SIZE),
                        "s5": np.full(SIZE, -9), "s6": sparse}.items():  # fmt: skip
        save(tmp_path / "set" / f"{name}_0.nii", array.astype(np.float32))
    data = load(tmp_path / "set", image_size=SIZE)
    images = {Path(p).name[:2]: i / 65535 for p, i in by_path(data).items()}
    low, high = np.percentile(ct, 0.5), np.percentile(ct, 99.5)
    assert np.abs(images["s1"] - np.clip((ct - low) / (high - low), 0, 1)).max() < 2 / 65535
    want = np.clip(ringing / np.percentile(ringing, 99.5), 0, 1)
    assert np.abs(images["s2"] - want).max() < 2 / 65535
    assert [images[k].min() for k in ("s3", "s4", "s5")] == [1, 0, 0]
    assert [images[k].max() for k in ("s3", "s4", "s5")] == [1, 0, 0]
    assert data.report["volumes_shifted"] == 2


@pytest.mark.parametrize("seed", range(6))
def test_the_percentile_is_that_of_numpy(seed):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=rng.integers(1, 5000)).astype(np.float32) ** rng.integers(1, 6)
    if seed % 3 == 0:
        pixels = np.round(pixels)
    for percent in (0.5, 99.5):
        want = np.percentile(pixels.astype(np.float64), percent)
        assert dataset._percentile(pixels, percent) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_a_volume_beyond_memory_is_read_twice(tmp_path, load, monkeypatch):
    root = hipmri(tmp_path / "hip")
    want = by_path(load(root))
    monkeypatch.setattr(dataset, "HELD_PIXELS", SIZE[0] * SIZE[1])
    got = by_path(load(root, cache_dir="none"))
    assert got.keys() == want.keys()
    assert all(np.abs(got[p].astype(int) - want[p]).max() < 0.2 * 65535 for p in want)
    assert all(np.corrcoef(got[p].ravel(), want[p].ravel())[0, 1] > 0.98 for p in want)


def test_sizes_that_differ_are_cropped_and_padded(tmp_path, load):
    root = folder(tmp_path / "set", [f"s{p}_0.png" for p in range(6)])
    wide, small = pixels(50, (12, 11)).astype(np.uint8), pixels(51, (7, 8)).astype(np.uint8)
    save(root / "s6_0.png", wide)
    save(root / "s7_0.png", small)
    data = load(root)
    assert data.size == SIZE
    assert (data.report["cropped"], data.report["padded"]) == (1, 1)
    assert data.report["sizes"] == {"12 x 8": 6, "12 x 11": 1, "7 x 8": 1}
    images = {Path(p).name: i / 65535 for p, i in by_path(data).items()}
    assert np.abs(images["s6_0.png"] - expected([wide])[0][:, 1:9]).max() <= 1 / 65535
    assert np.abs(images["s7_0.png"][2:9] - expected([small])[0]).max() <= 1 / 65535
    assert images["s7_0.png"][:2].max() == images["s7_0.png"][9:].max() == 0


@pytest.mark.parametrize(("size", "counts"), [
    ((13, 8), (1, 0)), ((11, 8), (0, 1)), ((12, 7), (0, 1)), ((13, 7), (1, 1)),
])  # fmt: skip
def test_one_pixel_too_many_or_too_few_is_counted(tmp_path, load, size, counts):
    root = folder(tmp_path / "set", [f"s{p}_0.png" for p in range(6)])
    data = load(folder(root, ["s7_0.png"], size))
    assert (data.report["cropped"], data.report["padded"]) == counts


def test_the_size_is_the_most_common_one_of_train_whatever_a_sample_says(tmp_path, load):
    root = tmp_path / "set"
    common = [f"train/s{p:03d}_{i}.png" for p in range(90) for i in (1, 2)]
    folder(root, common[1::2] + common[2::4], (6, 6))
    folder(root, [n for n in common if not (root / n).exists()])
    folder(root, [f"{s}/t{s}{p}_1.png" for s in ("test", "val") for p in range(200)], (9, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_header", lambda path: ((9, 9), np.eye(4)))  # a misleading sample
        assert load(root, cache_dir="none").size == (6, 6)
    assert load(root).size == (6, 6)


@pytest.mark.parametrize(("wanted", "shrink"), [
    ((12, 8), 1), ((24, 16), 1), ((6, 4), 0.5), ((6, 6), 0.75), ((6, 2), 0.5), ((11, 8), 1),
    ((16, 2), 1), ((11, 7), 1),
])  # fmt: skip
def test_image_size_never_stretches_and_never_enlarges(tmp_path, load, wanted, shrink):
    array = np.zeros((48, 32), np.float32)
    array[10:38, 6:26] = 200
    for p in range(3):
        save(tmp_path / "set" / f"s{p}_0.nii", array)
    data = load(tmp_path / "set", image_size=[4 * n for n in wanted])
    assert data.size == tuple(4 * n for n in wanted)
    assert data.report["shrunk"] == (3 if shrink < 1 else 0)
    area = data["train"].images[0].sum() / 65535
    if shrink == 1 and min(wanted) >= 8:
        assert area == 28 * 20
    elif wanted == (6, 4):
        assert area == pytest.approx(28 * 20 / 4, rel=0.05)


@pytest.mark.parametrize("thin", [2, 1, 0])
@pytest.mark.parametrize("wanted", [None, (12, 20), (8, 10), (6, 8)])
def test_the_affine_follows_the_geometry(tmp_path, load, wanted, thin):
    """The centre of a bright square keeps its place in the scanner's millimetres."""
    rng = np.random.default_rng(3)
    affine = np.eye(4)
    affine[:3] = rng.normal(size=(3, 4))
    array = np.zeros((16, 20), np.float32)
    array[6:10, 8:12] = 100
    for p in range(3):
        save(tmp_path / "set" / f"s{p}_0.nii.gz", np.expand_dims(array, thin), affine)
    data = load(tmp_path / "set", image_size=wanted)
    centre = np.insert([7.5, 9.5], thin, 0)
    image = data["train"].images[0].astype(float)
    i, j = ((np.indices(image.shape) * image).sum((1, 2)) / image.sum()).tolist()
    assert np.allclose(data.affine @ (i, j, 0, 1), affine @ (*centre, 1), atol=1e-3)
    assert np.allclose(data.zooms, nibabel.affines.voxel_sizes(data.affine))
    assert data.intensity_scale == pytest.approx(np.percentile(array, 99.5))


@pytest.mark.parametrize("value", [0, np.nan])
def test_an_affine_that_maps_nothing_gives_way_to_the_zooms(tmp_path, load, value):
    for p in range(3):
        image = nibabel.Nifti1Image(pixels(p, (*SIZE, 4)), np.eye(4))
        image.header.set_zooms((2, 3, 4))
        image.header["srow_x"] = value
        image.header["sform_code"] = 1
        (tmp_path / f"s{p}.nii").write_bytes(
            image.header.binaryblock + bytes(4) + image.get_fdata().astype("i2").tobytes("F")
        )
    data = load(tmp_path, plane="axial", group_regex=r"(?P<patient>s\d)")
    assert data.zooms == (2, 3, 4)
    assert len(data["test"]) == 4


# ------------------------------------------------------------------------------------------------
# Cache
# ------------------------------------------------------------------------------------------------


def test_a_second_start_opens_no_image(tmp_path, load, monkeypatch):
    root = hipmri(tmp_path / "hip")
    first = load(root)
    for name in ("_read_nifti", "_header", "_build"):
        monkeypatch.setattr(dataset, name, None)
    second = load(root)
    assert second.report == first.report
    assert second.fingerprint == first.fingerprint
    assert second["train"].slices == first["train"].slices
    assert np.array_equal(second["test"].images, first["test"].images)
    assert np.array_equal(second.affine, first.affine)


def test_the_cache_sees_new_files_new_times_and_new_choices(tmp_path, load):
    root = hipmri(tmp_path / "hip")
    first = load(root)
    entries = {first.report["cache"]}
    path = root / "keras_slices_train/case_004_week_0_slice_0.nii.gz"
    save(path, pixels(77))
    os.utime(path, ns=(1, 1))
    changed = load(root)
    assert changed.fingerprint != first.fingerprint
    entries |= {changed.report["cache"], load(root, image_size=(6, 4)).report["cache"]}
    save(root / "keras_slices_test/case_042_week_0_slice_0.nii.gz", pixels(78))
    entries.add(load(root).report["cache"])
    assert len(entries) == 4


def test_the_fingerprint_does_not_depend_on_the_place_or_the_time(tmp_path, load):
    first = load(hipmri(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    assert load(tmp_path / "b").fingerprint == first.fingerprint


def test_two_folders_of_the_same_name_keep_apart(tmp_path, load):
    for i, place in enumerate("ab"):
        for p in range(3):
            path = save(tmp_path / place / f"set/s{p}_0.nii", pixels(10 * i + p))
            os.utime(path, ns=(1, 1))
    first, second = load(tmp_path / "a/set"), load(tmp_path / "b/set")
    assert first.fingerprint != second.fingerprint
    assert not np.array_equal(first["train"].images, second["train"].images)


def test_a_cache_in_the_home_of_nobody(tmp_path, load):
    with pytest.raises(UserError, match="another --cache_dir"):
        load(hipmri(tmp_path / "hip"), cache_dir="~nosuch/x")


def test_workers_and_memory_give_the_same_pixels(tmp_path, load):
    root = hipmri(tmp_path / "hip", weeks=8, slices=6)
    one, two, memory = load(root), load(root, workers=2, cache_dir=tmp_path / "two"), None
    memory = load(root, workers=2, cache_dir="none")
    assert one.fingerprint == two.fingerprint == memory.fingerprint
    for split in SPLITS:
        assert np.array_equal(one[split].images, two[split].images)
        assert np.array_equal(one[split].images, memory[split].images)


def _start(root, cache, queue):
    queue.put(dataset.load(root, cache_dir=cache, workers=1, progress=False).fingerprint)


def test_two_starts_at_once(tmp_path):
    root, queue = hipmri(tmp_path / "hip"), multiprocessing.get_context("fork").Queue()
    both = [multiprocessing.get_context("fork").Process(
        target=_start, args=(root, tmp_path / "cache", queue)) for _ in range(4)]  # fmt: skip
    for process in both:
        process.start()
    assert len({queue.get(timeout=60) for _ in both}) == 1
    for process in both:
        process.join()
    assert [p.name[:4] for p in (tmp_path / "cache").iterdir()] == ["hip-"]


@pytest.mark.parametrize("harm", ["images.u16", "index.json", "short", "{}", "[]"])
def test_a_broken_cache_entry_is_made_again(tmp_path, load, harm):
    root = hipmri(tmp_path / "hip")
    first = load(root)
    want, entry = np.array(first["train"].images), Path(first.report["cache"])
    if harm == "short":
        os.truncate(entry / "images.u16", 100)
    elif harm in ("{}", "[]"):
        (entry / "index.json").write_text(harm)
    else:
        (entry / harm).unlink()
    assert np.array_equal(load(root)["train"].images, want)
    assert sorted(os.listdir(entry)) == ["images.u16", "index.json"]
    assert [p.name[:4] for p in (tmp_path / "cache").iterdir()] == ["hip-"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, load):
    root = hipmri(tmp_path / "hip", weeks=8, slices=6)
    code = f"""if 1:
        import resource, signal, dataset
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a longer file cannot be written
        dataset.utils.run_main(lambda: dataset.load({str(root)!r}, workers=2, progress=False,
                               cache_dir={str(tmp_path / "cache")!r}))"""
    done = python("-c", code)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot write the cache" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_phantom_is_made_once_and_announced(tmp_path, load, monkeypatch):
    made = []

    def make(root, seed=0, workers=None, progress=True):
        made.append(root)
        hipmri(Path(root))

    monkeypatch.setattr(dataset, "phantom", types.SimpleNamespace(VERSION=7, make_phantom=make))
    data = load("phantom")
    assert load("phantom").fingerprint == data.fingerprint
    assert made == [tmp_path / "cache/phantom-v7-seed0"]
    assert data.describe().startswith("PHANTOM (synthetic, no patients)")
    assert (data.name, data.is_phantom) == ("phantom", True)
    elsewhere = load("phantom", cache_dir="none")
    assert len(made) == 2
    assert elsewhere.fingerprint == data.fingerprint


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------


def test_no_such_folder_and_an_empty_folder(tmp_path, load):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "x")
    (tmp_path / "a.dcm").write_text("x")
    with pytest.raises(UserError, match=r"\.dcm files: 1"):
        load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no NIfTI, PNG, JPEG or TIFF image in it \(it is empty\)"):
        load(tmp_path / "empty")


def promise(n):
    header = nibabel.Nifti1Header()
    header.set_data_shape((n, n))
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return gzip.compress(header.binaryblock + bytes(100))


def promise_of_nifti2():
    header = nibabel.Nifti2Header()
    header.set_data_shape((1 << 40, 1 << 40))
    header["vox_offset"], header["magic"] = 544, b"n+2"
    return gzip.compress(header.binaryblock + bytes(100))


def with_one(value):
    array = pixels(9).astype(np.float64)
    array[3, 3] = value
    return array


def sized(*shape):
    header = nibabel.Nifti1Header()
    header["dim"][:3], header["vox_offset"], header["magic"] = (2, *shape), 352, b"n+1"
    header["datatype"], header["bitpix"] = 4, 16
    return gzip.compress(header.binaryblock + bytes(500))


ZIPPED = gzip.compress(pixels(9, (60, 60)).tobytes())
BAD = {  # what is written, and what is said about it
    "nothing": (b"", "empty, 0 bytes"),
    "truncated": (ZIPPED[:900], "truncated gzip"),
    "no checksum": (ZIPPED[:-6], "truncated gzip"),
    "damaged": (ZIPPED[:500] + bytes(20) + ZIPPED[520:], "damaged gzip"),
    "text": (b"not an image\n" * 50, "not a NIfTI file"),
    "zipped text": (gzip.compress(b"not an image\n" * 50), "not a NIfTI file"),
    "4D": (pixels(9, (4, 4, 4, 3)), "4D .4 x 4 x 4 x 3."),
    "3D": (pixels(9, (4, 4, 4)), "a 3D volume .4, 4, 4."),
    "NaN": (with_one(np.nan), "contains NaN or infinity"),
    "infinity": (with_one(-np.inf), "contains NaN or infinity"),
    "complex": (pixels(9).astype(np.complex64), "holds complex64 values"),
    "promise": (promise(16000), "truncated: too short for 256000000 pixels"),
    "larger promise": (promise(32000), "its header says 32000 x 32000, too many pixels"),
    "largest promise": (promise_of_nifti2(), "its header says .*, too many pixels"),
    "empty pieces": (5_000 * gzip.compress(b""), "truncated gzip|not a NIfTI file"),
    "zero": (sized(0, 8), "no pixels, its header says 0 x 8"),
    "negative": (sized(-3, 8), "no pixels, its header says -3 x 8"),
    "folder": (None, "a folder named like an image"),
}


def write(path, content):
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)


def test_a_gzip_in_many_pieces_is_read(tmp_path, load):
    """As bgzip writes them."""
    root = folder(tmp_path / "d", [f"sub-{i}_{j}.nii.gz" for i in range(4) for j in range(2)])
    want = by_path(load(root, cache_dir="none"))
    path = root / "sub-1_0.nii.gz"
    raw = gzip.decompress(path.read_bytes())
    pieces = [gzip.compress(raw[i : i + 50]) for i in range(0, len(raw), 50)]
    path.write_bytes(b"".join(pieces))
    found = by_path(load(root, cache_dir="none"))
    assert all(np.array_equal(found[name], want[name]) for name in want)


def test_a_name_that_is_not_utf8(tmp_path, load):
    root = folder(tmp_path / "d", [f"sub-{i}_{j}.nii.gz" for i in range(4) for j in range(2)])
    other = os.fsencode(root / "sub-1_0.nii.gz").replace(b"_0", b"_\xe9")
    os.rename(root / "sub-1_0.nii.gz", other)
    with pytest.raises(UserError, match=r"sub-1_.*e9.nii.gz \(its name is not UTF-8; rename it"):
        load(root, cache_dir="none")
    assert len(load(root, cache_dir="none", skip_unreadable=True).report["classes"]) == 0
    with pytest.raises(UserError, match=r"its name is not UTF-8"):
        dataset.load_alone(os.fsdecode(other), (16, 16))


def test_what_negative_values_are_shifted_by_is_known(tmp_path, load):
    for i in range(4):
        array = np.linspace(-1000, 1000, 32 * 32).reshape(32, 32)
        save(tmp_path / f"sub-{i}_0.nii.gz", array)
    data = load(tmp_path)
    units = data["train"].batch([0])[0, 0].numpy() * data.intensity_scale + data.intensity_shift
    assert np.abs(np.sort(units.ravel()) - np.linspace(-1000, 1000, 1024)).max() < 12


def test_a_class_that_no_training_slice_has(tmp_path, load, capsys):
    names = [f"{s}/{c}/sub-{s}{i}_0.nii.gz" for s in SPLITS for c in ("a", "b") for i in range(2)]
    folder(tmp_path, [*names, "test/c/sub-9_0.nii.gz"])
    load(tmp_path)
    assert "no training slice is of class c" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "reason"), BAD.values(), ids=BAD)
def test_a_bad_nifti_is_named_with_its_reason(tmp_path, load, content, reason):
    root = hipmri(tmp_path / "hip")
    want = by_path(load(root, cache_dir="none"))
    write(root / "keras_slices_train/case_003_week_0_slice_0.nii.gz", content)
    message = rf"1 of \d+ files cannot be read: keras_slices_train/case_003.*\({reason}"
    with pytest.raises(UserError, match=message) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    data = load(root, skip_unreadable=True)
    assert data.report["unreadable"] == 1
    assert "1 unreadable" in data.describe()
    got = by_path(data)
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[p], want[p]) for p in want)
    with pytest.raises(UserError, match=message):  # the cache of the tolerant start hides nothing
        load(root)


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("s9_0.png", b"", "empty, 0 bytes"), ("s9_0.png", b"text", "not an image"),
    ("s9_0.jpg", None, "truncated"), ("s9_0.tif", "pages", "2 pages"),
    ("s9_0.png", "bomb", "9000 x 9000 pixels are too many"),
])  # fmt: skip
def test_a_bad_raster_is_named_with_its_reason(tmp_path, load, name, content, reason):
    root = folder(tmp_path / "set", [f"s{i}_0.png" for i in range(5)])
    path, image = root / name, Image.fromarray(pixels(9, (60, 60)).astype(np.uint8))
    if content == "pages":
        image.save(path, save_all=True, append_images=[image])
    elif content == "bomb":
        Image.new("1", (9000, 9000)).save(path)
    elif content is None:
        image.save(path)
        path.write_bytes(path.read_bytes()[:-300])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"1 of 6 files cannot be read: {name} .*{reason}"):
        load(root)
    assert load(root, skip_unreadable=True).report["unreadable"] == 1


def test_a_folder_named_like_the_file_is_looked_into(tmp_path, load):
    root = hipmri(tmp_path / "hip", ending=".nii")
    path = root / "keras_slices_train/case_004_week_0_slice_0.nii"
    path.rename(tmp_path / "aside")
    path.mkdir()
    (tmp_path / "aside").rename(path / path.name)
    data = load(root)
    assert len(data["train"]) == 24
    assert data["train"].slices[0].path == str(path / path.name)


def test_no_permission(tmp_path):
    """Run as another user where the tests run as root, whom permissions do not stop."""
    root = hipmri(tmp_path / "hip")
    (root / "keras_slices_train/case_004_week_0_slice_0.nii.gz").chmod(0)
    (root / "keras_slices_validate").chmod(0)
    for parent in (tmp_path, *tmp_path.parents[:2]):  # pytest's own, closed to others
        parent.chmod(0o755)
    code = (
        "import os, dataset; os.geteuid() or os.seteuid(65534)\n"
        f"dataset.load({str(root)!r}, cache_dir='none', workers=1, progress=False)"
    )
    done = python("-c", code)
    (root / "keras_slices_validate").chmod(0o755)
    last = done.stderr.splitlines()[-1]
    assert "2 of 40 files cannot be read" in last
    assert "slice_0.nii.gz (no permission to read it)" in last
    assert "keras_slices_validate (no permission to read it)" in last


def test_links(tmp_path, load):
    root = hipmri(tmp_path / "hip")
    (root / "keras_slices_train/loop").symlink_to(root)
    (root / "a").symlink_to(root / "keras_slices_train")
    (root / "me").symlink_to(root / "me")
    assert len(load(root)["train"]) == 24
    outside = tmp_path / "outside"
    (root / "keras_slices_test").rename(outside)
    (root / "keras_slices_test").symlink_to(outside)
    assert len(load(root)["test"]) == 16
    (root / "keras_slices_test/case_041_week_9_slice_0.nii.gz").symlink_to("nowhere")
    with pytest.raises(UserError, match="1 of 48 files cannot be read: .*broken link"):
        load(root)


def test_20000_files_of_which_three_are_bad(tmp_path):
    template = save(tmp_path / "x.nii", pixels(0))
    for split, cases in zip(SPLITS, (range(4, 36), range(36, 38), range(40, 46)), strict=True):
        (tmp_path / f"hip/keras_slices_{split}").mkdir(parents=True)
        for case in cases:
            for week in range(5):
                for i in range(100):
                    name = f"keras_slices_{split}/case_{case:03d}_week_{week}_slice_{i}.nii"
                    os.link(template, tmp_path / "hip" / name)  # 20,000 inodes are slow to free
    bad = [f"keras_slices_train/case_{c:03d}_week_0_slice_50.nii" for c in (5, 9, 30)]
    for name in bad:
        (tmp_path / "hip" / name).unlink()
        (tmp_path / "hip" / name).write_bytes(template.read_bytes()[:400])
    command = ["dataset.py", "--data", tmp_path / "hip", "--workers", "2",
               "--cache_dir", tmp_path / "cache", "--out", tmp_path / "out"]  # fmt: skip
    done = python(*command)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert last.startswith(f"error: {tmp_path / 'hip'}: 3 of 20000 files cannot be read: ")
    assert all(name in last for name in bad)
    assert list((tmp_path / "cache").iterdir()) == []
    done = python(*command, "--skip_unreadable")
    assert done.returncode == 0
    assert "unreadable: 3" in done.stdout
    assert '"slices": 15997' in done.stdout


def test_only_the_first_ten_bad_files_are_listed(tmp_path, load):
    root = hipmri(tmp_path / "hip")
    for path in sorted((root / "keras_slices_train").iterdir())[:13]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="13 of 48 files") as caught:
        load(root)
    assert str(caught.value).count("0 bytes") == 10


NIBABEL_DATA = Path(nibabel.__file__).parent / "tests/data"


@pytest.mark.parametrize("path", sorted(p for p in NIBABEL_DATA.iterdir() if p.is_file()),
                         ids=lambda p: p.name)  # fmt: skip
def test_images_that_nibabel_ships(tmp_path, load, path):
    for i in range(3):
        (tmp_path / "set").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "set" / f"s{i}_{path.name}")
    reason = None
    try:
        data = load(tmp_path / "set", slices=3)
    except UserError as error:
        reason = str(error)
    if reason:
        assert "Error" not in reason  # words, not the name of an exception
    else:
        assert len(data["train"]) == 3
        assert path.name.endswith((".nii", ".nii.gz"))
        image = nibabel.load(path)
        axis = nibabel.aff2axcodes(image.affine, ("LL", "CC", "HH")).index("C")
        planes = [s.index for s in data["train"].slices]
        want = np.moveaxis(np.squeeze(image.get_fdata()), axis, 0)[planes]
        low, high = np.percentile(want, (0.5, 99.5))
        low = low if low < -0.02 * high else 0
        want = np.clip((want - low) / (high - low), 0, 1)
        assert np.abs(data["train"].images / 65535 - want).max() <= 2 / 65535


@pytest.mark.parametrize("seed", range(15))
def test_random_damage_never_crashes(tmp_path, seed):
    """Any bytes either give a finite image of a sane size or a reason."""
    rng = np.random.default_rng(seed)
    plain = bytearray(save(tmp_path / "x.nii", pixels(seed, (20, 20))).read_bytes())
    for at in rng.integers(0, 360, 4):
        plain[at] = rng.integers(256)
    for name, data in (("y.nii", plain), ("y.nii.gz", zlib.compress(bytes(plain), wbits=31))):
        (tmp_path / name).write_bytes(data)
        answer = dataset._images(tmp_path, name, None, [0])
        assert isinstance(answer, str) or np.isfinite(answer[0]).all()


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    root = hipmri(tmp_path / "hip")
    done = python("dataset.py", "--data", root, "--cache_dir", tmp_path / "cache",
                  "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hip: HipMRI 2D slices, 12 x 8")
    assert "patients in both train and test: 0" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "contact_sheet.png", "histogram.png", "report.json"}  # fmt: skip
    for name in ("contact_sheet.png", "histogram.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert np.asarray(image.convert("L")).std() > 5
    done = python("dataset.py", "--data", tmp_path / "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'x'}: no such folder; give --data the folder that " \
        "holds the slices\n"  # fmt: skip


def test_flags_become_arguments(tmp_path, load):
    parser = dataset.argparse.ArgumentParser()
    dataset.add_data_arguments(parser, suppress_default=True)
    args = parser.parse_args(["--data", str(hipmri(tmp_path / "hip")), "--image_size", "6", "4",
                              "--split_seed", "3"])  # fmt: skip
    assert vars(args).keys() == {"data", "image_size", "split_seed"}
    data = dataset.load(**utils.data_arguments(args, dataset.load), cache_dir="none")
    assert (data.size, data.report["preprocessing"]["plane"]) == ((6, 4), "coronal")
    with pytest.raises(SystemExit):
        parser.parse_args(["--slices", "0"])


def test_a_small_file_that_unpacks_to_a_large_one_takes_no_memory(tmp_path):
    path = save(tmp_path / "bomb.nii.gz", pixels(0))
    expected = np.asanyarray(nibabel.load(path).dataobj)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(64 << 20)))
    tracemalloc.start()
    image = dataset._read_nifti(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(image, expected)
    assert peak < 4 << 20


@pytest.mark.parametrize("size", [348, 540])
def test_an_extension_of_the_header_takes_no_memory(tmp_path, size):
    """nibabel reads all that lies between header and pixels, which a small file may make large."""
    long = 64 << 20
    image = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}[size](pixels(0), np.eye(4))
    head = bytearray(image.header.binaryblock)
    code, where = {348: ("<f", 108), 540: ("<q", 168)}[size]
    struct.pack_into(code, head, where, size + 4 + long)
    head += b"\1\0\0\0" + struct.pack("<ii", long, 6) + bytes(long + pixels(0).nbytes)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(bytes(head)))
    del head
    tracemalloc.start()
    found = dataset._images(str(tmp_path), "a.nii.gz", None, [0])
    assert "begin at byte" in found
    assert dataset._header(str(tmp_path / "a.nii.gz")) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_cache_that_would_not_fit_is_not_begun(tmp_path, load, monkeypatch):
    for i in range(4):
        save(tmp_path / "data" / f"sub-{i}.nii.gz", pixels(i))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100))
    with pytest.raises(utils.UserError, match=r"4 slices of .* take 0.0 GB, and 0.0 GB are free"):
        load(tmp_path / "data")

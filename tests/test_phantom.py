"""The built-in pelvis: same files from the same seed, in HipMRI's layout, with its statistics."""

import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation, gaussian_filter

import phantom

NAME = re.compile(r"case_(\d{3})_week_(\d+)_slice_(\d+)\.nii\.gz")
SMALL = {"n_cases": 3, "weeks": 2, "slices_per_volume": 3, "progress": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantom") / "set"
    phantom.make_phantom(path, seed=5, workers=2, **SMALL)
    return path


@pytest.fixture(scope="module")
def scan():
    return phantom.volume(5, 4, 0, 12)


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def likeness(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def test_files_do_not_depend_on_the_number_of_workers(root, tmp_path):
    phantom.make_phantom(tmp_path / "set", seed=5, workers=1, **SMALL)
    assert contents(tmp_path / "set") == contents(root)


def test_another_seed_gives_other_bodies(scan):
    assert likeness(scan, phantom.volume(6, 4, 0, 12)) < 0.95


def test_layout_names_and_no_case_in_two_splits(root):
    cases = {}
    for split in ("train", "validate", "test"):
        found = [NAME.fullmatch(p.name) for p in (root / f"keras_slices_{split}").iterdir()]
        assert all(found)
        assert len(found) == 6  # one case, two weeks, three slices
        cases[split] = {int(m[1]) for m in found}
    assert cases == {"train": {4}, "validate": {5}, "test": {6}}
    assert "synthetic" in (root / "README.txt").read_text().lower()


def test_full_size_set_has_the_splits_of_the_study(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(phantom, "_for_each", lambda _, found, *rest: jobs.extend(found))
    phantom.make_phantom(tmp_path / "set")
    cases = {s: [c for split, c, _ in jobs if split == s] for s in ("train", "validate", "test")}
    assert {s: (min(c), max(c)) for s, c in cases.items()} == {
        "train": (4, 153),
        "validate": (154, 165),
        "test": (166, 183),
    }
    assert len(jobs) * 16 >= 1500
    assert len(jobs) == len(set(jobs))


def test_slices_are_readable_nifti_in_millimetres(root):
    for path in (root / "keras_slices_validate").iterdir():
        image = nib.load(path)
        pixels = np.asarray(image.dataobj)
        assert pixels.shape == (256, 128)
        assert np.issubdtype(pixels.dtype, np.integer)
        assert pixels.min() >= 0
        assert 100 < pixels.max() < 1000
        assert np.allclose(image.header.get_zooms(), (1.68, 1.56))
        assert np.allclose(nib.affines.voxel_sizes(image.affine), (1.68, 1.56, 34))
        assert nib.aff2axcodes(image.affine)[1] == "S"  # head at the high end
        assert b"phantom" in image.header["descrip"].item()


def test_weeks_of_a_case_are_more_alike_than_cases(scan):
    week = phantom.volume(5, 4, 1, 12)
    others = [phantom.volume(5, case, 0, 12) for case in (5, 6, 7)]
    assert not np.array_equal(scan, week)
    assert likeness(scan, week) > max(likeness(scan, other) for other in others) + 0.05


def test_neighbouring_slices_are_more_alike_than_distant_ones(scan):
    near = [likeness(scan[i], scan[i + 1]) for i in range(11)]
    far = [likeness(scan[i], scan[i + 6]) for i in range(6)]
    assert np.mean(near) > np.mean(far) + 0.1


def test_body_is_symmetric_stands_in_air_and_has_two_thighs(scan):
    body = gaussian_filter(scan.astype(np.float32), (0, 1, 1)) > 0.2 * np.median(scan[scan > 0])
    assert likeness(body, body[:, ::-1]) > 0.8
    assert not body[:, :10].any()
    assert not body[:, -10:].any()
    legs = [np.count_nonzero(np.diff(row.astype(int)) == 1) for row in body[:, :, 2]]
    waist = [np.count_nonzero(np.diff(row.astype(int)) == 1) for row in body[:, :, 50]]
    assert np.median(legs) == 2
    assert np.median(waist) == 1


def test_air_is_blanked_and_noise_is_one_percent_of_the_brightest_tissue():
    scan = phantom.volume(5, 4, 0, 12).astype(np.float32)
    brightest = np.percentile(scan, 99)
    air = ~binary_dilation(gaussian_filter(scan, (0, 2, 2)) > 0.1 * brightest, iterations=3)
    low, middle, quarter, top = np.percentile(scan[air], [1, 50, 75, 99])
    assert low == middle == quarter == 0
    assert 0 < top < 0.05 * brightest
    # Noise blanked below 2 sigma leaves the tail of a Rayleigh distribution: e^-2 of the voxels.
    assert abs(np.mean(scan[air] > 0) - np.exp(-2)) < 0.03
    sigma = np.sqrt(np.mean(scan[air] ** 2) / (6 * np.exp(-2)))
    assert 0.007 < sigma / brightest < 0.015


def test_muscle_is_dark_and_fat_bright_as_in_the_study(scan):
    tissue = scan[scan > 0]
    fat = np.percentile(tissue, 85)
    # HipMRI's body: percentiles 1 / 25 / 50 / 75 / 99 of 1 / 19 / 35 / 94 / 213, fat near 130.
    assert 0.1 < np.percentile(tissue, 25) / fat < 0.3
    assert 0.2 < np.percentile(tissue, 50) / fat < 0.55
    assert 1.3 < np.percentile(tissue, 99) / fat < 2.0


def test_existing_directory_is_not_overwritten(root):
    before = contents(root)
    run = subprocess.run(
        [sys.executable, phantom.__file__, "--out", root], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
    assert str(root) in run.stderr
    assert contents(root) == before


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "tqdm", stop)
    with pytest.raises(KeyboardInterrupt):
        phantom.make_phantom(tmp_path / "set", **SMALL)
    assert not list(tmp_path.iterdir())


def test_losing_a_race_to_an_equal_set_is_fine(root, tmp_path, monkeypatch):
    target = tmp_path / "set"
    monkeypatch.setattr(phantom, "_for_each", lambda *_: shutil.copytree(root, target))
    phantom.make_phantom(target, seed=5, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert contents(target) == contents(root)


def test_losing_a_race_to_another_set_is_an_error(root, tmp_path, monkeypatch):
    target = tmp_path / "set"
    monkeypatch.setattr(phantom, "_for_each", lambda *_: shutil.copytree(root, target))
    with pytest.raises(OSError, match="set"):
        phantom.make_phantom(target, seed=6, **SMALL)
    assert contents(target) == contents(root)


def test_fewer_than_three_cases_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="at least 3"):
        phantom.make_phantom(tmp_path / "set", n_cases=2)

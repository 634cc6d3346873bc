"""The three commands as a user types them, mistakes included."""

import base64
import contextlib
import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
import weakref
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SMALL_PRIOR, SMALL_VQ_VAE, call
from PIL import Image
from skimage.metrics import structural_similarity

import dataset
import metrics
import predict
import train
import utils


@pytest.fixture(scope="module")
def predicted(run_dir):
    out, _ = call(f"predict.py --run_dir {run_dir} --n_samples 3")
    return out, json.loads((run_dir / "predict" / "metrics.json").read_text())


def contents(path):
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def mistake(command, *words):
    """The command must end with status 2 and one line on stderr that holds `words`."""
    _, err = call(command, code=2)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0], lines[0]


def test_a_run_holds_the_files_of_both_stages(run_dir):
    for stage in ("vq_vae", "pixelcnn"):
        names = {"config.json", "model.safetensors", "checkpoint.pt", "log.jsonl", "curves.png"}
        assert names <= {p.name for p in (run_dir / stage).iterdir()}
        log = [json.loads(line) for line in (run_dir / stage / "log.jsonl").open()]
        assert [entry["update"] for entry in log] == ([3, 6] if stage == "vq_vae" else [2, 4])
    assert {p.name for p in (run_dir / "codes").iterdir()} == {
        "train.npz", "validate.npz", "test.npz",
    }  # fmt: skip


def test_the_stored_codes_are_those_of_the_frozen_vq_vae(run_dir, data):
    model = utils.load_model(run_dir, "vq_vae")
    split = dataset.load(data)["test"]
    with np.load(run_dir / "codes" / "test.npz") as stored:
        assert np.array_equal(model.encode(split.batch(np.arange(len(split)))), stored["codes"])


def test_the_reported_ssim_is_skimages(predicted, run_dir, data):
    _, metrics = predicted
    model = utils.load_model(run_dir, "vq_vae")
    split = dataset.load(data)["test"]
    x = split.batch(np.arange(len(split)))
    x_hat = model(x)[0].clamp(0, 1).detach()
    expected = [
        structural_similarity(a.numpy(), b.numpy(), data_range=1.0)
        for a, b in zip(x[:, 0], x_hat[:, 0], strict=True)
    ]
    r = metrics["reconstruction"]
    assert r["ssim_mean"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert r["ssim_std"] == pytest.approx(np.std(expected), abs=1e-5)
    assert r["n_slices"] == len(split)
    with open(run_dir / "predict" / "per_slice.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ssim"]) for row in rows] == pytest.approx(expected, abs=1e-5)
    assert [row["patient"] for row in rows] == split.patients
    assert [float(row["position"]) for row in rows] == pytest.approx(split.positions.tolist())
    assert all(row["volume"].startswith(row["patient"]) for row in rows)
    assert [row["patient"] for row in rows] == split.patients


def test_samples_are_nifti_like_the_data(predicted, run_dir, data):
    files = sorted((run_dir / "predict" / "samples").glob("*.nii.gz"))
    assert len(files) == 3
    real = nib.load(dataset.load(data, progress=False)["train"].slices[0].path)
    for file in files:
        image = nib.load(file)
        assert np.squeeze(np.asanyarray(image.dataobj)).shape == (256, 128)
        assert image.get_data_dtype().kind == "i"
        assert image.header.get_zooms()[:2] == pytest.approx(real.header.get_zooms()[:2])
        assert np.allclose(image.affine, real.affine, atol=1e-4)
        assert b"no patient" in image.header["descrip"].item()


def test_surprise_is_the_priors_on_the_pixels_of_the_slice(predicted, run_dir, data):
    _, numbers = predicted
    rows = list(csv.DictReader((run_dir / "predict" / "per_slice.csv").open()))
    maps = sorted((run_dir / "predict" / "surprise").iterdir())
    assert len(maps) == len(rows)
    split = dataset.load(data)["test"]
    prior = utils.load_model(run_dir, "pixelcnn")
    codes = utils.load_model(run_dir, "vq_vae").encode(split.batch([1]))
    logits = prior(codes, torch.tensor([-1]), torch.tensor(split.positions[1:2]))
    log_p = logits.log_softmax(1).gather(1, codes[:, None])[0, 0] / np.log(2)
    shown = nib.load(maps[1]).get_fdata()[:, :, 0]
    assert shown.shape == split.images.shape[1:]
    assert shown[::8, ::8] == pytest.approx(-log_p.detach().numpy(), abs=1e-3)
    assert float(rows[1]["bits_per_code"]) == pytest.approx(shown.mean(), abs=1e-3)
    mean = np.mean([float(row["bits_per_code"]) for row in rows])
    assert numbers["prior"]["bits_per_code"] == pytest.approx(mean)


def test_surprise_lies_on_its_slice_whatever_its_place(run_dir, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    for i, path in enumerate(sorted((moved / "keras_slices_test").iterdir())):
        image = nib.load(path)
        affine = image.affine.copy()
        affine[:3, 3] += (30 + i, 0, -20)
        cropped = np.asarray(image.dataobj)[10:-10]
        nib.save(nib.Nifti1Image(cropped, affine), path)
    call(f"predict.py --run_dir {run_dir} --data {moved} --out {tmp_path / 'out'} --n_samples 0")
    for name in sorted((tmp_path / "out" / "surprise").iterdir()):
        shown = nib.load(name)
        slice_ = nib.load(moved / "keras_slices_test" / f"{name.name[6:]}")
        # the slice's first row is the map's eleventh: ten were cut off, and padded again
        assert np.allclose(shown.affine @ (10, 0, 0, 1), slice_.affine @ (0, 0, 0, 1), atol=1e-4)


def test_a_damaged_cache_of_codes_is_made_again(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    (copy / "codes" / "train.npz").write_bytes(b"PK damaged")
    call(f"predict.py --run_dir {copy} --n_samples 0")
    old, new = (metrics.stored_codes(path, "train", 16) for path in (run_dir, copy))
    assert old[0] == new[0]
    assert np.array_equal(old[1], new[1])


def test_pictures_of_an_earlier_call_do_not_stay(run_dir, tmp_path):
    call(f"predict.py --run_dir {run_dir} --out {tmp_path / 'out'} --n_samples 2")
    for mine in ("notes.txt", "mine.png"):
        (tmp_path / "out" / mine).write_text("mine")
    call(f"predict.py --run_dir {run_dir} --out {tmp_path / 'out'} --n_samples 0 --n_maps 0")
    left = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    assert not {"samples.png", "nearest.png", "completions.png"} & left
    assert not {name for name in left if name.startswith("surprise/")}
    assert "samples/sample_00001.nii.gz" in left  # these are the user's
    assert {"notes.txt", "mine.png"} <= left


def test_stage_two_leaves_stage_one_as_it_is(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    before = contents(copy / "vq_vae")
    call(f"train.py --mode pixelcnn --run_dir {copy} {SMALL_PRIOR} --fresh")
    assert contents(copy / "vq_vae") == before


def test_pictures_open(predicted, run_dir):
    for name in (
        "reconstructions", "codes", "samples", "surprise", "completions", "ssim", "usage",
    ):  # fmt: skip
        with Image.open(run_dir / "predict" / f"{name}.png") as picture:
            assert min(picture.size) > 300


def test_a_slice_of_ones_own_is_reconstructed_and_scored(run_dir, data, tmp_path):
    path = sorted((data / "keras_slices_test").iterdir())[1]
    call(f"predict.py --run_dir {run_dir} --input {path} --out {tmp_path / 'one'}")
    (row,) = csv.DictReader((tmp_path / "one" / "per_slice.csv").open())
    raw = nib.load(path).get_fdata().squeeze().astype(np.float32)
    x = (raw / np.percentile(raw, 99.5)).clip(0, 1)
    model = utils.load_model(run_dir, "vq_vae")
    y = model(torch.from_numpy(x)[None, None])[0][0, 0].detach().clamp(0, 1).numpy()
    expected = structural_similarity(x, y, data_range=1.0)
    assert float(row["ssim"]) == pytest.approx(expected, abs=1e-3)
    assert row["patient"] == path.name[: len("case_000")]
    assert len(list((tmp_path / "one" / "surprise").iterdir())) == 1

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray((x * 255).astype(np.uint8)).resize((256, 512)).save(pictures / "large.png")
    Image.fromarray((x * 255).astype(np.uint8)).crop((9, 9, 60, 80)).save(pictures / "a$\\b$.png")
    out, _ = call(f"predict.py --run_dir {run_dir} --input {pictures} --out {tmp_path / 'two'}")
    assert "2 slices of 2 patients" in out
    assert "PATIENTS CANNOT BE TOLD APART" in out
    rows = list(csv.DictReader((tmp_path / "two" / "per_slice.csv").open()))
    assert [row["file"] for row in rows] == ["a$\\b$.png", "large.png"]
    (pictures / "broken.png").write_bytes(b"no picture")
    mistake(f"predict.py --run_dir {run_dir} --input {pictures}", "broken.png")
    mistake(f"predict.py --run_dir {run_dir} --input {tmp_path / 'none'}", "none", "--input")


def test_many_samples_go_on_where_they_stopped(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "N_JUDGED", 2)
    monkeypatch.setattr(predict.metrics, "BATCH", 2)
    words = f"predict.py --run_dir {run_dir} --out {tmp_path} --n_maps 0"
    folder = tmp_path / "samples"

    def predict_with(flags):
        monkeypatch.setattr("sys.argv", f"{words} {flags}".split())
        predict.main()
        return {p.name: p.read_bytes() for p in folder.glob("sample_*")}

    whole = predict_with("--n_samples 6")
    assert len(whole) == 12
    for name in ("sample_00004.nii.gz", "sample_00005.png"):
        (folder / name).unlink()
    kept = (folder / "sample_00002.png").stat().st_mtime_ns
    assert predict_with("--n_samples 6") == whole
    assert (folder / "sample_00002.png").stat().st_mtime_ns == kept
    picture = np.asarray(Image.open(folder / "sample_00003.png"), np.float32) / 255
    values = nib.load(folder / "sample_00003.nii.gz").get_fdata()[:, :, 0]
    assert np.corrcoef(picture.ravel(), values.ravel())[0, 1] > 0.999
    assert predict_with("--n_samples 3") == whole  # a long export is not thrown away
    with pytest.raises(utils.UserError, match="holds 6 samples of other settings"):
        predict_with("--n_samples 3 --seed 1")  # nor is it for a few of other settings
    assert {p.name: p.read_bytes() for p in folder.glob("sample_*")} == whole
    other = predict_with("--n_samples 6 --seed 1")
    assert other["sample_00002.png"] != whole["sample_00002.png"]


def test_a_long_export_keeps_few_samples_in_memory(run_dir, tmp_path, monkeypatch):
    """Those that are judged, and the batch at hand."""
    monkeypatch.setattr(predict, "N_JUDGED", 4)
    monkeypatch.setattr(predict.metrics, "BATCH", 2)
    original, batches, held = predict.in_units, [], []

    def in_units(image, data):
        if not batches or image.base is not batches[-1]():
            batches.append(weakref.ref(image.base))
            held.append(sum(len(b()) for b in batches if b() is not None))
        return original(image, data)

    monkeypatch.setattr(predict, "in_units", in_units)
    words = f"predict.py --run_dir {run_dir} --out {tmp_path} --n_maps 0 --n_samples 14"
    monkeypatch.setattr("sys.argv", words.split())
    predict.main()
    assert held == [2, 4, 6, 6, 6, 6, 6]


def test_a_sample_can_be_drawn_alone(run_dir, tmp_path):
    """Bit for bit, whatever else is drawn; also the last of a block, and from the one before."""
    drawn = []
    for n, first in ((35, 0), (1, 3), (4, 30)):
        out = tmp_path / str(n)
        flags = f"--out {out} --n_maps 0 --n_samples {n} --first_sample {first}"
        call([*QUICK, *f"--run_dir {run_dir} {flags}".split()])
        drawn.append({p.name: p.read_bytes() for p in (out / "samples").glob("sample_*")})
    among, alone, across = drawn
    assert alone.keys() == {"sample_00003.nii.gz", "sample_00003.png"}
    assert len(across) == 8
    assert alone.items() | across.items() <= among.items()
    rows = list(csv.DictReader((tmp_path / "1" / "nearest.csv").open()))
    assert [row["sample"] for row in rows] == ["3"]


def test_a_full_disk_leaves_the_results_of_the_last_call(run_dir, tmp_path):
    words = f"predict.py --run_dir {run_dir} --out {tmp_path} --n_maps 0 --n_samples"
    call(f"{words} 2")
    before = contents(tmp_path)
    code = (
        "import resource, sys, predict, utils\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"  # too little for a figure
        "utils.run_main(predict.main)\n"
    )
    mistake(["-c", code, *f"{words} 3 --seed 1".split()[1:]], "cannot be written", "disk full")
    assert {p: data for p, data in contents(tmp_path).items() if p in before} == before
    call(f"{words} 3 --seed 1")
    assert not (tmp_path / ".unfinished").exists()
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3


def test_a_disk_that_fills_while_samples_are_exported(run_dir, tmp_path, monkeypatch):
    """What was drawn before stays, and what is left is drawn when there is room again."""
    monkeypatch.setattr(predict.metrics, "BATCH", 2)
    words = f"predict.py --run_dir {run_dir} --n_maps 0 --n_samples 6 --out"

    def predict_to(out):
        monkeypatch.setattr("sys.argv", f"{words} {out}".split())
        predict.main()
        return {path.name: path.read_bytes() for path in out.glob("samples/sample_*")}

    def replace(source, target, original=os.replace):
        if Path(target).name == "sample_00003.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        original(source, target)

    whole, out = predict_to(tmp_path / "whole"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(utils.UserError, match=r"sample_00003.png: .*No space left.*disk full"):
            predict_to(out)
    drawn = {path: path.stat().st_mtime_ns for path in out.rglob("sample_0000[0-2]*")}
    assert len(drawn) == 6
    assert predict_to(out) == whole
    for path, time in drawn.items():
        assert (out / "samples" / path.name).stat().st_mtime_ns == time


def test_too_little_memory_is_one_error(data, tmp_path):
    words = f"--mode vq_vae --data {data} --run_dir {tmp_path} --n_residual_hiddens 30000"
    code = (
        "import resource, train, utils\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "utils.run_main(train.main)\n"
    )
    words += " --n_hiddens 30000"  # 32 GB for a kernel
    mistake(["-c", code, *words.split()], "out of memory", "--batch_size")


def test_too_little_memory_to_decode_is_no_fault_of_the_file(data, tmp_path):
    """--skip_unreadable leaves nothing out that could be read with more of it."""
    name = min(path.name for path in data.rglob("*.nii.gz"))
    code = (
        "import dataset, train, utils\n"
        "original = dataset._read_nifti\n"
        "def read(path):\n"
        f"    if path.endswith('{name}'): raise MemoryError('Unable to allocate 9 GiB')\n"
        "    return original(path)\n"
        "dataset._read_nifti = read\n"
        "utils.run_main(train.main)\n"
    )
    words = f"--mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE} --skip_unreadable"
    words += f" --cache_dir {tmp_path} --workers 1"
    mistake(["-c", code, *words.split()], "out of memory", f"{name}: Unable to allocate 9 GiB")
    assert not list(tmp_path.rglob("images.u16"))


def test_samples_are_stamped_with_the_weights_that_drew_them(run_dir, tmp_path):
    """A training may save better ones meanwhile. What a killed call left half written goes."""
    shutil.copytree(run_dir, tmp_path / "run")
    weights = tmp_path / "run" / "pixelcnn" / "model.safetensors"
    drew = utils.short_hash(weights.read_bytes())
    code = (
        "import predict, torch, utils\n"
        "original = predict.score\n"
        "def score(call, data):\n"
        "    prior = utils.load_model(call.run_dir, 'pixelcnn')\n"
        "    prior.head[-1].bias.data += torch.arange(16.0)\n"
        f"    utils.save_model(prior, {str(weights)!r})\n"
        "    return original(call, data)\n"
        "predict.score = score\n"
        "utils.run_main(predict.main)\n"
    )
    left = tmp_path / "run" / "predict" / ".unfinished" / "samples" / ".sample_00001.png.9.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    call(["-c", code, "--run_dir", tmp_path / "run", "--n_samples", "2"])
    samples = tmp_path / "run" / "predict" / "samples"
    settings = json.loads((samples / "settings.json").read_text())
    assert settings["models"][1] == drew != utils.short_hash(weights.read_bytes())
    assert not list(tmp_path.rglob("*.tmp"))


class Page(HTMLParser):
    """What a browser would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset", "data")]

    def handle_data(self, text):
        self.words.append(text)


def test_the_report_holds_all_it_shows(predicted, run_dir):
    _, numbers = predicted
    page = Page((run_dir / "predict" / "report.html").read_text())
    assert "script" not in page.tags
    assert len(page.sources) >= 7
    for source in page.sources:
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert f"{numbers['reconstruction']['ssim_mean']:.4g}" in page.words
    assert f"{numbers['prior']['bits_per_code']:.4g}" in page.words


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_report_fits_a_phone_and_a_desk(predicted, run_dir, tmp_path, width):
    picture = tmp_path / "page.png"
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--no-first-run", "--disable-sync", f"--window-size={width},2000",
         f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking",
         f"--screenshot={picture}", f"file://{run_dir / 'predict' / 'report.html'}"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[1] == width
    assert (pixels[:, -4:] == 255).all()  # nothing runs out of the window
    assert pixels.std() > 10


# predict.py, but that the network of the two-sample test is hardly trained
QUICK = ["-c", "import metrics, predict, utils; metrics.JUDGE_UPDATES = 4; "
         "utils.run_main(predict.main)"]  # fmt: skip


def test_samples_are_judged_beside_real_slices(run_dir, tmp_path):
    words = f"--run_dir {run_dir} --split train --n_samples 8 --n_maps 0 --out {tmp_path}"
    call([*QUICK, *words.split()])
    samples = json.loads((tmp_path / "metrics.json").read_text())["samples"]
    assert samples["judged"] == 8
    kinds = {"samples", "real", "reconstructions"}
    for name in ("frechet", "precision", "recall", "pairwise_ssim", "wasserstein"):
        assert set(samples[name]) == kinds
    # the split's own slices are in it, their reconstructions are not
    match = samples["best_match_ssim"]
    assert set(match) == kinds
    assert match["reconstructions"] < 0.99 < match["real"]
    # slices of the training split are their own nearest neighbours, samples are not
    assert samples["nearest_training_ssim"]["real"] == pytest.approx(1, abs=1e-4)
    assert samples["nearest_training_ssim"]["highest_sample"] < 1
    assert 0 <= samples["two_sample_accuracy"]["samples"] <= 1
    assert (tmp_path / "nearest.png").exists()


@pytest.mark.parametrize(("n_noise", "is_itself"), [(0, True), (4, True), (4, False)])
def test_a_copied_training_slice_is_flagged(
    run_dir, data, tmp_path, monkeypatch, n_noise, is_itself
):
    """Four training slices, alone or planted among samples of noise, and no other; beside real
    slices that are training slices themselves, or test slices."""
    monkeypatch.setattr(metrics, "JUDGE_UPDATES", 4)
    config = utils.load_config(run_dir, "vq_vae")
    slices = dataset.load(**config["data"]["arguments"], progress=False)
    planted = slices["train"].batch(np.arange(4) * 4)[:, 0].numpy()
    noise = np.random.default_rng(0).random((n_noise, *slices.size), np.float32)
    images = np.concatenate([noise[:2], planted, noise[2:]])
    call_of_it = SimpleNamespace(
        args=SimpleNamespace(
            seed=0, n_samples=len(images), first_sample=n_noise, label=None, position=None
        ),
        device="cpu", config=config, out=tmp_path,
        vq_vae=utils.load_model(run_dir, "vq_vae"), result={"samples": {}},
        split=slices["train" if is_itself else "test"],
    )  # fmt: skip
    predict.judge_samples(call_of_it, images, [], slices["train"])
    result = call_of_it.result["samples"]
    assert ("judged" in result) == (n_noise == 4 and is_itself)  # the test split is too small
    near = result["nearest_training_ssim"]
    first = n_noise + n_noise // 2  # the number of the first one planted
    assert near["copies"] == [first, first + 1, first + 2, first + 3]
    assert near["nearer_than_any_reconstruction"] == near["copies"]
    rows = list(csv.DictReader((tmp_path / "nearest.csv").open()))
    for i in range(4):  # and what it copies is named
        copied = slices["train"].slices[4 * i]
        row = rows[i + n_noise // 2]
        assert row["copy"] == "True"
        named = row["sample"], row["file"], row["patient"]
        assert named == (str(first + i), Path(copied.path).name, copied.patient)
    assert near["highest_sample"] == pytest.approx(1, abs=1e-4)
    if is_itself:
        assert near["copies_among_real"] == len(images)


def test_decoded_training_slices_are_copies_wherever_in_an_export(run_dir, tmp_path, monkeypatch):
    """As a prior that remembers them would draw them; those beyond the judged are on disk only."""
    monkeypatch.setattr(metrics, "JUDGE_UPDATES", 4)
    config = utils.load_config(run_dir, "vq_vae")
    slices = dataset.load(**config["data"]["arguments"], progress=False)
    vq_vae = utils.load_model(run_dir, "vq_vae")
    coded = metrics.through(vq_vae, slices["train"].batch(range(18))[:, 0].numpy(), "cpu")
    rest = [tmp_path / f"{i}.png" for i in range(18)]
    for image, path in zip(coded, rest, strict=True):
        Image.fromarray(utils.to_uint8(image)).save(path)
    noise = np.random.default_rng(0).random((2, *slices.size), np.float32)
    call_of_it = SimpleNamespace(
        args=SimpleNamespace(seed=0, n_samples=20, first_sample=0, label=None, position=None),
        device="cpu", config=config, out=tmp_path, vq_vae=vq_vae, result={"samples": {}},
        split=slices["test"],
    )  # fmt: skip
    predict.judge_samples(call_of_it, noise, rest, slices["train"])
    near = call_of_it.result["samples"]["nearest_training_ssim"]
    assert near["looked_up"] == 20
    assert len(set(near["copies"]) & set(range(2, 20))) >= 17  # the limit is a fifth percentile
    assert not {0, 1} & set(near["copies"])
    assert len(list(csv.DictReader((tmp_path / "nearest.csv").open()))) == 20


def test_a_long_export_that_was_interrupted_is_not_thrown_away(run_dir, tmp_path, monkeypatch):
    """By a call with other settings, or with those of the samples that are there."""
    monkeypatch.setattr(predict.metrics, "BATCH", 2)
    monkeypatch.setattr(predict, "N_JUDGED", 2)

    def predict_with(flags):
        words = f"predict.py --run_dir {run_dir} --out {tmp_path} --n_maps 0 --n_samples {flags}"
        monkeypatch.setattr("sys.argv", words.split())
        predict.main()

    predict_with("2")
    with monkeypatch.context() as patch:
        patch.setattr(predict.plots, "samples", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict_with("6 --seed 1")
    unfinished = tmp_path / ".unfinished" / "samples"
    before = contents(unfinished)
    predict_with("2")
    with pytest.raises(utils.UserError, match="unfinished/samples: holds 6 samples of other"):
        predict_with("2 --seed 2")
    assert contents(unfinished) == before
    predict_with("6 --seed 1")
    kept = {p.name for p in before}
    assert {p.name for p in contents(tmp_path / "samples")} == kept
    assert not unfinished.exists()


def test_predicting_twice_gives_the_same(run_dir, tmp_path):
    """Numbers, pictures and files, byte for byte, but for the time that sampling took."""
    words = f"--run_dir {run_dir} --split train --n_samples 8 --n_maps 2 --out"
    found = []
    for out in (tmp_path / "a", tmp_path / "b"):
        call([*QUICK, *words.split(), out])
        files = {path.relative_to(out): file for path, file in contents(out).items()}
        for name in (Path("metrics.json"), Path("report.html")):
            files[name] = re.sub(rb'("seconds": |seconds<.th><td>)[0-9.]+', b"", files[name])
        found.append(files)
    assert found[0] == found[1]


def test_an_interrupted_call_costs_nothing(run_dir, tmp_path, monkeypatch):
    """Neither the samples there are, nor those of other settings already drawn."""
    words = f"predict.py --run_dir {run_dir} --out {tmp_path} --n_maps 0 --n_samples"
    monkeypatch.setattr(predict.metrics, "BATCH", 2)

    def predict_with(flags, dies=False):
        monkeypatch.setattr("sys.argv", f"{words} {flags}".split())
        with monkeypatch.context() as patch:
            if dies:
                patch.setattr(predict.plots, "samples", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError) if dies else contextlib.nullcontext():
                predict.main()
        settings = json.loads((tmp_path / "samples" / "settings.json").read_text())
        return contents(tmp_path / "samples"), settings["seed"]

    (tmp_path / "samples").mkdir()
    for name in ("sample_of_mine.png", "sample_00001_seg.nii.gz"):
        (tmp_path / "samples" / name).write_bytes(b"mine")
    before = predict_with("6")
    assert predict_with("4 --seed 1", dies=True) == before
    assert predict_with("2", dies=True) == before
    assert predict_with("0") == before
    assert predict_with("6") == before
    assert not (tmp_path / ".unfinished").exists()
    assert predict_with("2") == before
    other, seed = predict_with("2 --seed 1")
    assert len(other) == 2 * 2 + 3  # settings.json and the user's own
    assert seed == 1
    name = tmp_path / "samples" / "sample_00001.png"
    assert other[name] != before[0][name]


GONE = "no longer there"


@pytest.mark.parametrize(
    ("stage", "part", "name", "value"),
    [
        ("vq_vae", "data", "arguments", {"foo": 1}),
        ("vq_vae", "data", "arguments", {"data": 5}),
        ("vq_vae", "data", "arguments", {"workers": -1}),
        ("vq_vae", "data", "arguments", {"image_size": [8]}),
        ("vq_vae", "data", "size", [8, 8]),
        ("vq_vae", "data", "size", [250, 128]),
        ("vq_vae", "data", "classes", ["a"]),
        ("vq_vae", "data", "arguments", {"slices": 0}),
        ("vq_vae", "data", "arguments", {"plane": "x"}),
        ("vq_vae", "data", "arguments", {"image_size": [0, 0]}),
        ("vq_vae", "model", "beta", "x"),
        ("vq_vae", "model", "downsample", GONE),
        ("vq_vae", "model", "n_embeddings", 17),
        ("pixelcnn", "model", "size", None),
        ("pixelcnn", "model", "n_embeddings", 17),
        ("pixelcnn", None, "vq_vae", None),
        ("pixelcnn", None, "stage", "vq_vae"),
    ],
)
def test_a_tampered_config_is_one_error(stage, part, name, value, run_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    config = json.loads((run / stage / "config.json").read_text())
    (config[part] if part else config)[name] = value
    if value is GONE:
        del config[part][name]
    (run / stage / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.argv", ["predict.py", "--run_dir", str(run), "--n_samples", "1"])
    with pytest.raises(utils.UserError):
        predict.main()


def test_samples_are_looked_up_among_the_slices_learned_from(run_dir, data, tmp_path):
    """Also with other --data: here, what was learned from is its test split."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "keras_slices_train").rename(other / "was_train")
    (other / "keras_slices_test").rename(other / "keras_slices_train")
    (other / "was_train").rename(other / "keras_slices_test")
    out = tmp_path / "out"
    words = f"--run_dir {run_dir} --data {other} --out {out} --n_samples 8 --n_maps 0"
    call([*QUICK, *words.split()])
    samples = json.loads((out / "metrics.json").read_text())["samples"]
    assert samples["nearest_training_ssim"]["real"] == pytest.approx(1, abs=1e-4)


def test_without_samples(run_dir, tmp_path):
    out, _ = call(f"predict.py --run_dir {run_dir} --n_samples 0 --out {tmp_path / 'out'}")
    assert "skipped" in out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["samples"] is None


def test_dry_run_prints_json_and_writes_nothing(tmp_path):
    out, _ = call(
        f"train.py -mode vq_vae --preset classic --n_hiddens 7 --n_layers 3 --dry_run"
        f" --run_dir {tmp_path / 'r'}"
    )
    settings = json.loads(out)  # a note on --n_layers, which is stage 2's, goes to stderr
    assert settings["model"]["n_hiddens"] == 7
    assert settings["model"]["n_residual_hiddens"] == 32
    assert settings["train"]["n_updates"] == 5000
    out, _ = call(f"train.py --mode pixelcnn --dry_run --run_dir {tmp_path / 'r'}")
    assert json.loads(out)["train"]["n_updates"] > 0
    assert not (tmp_path / "r").exists()


def noise_in_classes(root, classes):
    rng = np.random.default_rng(0)
    for split, patients in (("train", 4), ("validate", 1), ("test", 1)):
        for p in range(patients):
            folder = root / split / classes[p % len(classes)]
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (48, 40), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"s{split[:2]}{p}_{i:02d}.jpg")


def test_slices_with_classes_of_another_shape(tmp_path):
    noise_in_classes(tmp_path / "set", ["well", "sick"])
    run = tmp_path / "run"
    call(f"train.py --mode vq_vae --data {tmp_path / 'set'} --run_dir {run} {SMALL_VQ_VAE}")
    call(f"train.py --mode pixelcnn --run_dir {run} {SMALL_PRIOR}")
    call(f"predict.py --run_dir {run} --n_samples 2 --label sick")
    image = nib.load(run / "predict" / "samples" / "sample_00001.nii.gz")
    assert np.squeeze(image.get_fdata()).shape == (48, 40)
    mistake(f"predict.py --run_dir {run} --label ill", "ill", "sick", "well")

    # a set with classes the prior does not know: scored as "any", not as another class
    noise_in_classes(tmp_path / "other", ["a", "b", "c", "well"])
    call(f"predict.py --run_dir {run} --n_samples 0 --data {tmp_path / 'other'}")


def test_the_classic_preset_end_to_end(data, tmp_path):
    small = f"--preset classic --run_dir {tmp_path} --n_updates 2 --batch_size 2"
    call(f"train.py --mode vq_vae --data {data} {small} --n_hiddens 4 --embedding_dim 2")
    call(f"train.py --mode pixelcnn {small} --n_channels 4 --n_layers 1")
    call(f"predict.py --run_dir {tmp_path} --n_samples 1")


@pytest.mark.parametrize(
    ("scale", "shift", "kind"),
    [(1.0, 0.0, "f"), (207.0, 0.0, "i"), (50000.0, 0.0, "i"), (2000.0, -1000.0, "i")],
)
def test_exported_units_follow_the_data(tmp_path, scale, shift, kind):
    data = SimpleNamespace(intensity_scale=scale, intensity_shift=shift, affine=np.eye(4))
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    units = predict.in_units(image, data)
    predict.save_nifti(units, data.affine, tmp_path / "x.nii.gz", "data")
    read = nib.load(tmp_path / "x.nii.gz")
    assert read.get_data_dtype().kind == kind
    expected, near = image * scale + shift, 0.51 if kind == "i" else 1e-6
    assert np.allclose(read.get_fdata()[:, :, 0], expected, atol=near)


# ---------------------------------------------------------------------------------- mistakes


def test_stage_two_before_stage_one(tmp_path):
    command = f"train.py --mode pixelcnn --run_dir {tmp_path / 'r'}"
    mistake(command, "no trained vq_vae", "train.py --mode vq_vae")
    mistake(f"predict.py --run_dir {tmp_path / 'r'}", "no trained vq_vae", "--mode vq_vae")
    assert not (tmp_path / "r").exists()


def test_no_data(tmp_path):
    run = tmp_path / "r"
    mistake(f"train.py --mode vq_vae --data {tmp_path / 'none'} --run_dir {run}", "none")
    (tmp_path / "empty").mkdir()
    mistake(f"train.py --mode vq_vae --data {tmp_path / 'empty'} --run_dir {run}", "empty")
    assert not run.exists()


def test_a_run_made_for_other_data_or_another_size(run_dir, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for file in list((other / "keras_slices_train").iterdir())[:3]:
        file.unlink()
    before = contents(run_dir)
    command = f"train.py --mode vq_vae --run_dir {run_dir} {SMALL_VQ_VAE}"
    mistake(f"{command} --data {other}", "--fresh", "--run_dir")
    mistake(f"{command} --data {data} --image_size 128 64", "128", "--fresh")
    mistake(f"train.py --mode pixelcnn --run_dir {run_dir} --data {other}", "other data")
    mistake(f"predict.py --run_dir {run_dir} --image_size 128 64", "256", "128 x 64")
    mistake(f"predict.py --run_dir {run_dir} --out /sys/out", "/sys/out: cannot be made")
    assert contents(run_dir) == before


def test_a_size_that_does_not_divide(data, tmp_path):
    command = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path / 'r'}"
    mistake(f"{command} --image_size 250 128", "250 x 128", "--image_size 248 128")
    assert not (tmp_path / "r").exists()


def test_an_unknown_label(run_dir):
    before = contents(run_dir)
    mistake(f"predict.py --run_dir {run_dir} --label AD", "AD", "none")
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    "flags",
    ["--n_updates 0", "--learning_rate x", "--kernel_size 4", "--preset bse", "--dropout 1"],
)
def test_flags_that_make_no_sense(run_dir, flags):
    _, err = call(f"train.py --mode pixelcnn --run_dir {run_dir} {flags}", code=2)
    assert "Traceback" not in err
    assert flags.split()[0].lstrip("-") in err.splitlines()[-1]


def test_a_training_that_diverges_stops_and_keeps_what_was_good(run_dir, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    command = f"train.py --mode vq_vae --data {data} --run_dir {run} {SMALL_VQ_VAE}"
    weights = (run / "vq_vae" / "model.safetensors").read_bytes()
    checkpoint = (run / "vq_vae" / "checkpoint.pt").read_bytes()
    mistake(f"{command} --n_updates 60 --learning_rate 1e30", "lower --learning_rate")
    assert (run / "vq_vae" / "checkpoint.pt").read_bytes() == checkpoint
    assert (run / "vq_vae" / "model.safetensors").read_bytes() == weights
    out, _ = call(f"{command} --n_updates 9 --learning_rate 1e-3")
    assert "learning rate of 0.001, after 1e+30" in out
    log = [json.loads(line) for line in (run / "vq_vae" / "log.jsonl").open()]
    assert [entry["update"] for entry in log] == [3, 6, 9]


@pytest.fixture
def train_without(data, tmp_path, monkeypatch):
    """Train stage 1 in this process, without a finite gradient in some updates; returns the log."""
    original = train.reconstruction_loss

    def run(bad_updates, flags=""):
        path = tmp_path / "vq_vae" / "checkpoint.pt"
        done = torch.load(path)["state"]["update"] if path.exists() else 0
        calls = iter(range(done, 10**6))
        monkeypatch.setattr(
            train, "reconstruction_loss",
            lambda *args: original(*args) * (torch.nan if next(calls) in bad_updates else 1),
        )  # fmt: skip
        words = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE} {flags}"
        monkeypatch.setattr("sys.argv", words.split())
        train.main()
        return [json.loads(line) for line in (tmp_path / "vq_vae" / "log.jsonl").open()]

    return run


def test_one_update_without_a_finite_gradient_is_skipped_and_counted(train_without, tmp_path):
    assert [entry["skipped"] for entry in train_without({2})] == [1, 1]
    for value in utils.load_model(tmp_path, "vq_vae").state_dict().values():
        assert value.isfinite().all()


def test_the_last_update_without_a_finite_gradient(train_without, capsys):
    log = train_without({5}, "--log_interval 1")
    assert [entry["update"] for entry in log] == [1, 2, 3, 4, 5]
    assert "1 updates without a finite gradient" in capsys.readouterr().out
    train_without({}, "--log_interval 1")
    assert "is finished: 6 updates" in capsys.readouterr().out


def test_no_update_with_a_finite_gradient(train_without):
    for _ in range(2):
        with pytest.raises(utils.UserError, match="no finite gradient at update 6"):
            train_without(range(6))
    assert [entry["update"] for entry in train_without({})] == [3, 6]


def test_updates_without_a_finite_gradient_in_a_row_are_counted_over_a_stop(
    train_without, tmp_path
):
    with pytest.raises(utils.UserError, match="10 updates without a finite gradient at update 10"):
        train_without(range(1, 99), "--n_updates 60 --log_interval 60")
    state = torch.load(tmp_path / "vq_vae" / "checkpoint.pt")["state"]
    assert state["update"] == 0
    train_without(range(1, 6), "--n_updates 6 --log_interval 6")  # ends with five of them
    with pytest.raises(utils.UserError, match="10 updates without a finite gradient at update 10"):
        train_without(range(6, 99), "--n_updates 60 --log_interval 60")


def test_compile_without_a_compiler(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    mistake(f"train.py --mode vq_vae --data {data} --run_dir {tmp_path} --compile", "no-such-comp")


@pytest.mark.parametrize("stage", ["vq_vae", "pixelcnn"])
def test_weights_cut_short(stage, run_dir, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(run_dir, broken)
    weights = broken / stage / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    mistake(f"predict.py --run_dir {broken}", f"{stage}/model.safetensors", "--fresh")
    other = next(name for name in utils.STAGES if name != stage)
    shutil.copy(run_dir / other / "model.safetensors", weights)
    before = contents(broken)
    mistake(f"predict.py --run_dir {broken}", f"{stage}/model.safetensors", "--fresh")
    (broken / stage / "config.json").write_text("{")
    mistake(f"predict.py --run_dir {broken}", f"{stage}/config.json", "--fresh")
    (broken / stage / "config.json").write_bytes(before[broken / stage / "config.json"])
    assert contents(broken) == before


def test_a_run_without_stage_2_is_scored(run_dir, tmp_path):
    """Samples are said to be skipped."""
    shutil.copytree(run_dir / "vq_vae", tmp_path / "run" / "vq_vae")
    out, err = call(f"predict.py --run_dir {tmp_path / 'run'}")
    assert "has no prior, so no samples are drawn" in err
    assert "samples        skipped (no prior)" in out
    result = json.loads((tmp_path / "run" / "predict" / "metrics.json").read_text())
    assert result["samples"] is None
    assert result["reconstruction"]["n_slices"] == 3


def test_fewer_slices_than_samples_are_judged_and_it_is_said(run_dir, tmp_path):
    words = f"--run_dir {run_dir} --split train --n_samples 20 --n_maps 0 --out {tmp_path}"
    _, err = call([*QUICK, *words.split()])
    assert "note: 18 samples are judged, as the train split has no more slices" in err
    rows = list(csv.DictReader((tmp_path / "nearest.csv").open()))
    assert len(rows) == 20


def test_a_prior_of_another_vq_vae_is_not_used(run_dir, data, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run_dir, other)
    call(f"train.py --mode vq_vae --data {data} --run_dir {other} --fresh {SMALL_VQ_VAE} --seed 1")
    out, err = call(f"predict.py --run_dir {other} --n_maps 0")
    assert "another VQ-VAE" in err
    assert "--fresh" in err
    assert "samples        skipped" in out
    mistake(f"train.py --mode pixelcnn --run_dir {other} {SMALL_PRIOR}", "another", "--fresh")

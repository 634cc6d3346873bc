"""Files from strangers: whatever their bytes are, they load or end in the project's own error."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch

import dataset
import predict
import train
import utils

N = int(os.environ.get("FUZZ", 1000))  # cases of each kind


@pytest.fixture(scope="module")
def stages(run_dir, tmp_path_factory):
    copy_of_run = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(run_dir, copy_of_run)
    return copy_of_run


def damaged(data, rng):
    """Bytes with a few of them changed, cut, doubled or overwritten by extreme numbers."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at = int(rng.integers(len(data) or 1))
        match rng.integers(5):
            case 0:
                data[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                del data[at : at + int(rng.integers(1, 50))]
            case 2:
                data[at:at] = data[at : at + int(rng.integers(1, 50))]
            case 3:
                data[at : at + 8] = b"\xff" * int(rng.integers(1, 9))
            case 4:
                data = data[: max(1, at)]
    return bytes(data)


STRANGE = [None, True, -1, 0, 1e300, 10**12, float("nan"), "", "x" * 5000, [], {}, [[]], -0.5]


def strange(value, rng):
    """A JSON value with one of its parts replaced by something that does not belong there."""
    value = copy.deepcopy(value)
    part = value
    while True:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = keys[int(rng.integers(len(keys)))]
        if isinstance(part[key], dict | list) and len(part[key]) and rng.random() < 0.7:
            part = part[key]
            continue
        if isinstance(part, dict) and rng.random() < 0.2:
            del part[key]
        else:
            part[key] = STRANGE[int(rng.integers(len(STRANGE)))]
        return value


def loads_or_says_why(run, stage):
    try:
        utils.load_model(run, stage)
        predict.load_prior(run, "cpu")
    except utils.UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("stage", ["vq_vae", "pixelcnn"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_bytes_of_a_run(stages, stage, name):
    rng = np.random.default_rng(0)
    path = stages / stage / name
    whole = path.read_bytes()
    for _ in range(N):
        # the header of the weights, not their numbers, is what can do harm
        head = len(whole) if name == "config.json" else 2000
        path.write_bytes(damaged(whole[:head], rng) + whole[head:])
        loads_or_says_why(stages, stage)
    path.write_bytes(whole)


@pytest.mark.parametrize("stage", ["vq_vae", "pixelcnn"])
def test_strange_entries_of_a_config(stages, stage):
    rng = np.random.default_rng(0)
    path = stages / stage / "config.json"
    whole = json.loads(path.read_text())
    for _ in range(N):
        path.write_text(json.dumps(strange(whole, rng)))
        loads_or_says_why(stages, stage)
    path.write_text(json.dumps(whole))


def test_strange_entries_of_a_checkpoint(stages):
    """History, optimizer's state, weights: refused, or training can go on from them."""
    directory, rng = stages / "pixelcnn", np.random.default_rng(0)
    whole = torch.load(directory / "checkpoint.pt", weights_only=True)
    config = utils.read_config(directory)
    before = (directory / "checkpoint.pt").read_bytes()
    refused = 0
    for _ in range(N):
        torch.save(strange(whole, rng), directory / "checkpoint.pt")
        model, averaged = (utils.load_model(stages, "pixelcnn").train() for _ in range(2))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        state, running = {"in_a_row": 0}, []
        try:
            log = train.resume(directory, config, model, averaged, optimizer, state, running)
        except utils.UserError as error:
            refused += 1
            assert "damaged" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            continue
        model(torch.zeros(1, *model.config.size, dtype=torch.long)).sum().backward()
        optimizer.step()
        train.is_done(log, state, config["train"] | {"patience": 1})
        assert all(np.isreal(losses["bits_per_code"]) for losses in running)
        train.learning_rate(state["update"], config["train"])
        train.batch_indices(10, 2, state["drawn"], 0)
        train.save_checkpoint(directory, config, log, model, averaged, optimizer, state, running)
    assert N / 2 < refused < N
    (directory / "checkpoint.pt").write_bytes(before)


@pytest.mark.parametrize("kind", ["slice.nii.gz", "slice.nii", "slice.png", "slice.jpg"])
def test_damaged_images(tmp_path, kind, data):
    import gzip

    from PIL import Image

    nifti = sorted((data / "keras_slices_test").iterdir())[0].read_bytes()
    path, rng = tmp_path / kind, np.random.default_rng(0)
    if kind == "slice.nii.gz":
        path.write_bytes(nifti)
    elif kind == "slice.nii":
        path.write_bytes(gzip.decompress(nifti))
    else:
        grey = rng.integers(0, 255, (64, 48), dtype=np.uint8)
        Image.fromarray(grey).save(path)
    whole = path.read_bytes()
    for _ in range(N):
        head = min(len(whole), 400) if rng.random() < 0.8 else len(whole)
        path.write_bytes(damaged(whole[:head], rng) + whole[head:])
        found = dataset._images(str(tmp_path), kind, None, [0])
        if isinstance(found, str):
            assert "\n" not in found
        else:
            assert found[0].ndim == 2
        dataset._header(str(path))


def test_damaged_codes_are_no_codes(stages):
    import metrics

    rng = np.random.default_rng(0)
    path = stages / "codes" / "train.npz"
    whole = path.read_bytes()
    for _ in range(N):
        path.write_bytes(damaged(whole, rng))
        found = metrics.stored_codes(stages, "train", 16)
        assert found is None or found[1].max() < 16
    path.write_bytes(whole)

"""Files from strangers: whatever their bytes are, they load or end in the project's own error."""

import copy
import gzip
import io
import json
import os
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset
import metrics
import predict
import train
import utils

fuzzed = settings(
    max_examples=int(os.environ.get("FUZZ", 720)),  # cases of each of 16 kinds
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "fill", "delete", "double", "cut"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=50),
    ),
    min_size=1,
    max_size=5,
)
GONE = object()
STRANGE = [GONE, True, -1, 0, 1e300, 10**12, float("nan"), "x" * 5000, [], {}, [[]], -0.5]
VALUES = st.sampled_from(STRANGE) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=4,
)
PATHS = st.lists(st.integers(0, 1 << 16), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def stages(run_dir, tmp_path_factory):
    copy_of_run = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(run_dir, copy_of_run)
    return copy_of_run


def damaged(data, edits, head=None):
    """Bytes with a few of the first `head` changed, cut, doubled or overwritten."""
    data, rest = bytearray(data[:head]), b"" if head is None else data[head:]
    for kind, at, some in edits:
        at, n = at % (len(data) or 1), len(some)
        match kind:
            case "overwrite":
                data[at : at + n] = some
            case "fill":
                data[at : at + n] = b"\xff" * n
            case "delete":
                del data[at : at + n]
            case "double":
                data[at:at] = data[at : at + n]
            case "cut":
                del data[max(1, at) :]
    return bytes(data) + rest


def strange(value, path, new):
    """Nested containers, of which the part at the end of `path` is replaced, or taken out."""
    value = part = copy.deepcopy(value)
    for i, number in enumerate(path):
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = keys[number % len(keys)]
        if i + 1 < len(path) and isinstance(part[key], dict | list) and part[key]:
            part = part[key]
            continue
        if new is not GONE:
            part[key] = new
        elif isinstance(part, dict):
            del part[key]
        return value
    return value


def loads_or_says_why(run, stage):
    try:
        utils.load_model(run, stage)
        predict.load_prior(run, utils.load_model(run, "vq_vae"), "cpu")
    except utils.UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("stage", ["vq_vae", "pixelcnn"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_bytes_of_a_run(stages, stage, name):
    path = stages / stage / name
    whole = path.read_bytes()
    # the header of the weights, not their numbers, is what can do harm
    head = None if name == "config.json" else 2000

    @fuzzed
    @given(EDITS)
    def check(edits):
        path.write_bytes(damaged(whole, edits, head))
        loads_or_says_why(stages, stage)

    check()
    path.write_bytes(whole)


@pytest.mark.parametrize("stage", ["vq_vae", "pixelcnn"])
def test_strange_entries_of_a_config(stages, stage):
    path = stages / stage / "config.json"
    whole = json.loads(path.read_text())

    @fuzzed
    @given(PATHS, VALUES)
    def check(where, value):
        path.write_text(json.dumps(strange(whole, where, value)))
        loads_or_says_why(stages, stage)

    check()
    path.write_text(json.dumps(whole))


def test_strange_entries_of_a_checkpoint(stages):
    """History, optimizer's state, weights: refused, or training can go on from them."""
    directory = stages / "pixelcnn"
    path = directory / "checkpoint.pt"
    before, whole = path.read_bytes(), torch.load(path, weights_only=True)
    config = utils.read_config(directory)
    ended = []

    @fuzzed
    @given(PATHS, VALUES)
    def check(where, value):
        torch.save(strange(whole, where, value), path)
        model = averaged = utils.load_model(stages, "pixelcnn").train()  # the demo averages none
        optimizers = train.make_optimizers(model, config["train"], config["precision"])
        state, running = {"in_a_row": 0}, []
        try:
            log = train.resume(directory, config, model, averaged, optimizers, state, running)
        except utils.UserError as error:
            assert any(s in str(error) for s in ("damaged", "update the code"))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            ended.append("refused")
            return
        model(torch.zeros(1, *model.config.size, dtype=torch.long)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        train.is_done(log, state, config["train"] | {"patience": 1})
        json.dumps([log, state, running])
        float(np.mean([losses["bits_per_code"] for losses in running] or [0]))
        assert all(np.isreal(losses["bits_per_code"]) for losses in running)
        train.learning_rate(state["update"], config["train"])
        train.batch_indices(10, 2, state["drawn"], 0)
        if log != whole["log"]:
            train.plots.curves(log, stages / "curves.png", config)
        ended.append("went on")

    check()
    assert set(ended) == {"refused", "went on"}
    path.write_bytes(before)


@pytest.mark.parametrize("kind", ["slice.nii.gz", "slice.nii", "slice.png", "slice.jpg"])
@pytest.mark.parametrize("head", [400, None])
def test_damaged_images(tmp_path, kind, head, data):
    nifti = sorted((data / "keras_slices_test").iterdir())[0].read_bytes()
    path = tmp_path / kind
    if kind == "slice.nii.gz":
        path.write_bytes(nifti)
    elif kind == "slice.nii":
        path.write_bytes(gzip.decompress(nifti))
    else:
        grey = np.random.default_rng(0).integers(0, 255, (64, 48), dtype=np.uint8)
        Image.fromarray(grey).save(path)
    whole = path.read_bytes()

    @fuzzed
    @given(EDITS)
    def check(edits):
        path.write_bytes(damaged(whole, edits, head))
        found = dataset._images(str(tmp_path), kind, None, [0])
        if isinstance(found, str):
            assert "\n" not in found
        else:
            assert found[0].ndim == 2
        dataset._header(str(path))

    check()


def test_damaged_codes_are_no_codes(stages):
    path = stages / "codes" / "train.npz"
    whole = path.read_bytes()

    @fuzzed
    @given(EDITS)
    def check(edits):
        path.write_bytes(damaged(whole, edits))
        found = metrics.stored_codes(stages, "train", 16)
        assert found is None or found[1].max() < 16

    check()
    path.write_bytes(whole)


def test_codes_that_promise_more_than_their_file_holds_take_no_memory(stages):
    path = stages / "codes" / "train.npz"
    whole = path.read_bytes()
    zeros = np.zeros((1 << 16, 16, 16), np.uint16)  # 32 MB
    np.savez_compressed(path, codes=zeros, made_by="us")
    assert_no_codes(stages)
    head = io.BytesIO()
    np.save(head, zeros[:1])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("codes.npy", head.getvalue().replace(b"(1, ", b"(65536, "))
    assert_no_codes(stages)
    path.write_bytes(whole)


def assert_no_codes(run):
    tracemalloc.start()
    assert metrics.stored_codes(run, "train", 16) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20

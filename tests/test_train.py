"""Training: the order of the data, and runs that are stopped and go on."""

import dataclasses
import functools
import itertools
import json
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_PRIOR, SMALL_VQ_VAE, call, start, torchrun
from PIL import Image
from safetensors.torch import load_file

import dataset
import train
import utils


def test_every_slice_is_seen_once_an_epoch_in_an_order_of_the_seed():
    n, size = 10, 4
    starts = range(0, 15 * size, size)
    seen = np.concatenate([train.batch_indices(n, size, start, seed=3) for start in starts])
    for epoch in seen.reshape(-1, n):
        assert Counter(epoch) == Counter(range(n))
    assert not np.array_equal(seen[:n], seen[n : 2 * n])
    other = np.concatenate([train.batch_indices(n, size, start, seed=4) for start in starts])
    assert not np.array_equal(seen, other)


def test_the_evener_axis_is_the_one_along_which_slices_are_symmetric(data, tmp_path):
    """Left and right are the rows of HipMRI's slices, and the columns of those slices turned."""
    split = dataset.load(data, progress=False)["train"]
    turned = np.ascontiguousarray(split.images.transpose(0, 2, 1))
    turned = dataclasses.replace(split, images=turned)
    assert [train.evener_axis(s) for s in (split, turned)] == ["rows", "columns"]
    # and each line that is drawn crosses the middle
    choose = functools.partial(train.auto, args=SimpleNamespace(fresh=False), directory=tmp_path)
    found = [[choose(name, split=s) for name in ("mirror", "order")] for s in (split, turned)]
    assert found == [["rows", "columns"], ["columns", "rows"]]


def test_learning_rate_warms_up_and_decays():
    options = {"n_updates": 1000, "learning_rate": 2.0, "decay_to": 0.1, "warm_up": 50}
    rates = [train.learning_rate(u, options) for u in range(1000)]
    assert rates[0] < 0.05
    assert max(rates) <= 2.0
    assert max(rates) > 1.9
    assert abs(rates[-1] - 0.2) < 0.01


def test_average_against_a_loop():
    model, averaged = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = averaged.weight.detach().double().clone()
    for _ in range(5):
        model.weight.data.normal_()
        train.average(averaged, model, 0.9)
        expected = 0.9 * expected + 0.1 * model.weight.detach().double()
    torch.testing.assert_close(averaged.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_steps_along_the_polar_factor_of_a_kernel(layout, precision):
    """Against the singular value decomposition: all of the kernel's directions, alike, as far as
    Adam would go; biases, and all weights of no layer, as Adam does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 2, 1))
    model.codebook = torch.nn.Parameter(torch.randn(5, 3))
    model.to(memory_format=layout)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizers = train.make_optimizers(model, {"optimizer": "muon", "beta2": 0.99}, precision)
    assert [o.param_groups[0]["share"] for o in optimizers] == [1, train.MUON_RATE]
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
    for name, p in model.named_parameters():
        step = (p - before[name]).detach()
        if p.dim() < 4:
            torch.testing.assert_close(step, -0.01 * p.grad.sign(), rtol=1e-3, atol=1e-6)
            continue
        u, _, v = torch.linalg.svd(p.grad.flatten(1), full_matrices=False)
        step = -step.flatten(1) / (0.01 * 0.2 * max(p.flatten(1).shape) ** 0.5)
        along = u.T @ step @ v.T
        assert ((along.diag() > 0.6) & (along.diag() < 1.3)).all()
        torch.testing.assert_close(step, u @ along.diag().diag() @ v, rtol=0, atol=0.02)


def stages(data):
    """The commands of both stages, without --run_dir, of the runs below."""
    return {
        "vq_vae": f"--mode vq_vae --data {data} {SMALL_VQ_VAE}",
        "pixelcnn": f"--mode pixelcnn {SMALL_PRIOR}",
    }


def alike(a, b):
    """Whether nested containers of tensors and other values are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_the_same(a, b):
    """Runs of a stage: all that training keeps, bit for bit.

    checkpoint.pt holds weights, codebook, averaged weights, the optimizer's state, and the log.
    """
    for name in ("model.safetensors", "log.jsonl", "curves.png"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    a, b = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (a, b))
    assert all(alike(a[part], b[part]) for part in a)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_stops_and_goes_on_equals_one_that_does_not(precision, data, tmp_path):
    """Both stages; the first command dies, half-way through the updates."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    for (stage, flags), half in zip(stages(data).items(), (3, 2), strict=True):
        flags += f" --precision {precision}"
        flags += " --preset base" * (stage == "pixelcnn")  # which averages its weights
        call(f"train.py --run_dir {whole} {flags}")
        stop_after(run, flags, half)
        call(f"train.py --run_dir {run} {flags}")
        assert_the_same(run / stage, whole / stage)


def stop_after(run, flags, n):
    """Train, but die like a killed process right after the checkpoint of update n."""
    code = (
        "import os, sys, train\n"
        "save = train.save_checkpoint\n"
        "def save_and_die(*args):\n"
        "    save(*args)\n"
        f"    if args[-2]['update'] == {n}: os._exit(9)\n"
        "train.save_checkpoint = save_and_die\n"
        "train.main()\n"
    )
    call(["-c", code, *flags.split(), "--run_dir", run], code=9)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_update_saves_and_the_run_goes_on(
    number, status, data, run_dir, tmp_path
):
    """The signal comes in the middle of update 2, between two validations."""
    flags = f"--mode vq_vae --data {data} {SMALL_VQ_VAE}"
    code = (
        "import os, train, utils\n"
        "original, calls = train.batch_indices, []\n"
        "def batch_indices(*args):\n"
        "    calls.append(0)\n"
        f"    if len(calls) == 2: os.kill(os.getpid(), {int(number)})\n"
        "    return original(*args)\n"
        "train.batch_indices = batch_indices\n"
        "utils.run_main(train.main)\n"
    )
    _, err = call(["-c", code, *flags.split(), "--run_dir", tmp_path / "run"], code=status)
    assert "saved at update 2; the same command goes on" in err
    call(f"train.py --run_dir {tmp_path / 'run'} {flags}")
    assert_the_same(tmp_path / "run" / "vq_vae", run_dir / "vq_vae")


def test_a_signal_while_slices_are_decoded_leaves_nothing(data, tmp_path):
    code = (
        "import dataset, os, signal, train, utils\n"
        "original = dataset._images\n"
        "def images(*args):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(*args)\n"
        "dataset._images = images\n"
        "utils.run_main(train.main)\n"
    )
    cache = tmp_path / "cache"
    flags = f"--mode vq_vae --data {data} --run_dir {tmp_path / 'run'} {SMALL_VQ_VAE} --workers 1"
    _, err = call(["-c", code, *flags.split(), "--cache_dir", cache], code=143)
    assert "stopped; the same command goes on" in err
    assert list(cache.iterdir()) == []


def test_a_second_ctrl_c_leaves_at_once(data, tmp_path):
    """Both in the middle of update 2, which therefore is not made."""
    flags = f"--mode vq_vae --data {data} {SMALL_VQ_VAE} --log_interval 1"
    code = (
        "import os, signal, time, train, utils\n"
        "original, calls = train.batch_indices, []\n"
        "def batch_indices(*args):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.5)\n"  # or the two are taken for one
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(*args)\n"
        "train.batch_indices = batch_indices\n"
        "utils.run_main(train.main)\n"
    )
    _, err = call(["-c", code, *flags.split(), "--run_dir", tmp_path], code=130)
    assert "stopped; the same command goes on from what was saved" in err
    assert "Traceback" not in err
    log = (tmp_path / "vq_vae" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in log] == [1]


# The command, killed by itself as it writes its n-th file: half of it, or all but the renaming.
KILLED_WRITING = """
import os, signal, sys, train, utils
original, count = os.fsync, [0]
def fsync(number):
    count[0] += 1
    if count[0] == N:
        os.truncate(f"/proc/self/fd/{number}", int(os.fstat(number).st_size * SHARE))
        os.kill(os.getpid(), signal.SIGKILL)
    original(number)
os.fsync = fsync
utils.run_main(train.main)
"""


@pytest.mark.parametrize(("stage", "n_kills"), [("vq_vae", 25), ("pixelcnn", 8)])
def test_kills_at_any_instant_cost_nothing(stage, n_kills, data, run_dir, tmp_path):
    """SIGKILL while updates, validations and checkpoints follow each other closely.

    Every third one comes while a file is being written, from the first of all to the last of an
    update; the others whenever it is. Half-way one of a file being written strikes a run that is
    started over.
    """
    flags = f"{stages(data)[stage]} --n_updates {24 + n_kills} --log_interval 1"
    whole, run = tmp_path / "whole", tmp_path / "run"
    if stage == "pixelcnn":
        for path in (whole, run):
            shutil.copytree(run_dir / "vq_vae", path / "vq_vae")
    call(f"train.py --run_dir {whole} {flags}")
    rng, log, is_there = np.random.default_rng(0), run / stage / "log.jsonl", False
    for i in range(n_kills):
        before = log.stat().st_mtime_ns if log.exists() else 0
        command, fresh = ["train.py"], ["--fresh"] if i == n_kills // 6 * 3 else []
        if i % 3 == 0:
            n, share = str(1 + i // 3 * 4 % 9), str(rng.choice([0.0, 0.5, 1.0]))
            command = ["-c", KILLED_WRITING.replace("N:", n + ":").replace("SHARE", share)]
        process, *_ = start([*command, "--run_dir", run, *flags.split(), *fresh])
        if i % 3:
            while process.is_alive() and not (log.exists() and log.stat().st_mtime_ns > before):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        process.join()
        assert process.exitcode == -9
        is_there = (is_there and not fresh) or (run / stage / "model.safetensors").exists()
        if is_there:
            utils.load_model(run, stage)  # and can be used
        if is_there and i % 8 == 7:
            call(f"predict.py --run_dir {run} --n_samples 2 --out {tmp_path / 'predict'}")
    call(f"train.py --run_dir {run} {flags}")
    assert_the_same(run / stage, whole / stage)
    assert not list(run.rglob("*.tmp"))


def test_a_full_disk_or_a_folder_that_is_none(data, tmp_path):
    """One line; the last good checkpoint is as it was, and training goes on from it."""
    flags = stages(data)["vq_vae"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    call(f"train.py --run_dir {whole} {flags}")
    stop_after(run, flags, 3)
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    code = (
        "import resource, train, utils\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))\n"
        "utils.run_main(train.main)\n"
    )
    for room in ("0", "9000"):  # nothing can be written; or the log, but no weights
        words = ["-c", code.replace("ROOM", room), *flags.split(), "--run_dir", run]
        _, err = call(words, code=2)
        assert re.search(r"^error: .*cannot be written.*disk full", err, re.M)
        assert "Traceback" not in err
        for name in ("checkpoint.pt", "model.safetensors", "config.json"):
            path = run / "vq_vae" / name
            assert path.read_bytes() == before[path], name
    call(f"train.py --run_dir {run} {flags}")
    assert_the_same(run / "vq_vae", whole / "vq_vae")

    (tmp_path / "file").touch()
    _, err = call(f"train.py --run_dir {tmp_path / 'file' / 'run'} {flags}", code=2)
    assert "cannot be made (Not a directory); choose another folder" in err
    _, err = call(f"train.py --run_dir /sys/run {flags}", code=2)  # not even for the administrator
    assert re.search(r"/sys/run: cannot be made \(.*\); choose another folder", err)


def test_two_runs_in_one_directory(data, tmp_path):
    with utils.only_one(tmp_path / ".vq_vae.lock"):
        words = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE}"
        _, err = call(words, code=2)
    assert f"process {os.getpid()} of {platform.node()} is at work here" in err
    assert not (tmp_path / "vq_vae").exists()
    call(words)


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(utils.UserError, match="cannot be written"), utils.only_one(
        tmp_path / ".lock"
    ):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_started_over_goes_on_without_fresh(data, tmp_path):
    """To give --fresh again would throw away what was saved."""
    code = (
        "import os, signal, train, utils\n"
        "train.learning_rate = lambda *_: os.kill(os.getpid(), signal.SIGINT) or 1e-3\n"
        "utils.run_main(train.main)\n"
    )
    flags = f"--mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE} --fresh"
    _, err = call(["-c", code, *flags.split()], code=130)
    assert "the same command, without --fresh, goes on from there" in err


def test_a_finished_run_says_so_and_a_longer_one_goes_on(data, tmp_path):
    command = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path / 'r'} {SMALL_VQ_VAE}"
    call(command)
    out, _ = call(command)
    assert "finished" in out
    call(f"{command} --n_updates 9")
    log = [json.loads(line) for line in (tmp_path / "r" / "vq_vae" / "log.jsonl").open()]
    assert [entry["update"] for entry in log] == [3, 6, 9]


def test_a_run_that_cannot_go_on_is_left_as_it_is(data, run_dir, tmp_path, monkeypatch):
    path = tmp_path / "run" / "vq_vae"
    config = json.loads((run_dir / "vq_vae" / "config.json").read_text())
    other = "fp32" if config["precision"] == "bf16" else "bf16"

    def without_checkpoint():
        (path / "checkpoint.pt").unlink()

    def with_newer_config():
        (path / "config.json").write_text(json.dumps(config | {"format_version": 99}))

    def with_newer_checkpoint():
        checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
        torch.save(checkpoint | {"format_version": 99}, path / "checkpoint.pt")

    def with_moments_of_nothing():  # 10 TB, were they copied
        checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
        moments = checkpoint["optimizers"][0]["state"][0]
        moments["exp_avg"] = torch.zeros(1).expand(1 << 20, 1 << 20)
        torch.save(checkpoint, path / "checkpoint.pt")

    def with_a_number_beyond_floats():
        checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
        checkpoint["running"] = [{"reconstruction": 10**400}]
        torch.save(checkpoint, path / "checkpoint.pt")

    def with_a_figure_of_its_own():
        checkpoint = torch.load(path / "checkpoint.pt", weights_only=True)
        checkpoint["log"][0]["mine"] = torch.zeros(1)
        torch.save(checkpoint, path / "checkpoint.pt")

    def with_a_terabyte():
        class Terabyte:
            def __reduce__(self):
                return bytearray, (1 << 40,)

        torch.save({"format_version": 1, "state": Terabyte()}, path / "checkpoint.pt")

    def compressed():
        with zipfile.ZipFile(path / "checkpoint.pt", "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/99", bytes(1 << 20))

    def before_the_archive():  # torch.load would take it for a file of the old kind
        whole = (path / "checkpoint.pt").read_bytes()
        (path / "checkpoint.pt").write_bytes(pickle.dumps(bytearray(9)) + whole)

    for change, flags, words in (
        (without_checkpoint, "", "without checkpoint.pt"),
        (with_newer_config, "", "config.json: format version 99, this code reads 1 to 4; update"),
        (with_newer_checkpoint, "", "point.pt: format version 99, this code reads 1 to 4; update"),
        (with_moments_of_nothing, "", "damaged .moments of other weights"),
        (with_a_number_beyond_floats, "", "damaged .not the history of a run"),
        (with_a_figure_of_its_own, "", "damaged .not the history of a run"),
        (with_a_terabyte, "", "damaged .__builtin__ bytearray in it"),
        (compressed, "", "damaged .compressed"),
        (before_the_archive, "", "damaged .something before the archive"),
        (lambda: None, f"--precision {other}", f"it with --precision {config['precision']}"),
    ):
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(run_dir, path.parent)
        change()
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        words_of = f"train.py --mode vq_vae --data {data} --run_dir {path.parent} {SMALL_VQ_VAE}"
        monkeypatch.setattr("sys.argv", f"{words_of} --n_updates 9 {flags}".split())
        with pytest.raises(utils.UserError, match=words):
            train.main()
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_moments_that_repeat_one_number_are_not_written_beyond_it(data, tmp_path):
    """The fused optimizer takes moments for as dense as the weights."""
    words = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE}"
    call(words)
    path = tmp_path / "vq_vae" / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    for optimizer in checkpoint["optimizers"]:
        for moments in optimizer["state"].values():
            for name in moments.keys() - {"step"}:
                moments[name] = torch.zeros(1).expand(moments[name].shape)
    torch.save(checkpoint, path)
    call(f"{words} --n_updates 7")
    for optimizer in torch.load(path, weights_only=True)["optimizers"]:
        for moments in optimizer["state"].values():
            assert all(n > 0 for moment in moments.values() for n in moment.stride())


def test_ctrl_c_that_ends_the_reader_of_the_messages_too_loses_nothing(data, tmp_path):
    """As in `python train.py ... 2>&1 | tee log`."""
    words = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE}"
    process, out, err = start([*words.split(), "--n_updates", "100000"])
    log = tmp_path / "vq_vae" / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    out.close()
    err.close()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    state = torch.load(tmp_path / "vq_vae" / "checkpoint.pt", weights_only=True)["state"]
    assert state["update"] > 0


def test_a_run_in_a_folder_that_is_a_link_can_start_over(data, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vq_vae").symlink_to(tmp_path / "scratch")
    words = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path / 'run'} {SMALL_VQ_VAE}"
    call(words)
    before = files(tmp_path / "scratch")
    call(f"{words} --fresh")
    assert files(tmp_path / "scratch") == before
    out, _ = call(words)
    assert "finished" in out


def test_a_prior_from_before_there_were_mirrors_and_orders_goes_on(data, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    command = f"train.py --mode pixelcnn --run_dir {tmp_path / 'run'} {SMALL_PRIOR}"
    call(f"{command} --mirror none --order rows --fresh")
    path = tmp_path / "run" / "pixelcnn" / "config.json"
    config = json.loads(path.read_text())
    assert config["model"].pop("mirror") == "none"
    assert config["model"].pop("order") == "rows"
    path.write_text(json.dumps(config))
    _, err = call(f"{command} --n_updates 6 --mirror rows", code=2)
    assert "holds a run with mirror none, not rows" in err
    _, err = call(f"{command} --n_updates 6 --order columns", code=2)
    assert "holds a run with order rows, not columns" in err
    call(f"{command} --n_updates 6")


def test_a_run_of_an_older_preset_goes_on_as_it_began(data, run_dir, tmp_path):
    """A prior begun with Adam, averaged weights, no summary, and as many updates as it had then."""
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    code = (
        "import train, utils\n"
        "model, settings = train.PRESETS['demo']['pixelcnn'].values()\n"
        "model['summary'] = False\n"
        "settings |= {'n_updates': 9, 'log_interval': 3, 'optimizer': 'adam', 'average': 0.9}\n"
        "utils.run_main(train.main)\n"
    )
    flags = re.sub(r"--(n_updates|log_interval) \d+", "", SMALL_PRIOR).split()
    flags = ["--mode", "pixelcnn", "--run_dir", run, *flags]
    call(["-c", code, *flags, "--fresh", "--n_updates", "6"])
    call(["-c", code, *flags, "--n_updates", "9"])
    path = run / "pixelcnn" / "config.json"
    config = json.loads(path.read_text())
    del config["train"]["optimizer"], config["model"]["summary"]  # as before format 4
    path.write_text(json.dumps(config))
    out, _ = call(["train.py", *flags])
    assert "is finished: 9 updates" in out
    call(["train.py", *flags, "--n_updates", "12"])
    config = json.loads(path.read_text())
    kept = [config["train"][name] for name in ("n_updates", "log_interval", "optimizer", "average")]
    assert [*kept, config["model"]["summary"]] == [12, 3, "adam", 0.9, False]


@pytest.mark.parametrize("stage", ["vq_vae", "pixelcnn"])
def test_patience_stops_early(stage, data, run_dir, tmp_path):
    """With a learning rate of zero only the codebook's averages still move."""
    shutil.copytree(run_dir / "vq_vae", tmp_path / "r" / "vq_vae")
    flags = "--n_updates 90 --log_interval 1 --learning_rate 0 --patience 2"
    command = f"train.py --run_dir {tmp_path / 'r'} {stages(data)[stage]} {flags}"
    out, _ = call(f"{command} --fresh")
    log = [json.loads(line) for line in (tmp_path / "r" / stage / "log.jsonl").open()]
    best = int(re.search(r"best validation .* at update (\d+)", out)[1])
    assert log[-1]["update"] == best + 2 < 90
    name, better = ("ssim", max) if stage == "vq_vae" else ("bits_per_code", min)
    assert best == better(log, key=lambda entry: entry["validate"][name])["update"]
    again, _ = call(command)
    assert "finished" in again


QUANTISE = """
import os, sys, torch
sys.path.insert(0, os.getcwd())
import modules
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
rank, n = modules.processes()
torch.manual_seed(0)
quantiser = modules.VectorQuantizer(64, 4, diversity=0.1, codebook=sys.argv[1])
grads = []
for update in range(4):
    torch.manual_seed(update)
    z = torch.randn(8, 4, 5, 3) * (1 + update)  # the spread grows, so that codes die
    z = z.chunk(n)[rank].requires_grad_()
    z_q, _, losses = quantiser(z)
    (z_q.square().mean() + sum(losses.values())).backward()
    grads.append(z.grad / n)  # as averaging over the processes would leave it
if rank == 0:
    torch.save((quantiser.state_dict(), grads), sys.argv[2])
if n > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("codebook", ["ema", "loss"])
def test_a_quantiser_of_two_processes_equals_one(codebook, tmp_path):
    """k-means start, moving averages, revival, and the gradients of all loss terms."""
    script = tmp_path / "quantise.py"
    script.write_text(QUANTISE)
    call(f"{script} {codebook} {tmp_path / 'one'}")
    call(f"{script} {codebook} {tmp_path / 'two'}", processes=2)
    (one, grads), (two, of_first) = (torch.load(tmp_path / name) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    for whole, half in zip(grads, of_first, strict=True):
        torch.testing.assert_close(half, whole[:4], rtol=1e-4, atol=1e-7)


def moved(run, stage):
    """Weights of a run, and how they differ from those that its training began with."""
    config = utils.read_config(run / stage)
    make_config, make_model = utils.STAGES[stage]
    torch.manual_seed(0)
    model = make_model(make_config(**config["model"]))
    if stage == "pixelcnn":
        model.start_from(utils.load_model(run, "vq_vae").quantizer.codebook)
    weights, first = load_file(run / stage / "model.safetensors"), model.state_dict()
    return weights, {name: weights[name].float() - first[name].float() for name in weights}


def assert_close(one, two, stage):
    """To 1 % of the way that each weight has come."""
    (a, way), (b, _) = (moved(run, stage) for run in (one, two))
    for name in a:
        apart, far = float((b[name].float() - a[name].float()).norm()), float(way[name].norm())
        assert apart <= 0.01 * far, (name, apart, far)


APART = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
sys.argv = [word.replace("RANK", os.environ["RANK"]) for word in sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_equal_one_of_twice_the_batch(data, tmp_path):
    """Both stages: k-means start, revival, diversity term, hidden labels, dropout, averages.

    The slices have no blank background, whose vectors are as near to one code as to the next. Only
    the first process writes: in a folder of its own the second one leaves nothing.
    """
    one, two, second, data = (tmp_path / name for name in ("one", "two_0", "two_1", "data"))
    script = tmp_path / "apart.py"
    script.write_text(APART)
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = data / f"sub-{i // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        rough = Image.fromarray(rng.integers(0, 255, (9, 6), dtype=np.uint8))
        rough.resize((32, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    flags = f"--mode vq_vae --data {data} --precision fp32 {SMALL_VQ_VAE} --learning_rate 0.03"
    prior = f"--mode pixelcnn --precision fp32 {SMALL_PRIOR} --learning_rate 0.03"
    for stage, words in (("vq_vae", flags), ("pixelcnn", prior)):
        call(f"train.py --run_dir {one} {words} --batch_size 4")
        if stage == "pixelcnn":  # starts from the same
            shutil.rmtree(two / "vq_vae")
            for name, run in itertools.product(("vq_vae", "codes"), (two, second)):
                shutil.copytree(one / name, run / name)
        before = files(second)
        here = f"--run_dir {tmp_path / 'two_RANK'}"
        call(f"{script} train.py {here} {words} --batch_size 2", processes=2)
        assert files(second) == before
        assert_close(one, two, stage)
        a, b = ((run / stage / "log.jsonl").read_text().splitlines() for run in (one, two))
        for x, y in zip(map(json.loads, a), map(json.loads, b), strict=True):
            for name in x["train"].keys() & {"reconstruction", "bits_per_code"}:
                assert y["train"][name] == pytest.approx(x["train"][name], rel=1e-4)
            for name in x["validate"].keys() & {"ssim", "psnr", "bits_per_code"}:
                assert y["validate"][name] == pytest.approx(x["validate"][name], rel=1e-3)

    # now by one process, then by two again: the slices go on where they stopped
    out, _ = call(f"train.py --run_dir {two} {prior} --batch_size 4 --n_updates 6")
    assert "note: an update" not in out
    call(f"train.py --run_dir {one} {prior} --batch_size 4 --n_updates 6")
    assert_close(one, two, "pixelcnn")
    out, _ = call(f"train.py --run_dir {two} {prior} --batch_size 4 --n_updates 8", processes=2)
    assert "note: an update is of 2 x 4 slices from here on, after 1 x 4" in out
    log = [json.loads(line) for line in (two / "pixelcnn" / "log.jsonl").open()]
    assert [entry["update"] for entry in log] == [2, 4, 6, 8]
    state = torch.load(two / "pixelcnn" / "checkpoint.pt")["state"]
    assert state["drawn"] == 6 * 4 + 2 * 8
    out, _ = call(f"train.py --run_dir {two} {prior} --batch_size 2 --n_updates 9")
    assert "note: an update is of 1 x 2 slices" in out
    _, err = call(f"train.py --run_dir {two} {prior} --batch_size 4 --n_updates 10", code=2)
    assert "holds a run with batch_size 2, not 4" in err

    _, err = call(f"{script} train.py {here} {prior} --n_updates 10", processes=2, code=1)
    assert "two_0/pixelcnn: not the same on all machines; choose a disk they share" in err

    for out, processes in ((one, None), (two, 2)):
        words = f"predict.py --run_dir {one} --n_samples 5 --out {out / 'predict'}"
        call(words, processes=processes)
    for i in range(5):
        a, b = (run / "predict" / "samples" / f"sample_{i:05d}.nii.gz" for run in (one, two))
        assert a.read_bytes() == b.read_bytes()


def test_a_signal_to_two_processes_saves_once(data, tmp_path):
    """As SLURM ends a job: SIGTERM to torchrun, which passes it on to each of them."""
    flags = f"--mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE} --log_interval 1"
    words = torchrun(2, ["train.py", *flags.split(), "--n_updates", "100000"])
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "vq_vae" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=200)
    saved = re.search(r"vq_vae: saved at update (\d+); the same command goes on", err)
    assert saved, err
    saved = int(saved[1])
    updates = [json.loads(line)["update"] for line in log.read_text().splitlines()]
    assert updates == list(range(1, saved + 1))
    call(f"train.py {flags} --batch_size 8 --n_updates {saved + 2}")


def test_no_thread_of_the_group_of_processes_outlives_it():
    """One that does may abort the interpreter as it ends."""
    code = (
        "import os, utils\n"
        "os.environ |= dict(TORCHELASTIC_RUN_ID='0', RANK='0', WORLD_SIZE='1')\n"
        "os.environ |= dict(MASTER_ADDR='localhost', MASTER_PORT='0')\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = count()\n"
        "with utils.joined('cpu'):\n"
        "    import torch._dynamo\n"  # as torch does by itself, sooner or later
        "    print(count() - before)\n"
        "print(count() - before)\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    during, after = map(int, done.stdout.split())
    assert during > after == 0


OLD = "--n_hiddens 4 --n_residual_hiddens 4 --embedding_dim 2 --n_embeddings 8 --batch_size 2"


def old_data(folder):
    """Slices that are the same wherever they are made."""
    for i in range(12):
        image = (np.add.outer(np.arange(16) * (i + 1), np.arange(16) * 5) % 256).astype(np.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"sub-{i // 2}_{i % 2}.png")
    return folder


def test_the_oldest_checkpoint_goes_on(tmp_path):
    """A run of format 1 that was stopped after two updates, kept in the repository."""
    shutil.copytree(Path(__file__).parent / "format_1" / "stopped", tmp_path / "run")
    data = old_data(tmp_path / "data")
    words = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path / 'run'} --precision fp32"
    call(f"{words} {OLD} --n_updates 4 --log_interval 2")
    log = [json.loads(line) for line in (tmp_path / "run" / "vq_vae" / "log.jsonl").open()]
    assert [entry["update"] for entry in log] == [2, 4]
    assert log[1]["train"]["reconstruction"] == pytest.approx(1.49976, rel=1e-3)


def test_a_collapse_is_called_out_while_it_happens(data, tmp_path, monkeypatch, capsys):
    """A codebook of one code in use; two validations, so two warnings."""
    words = f"train.py --mode vq_vae --data {data} --run_dir {tmp_path} {SMALL_VQ_VAE}"
    monkeypatch.setattr("sys.argv", f"{words} --codebook loss --learning_rate 0".split())
    monkeypatch.setattr(
        train.metrics, "reconstruct", lambda *_, **__: [(x, x, torch.zeros(2, 4, 4).long())]
    )
    x = torch.rand(2, 1, 16, 16)
    train.main()
    said = capsys.readouterr()
    assert (said.out + said.err).count("the codebook collapses: after") == 2
    assert "1 of 16 codes are in use, perplexity 1.0" in said.out + said.err


def test_a_collapsing_codebook_is_told_from_a_young_one():
    assert not train.is_collapsing(used=460, size=512, perplexity=180)
    assert train.is_collapsing(used=40, size=512, perplexity=30)
    assert train.is_collapsing(used=300, size=512, perplexity=5)  # most of them hardly ever
    assert train.is_collapsing(used=1, size=8, perplexity=1)

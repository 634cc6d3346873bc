"""What the training benchmarks share: train one stage for so many seconds, note when it got where.

A learning rate that falls to its end needs the number of updates beforehand, so a short first run
measures the pace. Both runs are train.py's own, on the whole training split; validation is on 64
slices of the validation split, so that its cost is small. Test figures are of the whole test split.
"""

import _thread
import contextlib
import functools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dataset  # noqa: E402
import metrics  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
N_VALIDATE = 64
PACE = 20  # seconds of the run that measures the pace


@functools.cache
def load(path):
    """The data, with a validation split of `N_VALIDATE` slices from all over."""
    data = dataset.load(path, progress=False)
    whole = data["validate"]
    some = np.linspace(0, len(whole) - 1, min(N_VALIDATE, len(whole))).astype(int)
    data.splits["validate"] = dataset.SliceSplit(
        whole.images[some], whole.labels[some], whole.positions[some],
        [whole.patients[i] for i in some], [whole.slices[i] for i in some],
    )  # fmt: skip
    return data


def train_for(seconds, data, run_dir, argv, clock=time.perf_counter, scheduled=True):
    """Train a stage for a time, as `python train.py *argv` would.

    Args:
        clock: what the seconds are of; `time.process_time` where several trainings share the cores.
        scheduled: fit the learning rate's schedule into the time; else stop when time is up.
    Returns:
        [(seconds since the start, entry of log.jsonl), ...].
    """
    argv = [*argv, "--log_interval", "20"]
    n_updates = 10**6
    if scheduled:
        with tempfile.TemporaryDirectory() as scratch:
            log = _run(PACE, data, Path(scratch), [*argv, "--n_updates", "1000000"], clock)
        (t0, first), (t1, last) = log[0], log[-1]
        n_updates = round(seconds * (last["update"] - first["update"]) / (t1 - t0))
    limit = float("inf") if scheduled else seconds
    return _run(limit, data, run_dir, [*argv, "--n_updates", str(n_updates), "--fresh"], clock)


def _run(limit, data, run_dir, argv, clock):
    args = train.parser().parse_args([*argv, "--run_dir", str(run_dir)])
    args.preset = args.preset or "demo"
    args.data_arguments = {"data": data.report["root"]}
    settings = train.resolve(args)
    device = utils.pick_device(args.device)
    args.precision = utils.pick_precision(args.precision, device)
    log, done, start = [], threading.Event(), clock()

    def watch():
        path = run_dir / args.mode / "log.jsonl"
        while not done.wait(0.1):
            lines = path.read_text().splitlines() if path.exists() else []
            log.extend((clock() - start, json.loads(line)) for line in lines[len(log) :])
            if clock() - start > limit and len(log) > 1:
                _thread.interrupt_main()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    with (
        contextlib.suppress(KeyboardInterrupt),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        if args.mode == "vq_vae":
            train.train_vq_vae(args, run_dir, settings, data, device)
        else:
            first = utils.load_config(run_dir, "vq_vae")
            train.train_pixelcnn(args, run_dir, settings, data, device, first)
    time.sleep(0.3)
    done.set()
    watcher.join()
    return log


def test_figures(data, run_dir):
    """SSIM and its companions over the test split, and the codes it uses, of a trained stage 1."""
    device = utils.pick_device("auto")
    model = utils.load_model(run_dir, "vq_vae", device)
    rows, codes = [], []
    for x, x_hat, c in metrics.reconstruct(model, data["test"], device):
        pairs = zip(x[:, 0].numpy(), x_hat[:, 0].numpy(), strict=True)
        rows += [metrics.slice_scores(*pair) for pair in pairs]
        codes.append(c)
    figures = {name: round(float(np.nanmean([r[name] for r in rows])), 4) for name in rows[0]}
    return figures | metrics.usage(torch.cat(codes), model.config.n_embeddings)


def save(name, result):
    result = {**result, "threads": torch.get_num_threads(), "versions": utils.versions()}
    utils.write_json(RESULTS / f"{name}.json", result)

"""What the training benchmarks share: train one stage for so many seconds, note when it got where.

A learning rate that falls to its end needs the number of updates beforehand, so a short first run
measures the pace. Both runs are those of train.py, on the whole training split; validation is on 64
slices of the validation split, so that it costs little. Test figures are of the whole test split.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
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


class TimeIsUp(Exception):
    pass


def train_for(seconds, data, run_dir, argv, clock=time.perf_counter, scheduled=True):
    """Train a stage for a time, as `python train.py *argv` would.

    Args:
        run_dir: new, but for what the stage starts from.
        clock: what the seconds are of; `time.process_time` where several trainings share the cores.
        scheduled: fit the learning rate's schedule into the time; else stop when time is up.
    Returns:
        [(seconds since the start, entry of log.jsonl), ...], one entry in about 15 seconds, or in
        10 updates if not scheduled.
    """
    if not scheduled:
        flags = ["--n_updates", "1000000", "--log_interval", "10"]
        return run(seconds, data, run_dir, [*argv, *flags], clock)[0]
    with tempfile.TemporaryDirectory() as scratch:
        for part in ("vq_vae", "codes"):
            if (run_dir / part).exists():
                shutil.copytree(run_dir / part, Path(scratch) / part)
        flags = ["--n_updates", "40", "--log_interval", "10"]
        stamps = np.diff(run(float("inf"), data, Path(scratch), [*argv, *flags], clock)[1])
    update = np.median(stamps)
    validation = stamps[9::10].mean() - update
    interval = max(10, round(15 / update))
    n_updates = int((seconds - stamps[0]) / (update + validation / interval))
    flags = ["--n_updates", str(n_updates), "--log_interval", str(interval)]
    return run(float("inf"), data, run_dir, [*argv, *flags], clock)[0]


def run(limit, data, run_dir, argv, clock):
    """One training -> its log with times, and the time at the start of each update."""
    args = train.parser().parse_args([*argv, "--run_dir", str(run_dir)])
    args.preset = args.preset or "demo"
    args.data_arguments = {"data": data.report["root"]}
    settings = train.resolve(args)
    device = utils.pick_device(args.device)
    args.precision = utils.pick_precision(args.precision, device)
    stamps, start, original = [], clock(), train.learning_rate

    def learning_rate(update, options):  # called once at the start of every update
        stamps.append(clock() - start)
        if stamps[-1] > limit:
            raise TimeIsUp
        return original(update, options)

    train.learning_rate = learning_rate
    try:
        with (
            contextlib.suppress(TimeIsUp),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            if args.mode == "vq_vae":
                train.train_vq_vae(args, run_dir, settings, data, device)
            else:
                first = utils.load_config(run_dir, "vq_vae")
                train.train_pixelcnn(args, run_dir, settings, data, device, first)
    finally:
        train.learning_rate = original
    stamps.append(clock() - start)
    lines = (run_dir / args.mode / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [(stamps[entry["update"]], entry) for entry in entries], stamps


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
    utils.write_json(RESULTS / f"{name}.json", {**result, "versions": utils.versions()})


def rows_so_far(name, budget):
    """Rows of an earlier call with the same budget, a dict of what the file has beside its rows."""
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    is_same = all(stored.get(key) == value for key, value in budget.items())
    return stored["rows"] if stored and is_same else {}

"""How fast data arrives: nibabel in one process against the first and the second start of `load`.

    python benchmarks/data.py                     # 12,660 slices: about three minutes, 3 GB of disk

Writes HipMRI-like `.nii.gz` slices (256 x 128, int32) into a temporary folder, reads them once so
that all three find them in the page cache, then times each in a fresh process. Also measured: peak
resident memory, and the share of a training step that `SliceSplit.batch` takes.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZE, PER_VOLUME = (256, 128), 60


def write_volume(folder, volume, slices):
    import nibabel
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(volume)
    case, week = 4 + volume // 6, volume % 6
    split = "train" if case < 36 else "validate" if case < 38 else "test"
    body = gaussian_filter(rng.random((slices, *SIZE)), (2, 9, 9))
    body = (body - body.min()) / np.ptp(body)
    image = np.where(body > 0.45, 330 * body, 0) + rng.normal(0, 3, body.shape)
    for i, plane in enumerate(np.clip(image, 0, None).astype(np.int32)):
        name = f"case_{case:03d}_week_{week}_slice_{i}.nii.gz"
        path = folder / f"keras_slices_{split}" / name
        nibabel.save(nibabel.Nifti1Image(plane, np.diag([1.7, 1.56, 1, 1])), path)


def generate(folder, n_slices):
    for split in ("train", "validate", "test"):
        (folder / f"keras_slices_{split}").mkdir(parents=True)
    n = -(-n_slices // PER_VOLUME)
    counts = [min(PER_VOLUME, n_slices - PER_VOLUME * i) for i in range(n)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_volume, [folder] * n, range(n), counts))


def with_nibabel(folder, cache):
    import nibabel

    paths = sorted(Path(folder).rglob("*.nii.gz"))
    start, cpu = time.perf_counter(), sum(os.times()[:4])
    for path in paths:
        nibabel.load(path).get_fdata()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": sum(os.times()[:4]) - cpu}


def with_load(folder, cache):
    import dataset

    start, cpu = time.perf_counter(), sum(os.times()[:4])
    data = dataset.load(folder, cache_dir=cache, progress=False)
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "slices": sum(len(data[s]) for s in dataset.SPLITS),
    }


def with_step(folder, cache):
    """Seconds per batch of 32, and per step of the classic VQ-VAE on the fastest device here."""
    import torch

    import dataset
    import modules

    data = dataset.load(folder, cache_dir=cache, progress=False)["train"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = modules.VQVAE(modules.VQVAEConfig()).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    rng, taken = np.random.default_rng(0), {"batch": [], "step": []}
    for _ in range(4 if device == "cpu" else 60):
        start = time.perf_counter()
        x = data.batch(rng.integers(len(data), size=32))
        middle = time.perf_counter()
        x_hat = model(x.to(device))[0]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(x_hat, x.to(device)).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        taken["batch"].append(middle - start)
        taken["step"].append(time.perf_counter() - start)
    step = float(np.median(taken["step"]))
    batch = float(np.median(taken["batch"]))
    return {"device": device, "batch_seconds": batch, "step_seconds": step,
            "input_share": batch / step}  # fmt: skip


def with_epoch(folder, cache):
    """Every batch of one epoch and nothing else, for the memory that reading leaves behind."""
    import dataset

    data = dataset.load(folder, cache_dir=cache, progress=False)["train"]
    order = np.random.default_rng(0).permutation(len(data))
    start = time.perf_counter()
    for i in range(0, len(data), 32):
        data.batch(order[i : i + 32])
    return {"seconds": time.perf_counter() - start}


WAY_OF = {  # the rows of the table, in the order they are run
    "nibabel, one process": "nibabel",
    "first start": "load",
    "second start": "load",
    "one epoch of batches": "epoch",
}
WAYS = {"nibabel": with_nibabel, "load": with_load, "step": with_step, "epoch": with_epoch}


def in_fresh_process(way, folder, cache):
    command = [sys.executable, __file__, "--way", way, "--folder", folder, "--cache", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def measure(way, folder, cache):
    load_average = os.getloadavg()[0]
    result = WAYS[way](folder, cache)
    mine, workers = (resource.getrusage(getattr(resource, f"RUSAGE_{who}"))
                     for who in ("SELF", "CHILDREN"))  # fmt: skip
    result |= {"peak_mib": mine.ru_maxrss / 2**10, "largest_worker_mib": workers.ru_maxrss / 2**10}
    print(json.dumps(result | {"load_average_before": load_average}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n_slices", type=int, default=12660, help="files (default: 12660)")
    parser.add_argument("--rounds", type=int, default=2, help="best of this many (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "data.json",
                        help="result (default: benchmarks/results/data.json)")  # fmt: skip
    for hidden in ("--way", "--folder", "--cache"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.folder, args.cache)
        return
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top) / "slices"
        generate(folder, args.n_slices)
        size = sum(len(p.read_bytes()) for p in folder.rglob("*.nii.gz"))  # into the page cache
        rows = {}
        for turn in range(args.rounds):  # the best of each: other programs only ever slow one down
            cache = Path(top) / f"cache{turn}"
            for name, way in WAY_OF.items():
                row = in_fresh_process(way, folder, cache)
                rows[name] = min(rows.get(name, row), row, key=lambda r: r["seconds"])
        step = in_fresh_process("step", folder, cache)
    slow = rows["nibabel, one process"]["seconds"]
    print(f"{args.n_slices} files, {size / 2**20:.0f} MiB, {len(os.sched_getaffinity(0))} cores")
    print(f"{'':24}{'seconds':>9}{'speed-up':>10}{'CPU s':>9}{'peak MiB':>10}{'a worker':>10}")
    for name, row in rows.items():
        row["speed_up"] = slow / row["seconds"]
        cpu = f"{row['cpu_seconds']:.2f}" if "cpu_seconds" in row else ""
        print(f"{name:24}{row['seconds']:9.3f}{row['speed_up']:9.1f}x{cpu:>9}"
              f"{row['peak_mib']:10.0f}{row['largest_worker_mib']:10.0f}")  # fmt: skip
    print(f"batch of 32: {1e3 * step['batch_seconds']:.2f} ms, {100 * step['input_share']:.2f} % "
          f"of a step of the default VQ-VAE on {step['device']}")  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({
        "n_slices": args.n_slices, "bytes": size, "cores": len(os.sched_getaffinity(0)),
        "machine": platform.processor() or platform.machine(), "python": platform.python_version(),
        "rows": rows, "training_step": step}, indent=1) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

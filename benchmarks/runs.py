"""What runs cost: time, memory, checkpoints, the start of a resumed run.

    python benchmarks/runs.py               # sets of 1,266 and 12,660 slices: 3 GB of disk
    python benchmarks/runs.py --presets     # each preset on the phantom: about 5 minutes

The first trains both stages of the preset `demo` until the first validation on slices in HipMRI's
layout and number, and prints the share of that time which saving took, the seconds until the first
update of a fresh and of a resumed run, the seconds to read the files the first time, and the peak
resident memory. The second prints parameters,
seconds per update, memory, and seconds per sample, for each preset, and for two sizes of image.
Each training is a fresh process. Writes benchmarks/results/runs.json, or presets.json.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def measure(argv):
    """Run train.py with `argv` here, and print when it did what as JSON."""
    start = time.perf_counter()
    import train

    saving, first = [], []
    original, batch_indices = train.save, train.batch_indices

    def save(write, *args):
        begun = time.perf_counter()
        original(write, *args)
        saving.append(time.perf_counter() - begun)

    def indices(*args):
        first.append(time.perf_counter())
        return batch_indices(*args)

    train.save, train.batch_indices = save, indices
    sys.argv = ["train.py", *argv]
    train.main()
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {"first_update_s": first[0] - start, "peak_gib": peak, "updates": len(first)}
    figures["saving_share"] = sum(saving) / (end - first[0])
    between = sorted(b - a for a, b in zip(first, first[1:], strict=False))
    figures["update_s"] = between[len(between) // 2] if between else None
    print(json.dumps(figures))


def in_fresh_process(argv):
    command = [sys.executable, __file__, "--measure", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def presets():
    import torch

    import train
    import utils

    rows = {}
    for name, preset, size in (
        ("demo", "demo", (256, 128)),
        ("demo, 256 x 256", "demo", (256, 256)),
        ("base", "base", (256, 128)),
        ("classic", "classic", (256, 128)),
    ):
        rows[name] = {}
        with tempfile.TemporaryDirectory() as run:
            for stage in utils.STAGES:
                argv = ["--mode", stage, "--run_dir", run, "--preset", preset, "--n_updates", 12]
                argv += ["--image_size", *size] if stage == "vq_vae" else []
                row = in_fresh_process(argv)
                model = utils.load_model(run, stage)
                row["parameters"] = sum(p.numel() for p in model.parameters())
                row["batch_size"] = train.PRESETS[preset][stage]["train"]["batch_size"]
                rows[name][stage] = row
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                with torch.inference_mode():
                    model.sample(16)
                seconds.append(time.perf_counter() - start)
            rows[name]["pixelcnn"]["sample_s"] = sorted(seconds)[1] / 16
        print(name, rows[name], flush=True)
    result = {"rows": rows, "threads": torch.get_num_threads(), "versions": utils.versions()}
    utils.write_json(ROOT / "benchmarks" / "results" / "presets.json", result)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n_slices", type=int, nargs="+", default=[1266, 12660], help="of 256 x 128")
    p.add_argument("--presets", action="store_true", help="measure the presets on the phantom")
    args = p.parse_args()
    if args.presets:
        presets()
        return
    import data
    import torch

    import train
    import utils

    rows = {}
    for n in args.n_slices:
        rows[n] = {}
        with tempfile.TemporaryDirectory() as top:
            folder, run = Path(top) / "slices", Path(top) / "run"
            data.generate(folder, n)
            for stage in utils.STAGES:
                interval = train.PRESETS["demo"][stage]["train"]["log_interval"]
                argv = ["--mode", stage, "--run_dir", run]
                argv += ["--data", folder, "--cache_dir", Path(top) / "cache"]
                row = in_fresh_process([*argv, "--n_updates", interval])
                longer = [*argv, "--n_updates", interval + 1, "--log_interval", interval + 1]
                again = in_fresh_process(longer)
                fresh = in_fresh_process([*argv, "--n_updates", 1, "--fresh"])
                row |= {"resumed_s": again["first_update_s"], "fresh_s": fresh["first_update_s"]}
                rows[n][stage] = row
                print(f"{n:6d} slices, {stage:10s} {row}", flush=True)
    result = {"rows": rows, "threads": torch.get_num_threads(), "versions": utils.versions()}
    utils.write_json(ROOT / "benchmarks" / "results" / "runs.json", result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()

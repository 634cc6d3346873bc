"""What it costs that a run survives: checkpoints, the start of a resumed run, and memory.

    python benchmarks/runs.py            # 12,660 slices: about 10 minutes, 3 GB of disk

Trains both stages of the preset `demo` for a few validations' time on slices in HipMRI's layout and
number, each command in a fresh process. Prints the share of the training that saving took, the
seconds until the first update of a fresh and of a resumed run, and the peak resident memory. Writes
benchmarks/results/runs.json.
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
    print(json.dumps(figures))


def in_fresh_process(argv):
    command = [sys.executable, __file__, "--measure", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--n_slices", type=int, default=12660, help="of 256 x 128 (default: 12660)")
    args = p.parse_args()
    import data

    import train
    import utils

    rows = {}
    with tempfile.TemporaryDirectory() as top:
        folder, run = Path(top) / "slices", Path(top) / "run"
        data.generate(folder, args.n_slices)
        for stage in utils.STAGES:
            interval = train.PRESETS["demo"][stage]["train"]["log_interval"]
            argv = ["--mode", stage, "--run_dir", run]
            argv += ["--data", folder, "--cache_dir", Path(top) / "cache"]
            rows[stage] = in_fresh_process([*argv, "--n_updates", interval])
            longer = [*argv, "--n_updates", interval + 1, "--log_interval", interval + 1]
            again = in_fresh_process(longer)
            fresh = in_fresh_process([*argv, "--n_updates", 1, "--fresh"])
            for name, row in (("resumed_s", again), ("fresh_s", fresh)):
                rows[stage][name] = row["first_update_s"]
            print(f"{stage:10s} {rows[stage]}", flush=True)
    result = {"n_slices": args.n_slices, "rows": rows, "versions": utils.versions()}
    utils.write_json(ROOT / "benchmarks" / "results" / "runs.json", result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()

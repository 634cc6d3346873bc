"""The preset `demo` from start to end: the three commands, timed, and what they print and draw.

    python benchmarks/demo.py                           # on the phantom
    python benchmarks/demo.py --data BRAIN --out brain  # on other slices

Trains anew in runs/OUT, unless --keep says to score the run that is there. Writes
benchmarks/results/OUT.json, and the sheet of samples as figures/samples_OUT.png. The samples are
also told from real ones with as many of them as the test split has slices.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402

KEPT = ["reconstruction", "codebook", "rate", "prior", "samples", "protocol", "seed", "versions"]


def timed(*words):
    start = time.perf_counter()
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)
    return round(time.perf_counter() - start, 1)


def copy_small(picture, path):
    """A picture as large as a page shows it."""
    with Image.open(picture) as image:
        image.thumbnail((1200, 1400))
        image.convert("RGB").save(path, optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="phantom", help="as for train.py")
    p.add_argument("--out", default="demo", help="name of the run and of the results")
    p.add_argument("--keep", action="store_true", help="score the run that is there")
    args = p.parse_args()
    run, results = ROOT / "runs" / args.out, ROOT / "benchmarks" / "results" / f"{args.out}.json"
    seconds = json.loads(results.read_text())["seconds"] if args.keep else {}
    if not args.keep:
        for stage in utils.STAGES:
            data = ["--data", args.data] if stage == "vq_vae" else []
            words = ["train.py", "--mode", stage, "--run_dir", run, *data, "--fresh"]
            seconds[stage] = timed(*words)
    seconds["predict"] = timed("predict.py", "--run_dir", run)
    found = utils.read_json(run / "predict" / "metrics.json")
    found["reconstruction"].pop("per_patient")
    n = found["reconstruction"]["n_slices"]
    many = run / "many"
    timed("predict.py", "--run_dir", run, "--n_samples", min(n, 512), "--out", many)
    told = utils.read_json(many / "metrics.json")["samples"]
    kept = {"data": found["data"]["name"], "seconds": seconds, **{key: found[key] for key in KEPT}}
    kept["samples"]["told_with_many"] = {"n": told["judged"], **told["two_sample_accuracy"]}
    utils.write_json(results, kept)
    copy_small(run / "predict" / "samples.png", ROOT / "figures" / f"samples_{args.out}.png")


if __name__ == "__main__":
    main()

"""Keep the numbers and the sheet of samples of a run that predict.py has judged.

    python benchmarks/keep.py --run_dir runs/demo --out demo

Writes benchmarks/results/OUT.json from the run's metrics.json, and figures/samples_OUT.png.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import utils  # noqa: E402

KEPT = ["reconstruction", "codebook", "rate", "prior", "samples", "protocol", "seed", "versions"]


def copy_small(picture, path):
    """A picture as large as a page shows it."""
    with Image.open(picture) as image:
        image.thumbnail((1200, 1400))
        image.convert("RGB").save(path, optimize=True)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, required=True, help="a run after predict.py")
    p.add_argument("--out", required=True, help="name of the results")
    args = p.parse_args()
    found = utils.read_json(args.run_dir / "predict" / "metrics.json")
    found["reconstruction"].pop("per_patient")
    kept = {"data": found["data"]["name"], **{name: found[name] for name in KEPT}}
    utils.write_json(ROOT / "benchmarks" / "results" / f"{args.out}.json", kept)
    sheet = args.run_dir / "predict" / "samples.png"
    copy_small(sheet, ROOT / "figures" / f"samples_{args.out}.png")


if __name__ == "__main__":
    main()

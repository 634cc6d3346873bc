"""How far back the prior looks: what the rest of a slice costs if lines long before are another's.

    python benchmarks/reach.py --run_dir runs/demo

In each test slice, the lines of codes more than so many before the last part (drawn column by
column, the last 6 of 16 in the phantom) are replaced by those of another patient's slice at
the same place of its volume. If the prior used them, the codes of the last part would cost more
bits. Writes benchmarks/results/OUT.json.
"""

import argparse
from pathlib import Path

import harness
import numpy as np
import torch

GAPS = [0, 1, 2, 3, 4, 6, 8, 10]  # lines that stay
LOWER = 3 / 8  # of the grid


def others(split):
    """For each slice the one of another patient that is nearest in position, in turn."""
    patients, positions = np.array(split.patients), split.positions
    found = []
    for i in range(len(split)):
        far = np.abs(positions - positions[i]) + 10.0 * (patients == patients[i])
        nearest = np.flatnonzero(far <= far.min() + 1e-6)
        found.append(nearest[i % len(nearest)])
    return np.array(found)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="with both stages")
    p.add_argument("--out", default="reach", help="name of the file of results")
    args = p.parse_args()
    config = harness.utils.load_config(args.run_dir, "vq_vae")
    data = harness.dataset.load(**({"data": "phantom"} | config["data"]["arguments"]))
    vq_vae, prior = (harness.utils.load_model(args.run_dir, s) for s in harness.utils.STAGES)
    split, device = data["test"], torch.device("cpu")
    codes = harness.metrics.split_codes(args.run_dir, data, "test", vq_vae, device)
    codes, given = torch.from_numpy(codes), (torch.from_numpy(split.labels),
                                             torch.from_numpy(split.positions))  # fmt: skip
    is_turned = prior.config.order == "columns"
    n = prior.config.lines[0]
    first = round((1 - LOWER) * n)

    def lines(grids):
        return grids.swapaxes(1, 2) if is_turned else grids

    def bits(grids):
        return lines(harness.metrics.code_bits(prior, grids, *given, device))[:, first:]

    own, rows = bits(codes), {}
    for gap in (gap for gap in GAPS if gap < first):
        mixed = codes.clone()
        lines(mixed)[:, : first - gap] = lines(codes[others(split)])[:, : first - gap]
        more = (bits(mixed) - own).mean((1, 2), dtype=np.float64)
        rows[gap] = {
            "lines_replaced": first - gap,
            "more_bits_per_code": float(more.mean()),
            "ci95": harness.metrics.patient_interval(more, split.patients),
        }
        print(gap, rows[gap], flush=True)
    result = {"data": data.name, "lines_of_last_part": n - first}
    harness.save(args.out, result | {"bits_per_code": float(own.mean()), "rows": rows})


if __name__ == "__main__":
    main()

"""Cached sampling against a full pass per code, on the same weights, in one run.

    python benchmarks/sampling.py

Draws whole grids with the caches. The full passes are all alike, so a few are timed, in turn with
the cached draws, and multiplied by the number of codes. Also prints the largest difference between
a cached logit and that of the full pass. Writes benchmarks/results/sampling.json.
"""

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
import utils  # noqa: E402
from modules import GatedPixelCNN, PixelCNNConfig  # noqa: E402

SETTINGS = [(1, (32, 16)), (16, (32, 16)), (16, (64, 32))]  # slices, grid
N_PASSES = 4


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def main():
    rows = []
    for n, size in SETTINGS:
        torch.manual_seed(0)
        of_hipmri = {"mirror": "rows", "order": "columns"}
        options = train.PRESETS["demo"]["pixelcnn"]["model"] | of_hipmri
        model = GatedPixelCNN(PixelCNNConfig(512, size, **options)).eval()
        model.mirror[-1].weight.normal_(std=0.05)
        model.summary.out.weight.normal_(std=0.05)
        for layer in model.layers:  # a fresh layer is the identity, which would hide an error
            layer.v_out.weight.normal_(std=0.05)
            layer.h_out.weight.normal_(std=0.05)
        codes = model.sample(n)
        full = model(codes)
        worst = max(
            (logits - full[:, :, i, j]).abs().max().item()
            for i, j, logits in model.logits_in_order(codes)
        )
        draws, passes = [], []
        for _ in range(3):
            draws.append(seconds(lambda m=model, k=n: m.sample(k)))
            passes += [seconds(lambda m=model, c=codes: m(c)) for _ in range(N_PASSES)]
        cached = sorted(draws)[1]
        full_seconds = sorted(passes)[len(passes) // 2] * size[0] * size[1]
        rows.append(
            {
                "slices": n,
                "grid": list(size),
                "cached_s": round(cached, 3),
                "full_s": round(full_seconds, 1),
                "ratio": round(full_seconds / cached, 1),
                "largest_logit_difference": worst,
            }
        )
        print(
            f"{n:3d} slices of {size[0]} x {size[1]}: cached {cached:.2f} s, full passes "
            f"{full_seconds:.0f} s, {full_seconds / cached:.0f}x; logits differ by {worst:.1e}",
            flush=True,
        )
    result = {"rows": rows, "threads": torch.get_num_threads(), "versions": utils.versions()}
    utils.write_json(ROOT / "benchmarks" / "results" / "sampling.json", result)


if __name__ == "__main__":
    main()

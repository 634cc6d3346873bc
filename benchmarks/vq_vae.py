"""Stage 1 against the network of 2017, same slices, same time.

    python benchmarks/vq_vae.py --data DIR               # 10 minutes, a core for each
    python benchmarks/vq_vae.py --data DIR --quantizer   # the quantiser alone, a minute

The first trains the presets `classic` and `base` side by side, one core each, for the same wall
time, and notes when each first reaches SSIM 0.80 on 64 validation slices; it needs two idle cores.
The second sets the quantiser's forward and backward pass against the form most code has, with
one-hot vectors, each in a process of its own. Writes benchmarks/results/vq_vae.json, or
quantizer.json.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

from modules import VectorQuantizer

GOAL = 0.80


def run(path, preset, minutes):
    torch.set_num_threads(1)
    data = harness.load(path)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--mode", "vq_vae", "--preset", preset]
        is_ours = preset != "classic"
        log = harness.train_for(60 * minutes, data, Path(folder), argv, scheduled=is_ours)
        curve = [(round(t, 1), e["update"], round(e["validate"]["ssim"], 4)) for t, e in log]
        return {
            "seconds": curve[-1][0],
            "updates": curve[-1][1],
            "seconds_to_goal": next((t for t, _, ssim in curve if ssim >= GOAL), None),
            "test": harness.test_figures(data, Path(folder)),
            "curve": curve,
        }


def race(path, minutes):
    data = harness.load(path)  # once, before two processes make the same cache
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = {name: pool.submit(run, path, name, minutes) for name in ("classic", "base")}
    rows = {name: future.result() for name, future in runs.items()}
    for name, row in rows.items():
        print(f"{name:8s} {row | {'curve': None}}")
    slow, fast = (rows[name]["seconds_to_goal"] for name in ("classic", "base"))
    ratio = (slow or rows["classic"]["seconds"]) / fast if fast else None
    if fast:
        print(f"SSIM {GOAL}: {'' if slow else 'more than '}{ratio:.0f} times sooner")
    result = {"data": data.name, "minutes": minutes, "goal": GOAL, "threads": 1, "rows": rows}
    result |= {"classic_reached_the_goal": slow is not None, "times_sooner": ratio}
    harness.save("vq_vae", result)


# ------------------------------------------------------------------------------------------------
# The quantiser alone
# ------------------------------------------------------------------------------------------------

N, D, K = 65536, 64, 512


class OneHot(torch.nn.Module):
    """Distances of all vectors at once, one-hot rows, a matrix product to look the codes up."""

    def __init__(self):
        super().__init__()
        self.codebook = torch.nn.Parameter(torch.randn(K, D))

    def forward(self, z):
        flat = z.permute(0, 2, 3, 1).reshape(-1, D)
        e = self.codebook
        distances = flat.pow(2).sum(1, keepdim=True) + e.pow(2).sum(1) - 2 * flat @ e.t()
        codes = distances.argmin(1)
        one_hot = torch.zeros(len(flat), K).scatter_(1, codes[:, None], 1)
        b, d, h, w = z.shape
        quantised = (one_hot @ e).view(b, h, w, d).permute(0, 3, 1, 2)
        losses = {
            "codebook": F.mse_loss(quantised, z.detach()),
            "commitment": 0.25 * F.mse_loss(quantised.detach(), z),
        }
        return z + (quantised - z).detach(), codes.view(b, h, w), losses


FORMS = {
    "one-hot": OneHot,
    "loss": lambda: VectorQuantizer(K, D, codebook="loss"),
    "ema": lambda: VectorQuantizer(K, D),
    "ema, diversity": lambda: VectorQuantizer(K, D, diversity=0.01),
}


def resident(key):
    """Resident memory of this process in MiB, "VmRSS" now or "VmHWM" at its peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s*(\d+)", status)[1]) / 1024


def measure(form):
    """Median seconds of a forward and backward pass, and the memory it adds, in this process."""
    torch.manual_seed(0)
    quantizer = FORMS[form]().train()
    z = torch.randn(16, D, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(16, D, 64, 64).to(memory_format=torch.channels_last)

    def step():
        z_q, _, losses = quantizer(z)
        outputs, inputs = [z_q, sum(losses.values())], [z, *quantizer.parameters()]
        torch.autograd.grad(outputs, inputs, [gradient, None])

    step()  # loads the libraries' code and workspaces
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    step()
    added = resident("VmHWM") - before
    times = []
    for _ in range(15):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": sorted(times)[len(times) // 2], "added_mib": added}


def quantizers():
    rounds = [
        {
            form: json.loads(subprocess.check_output([sys.executable, __file__, "--form", form]))
            for form in FORMS
        }
        for _ in range(3)
    ]
    rows = {
        form: {key: sorted(r[form][key] for r in rounds)[1] for key in rounds[0][form]}
        for form in FORMS
    }
    for form, row in rows.items():
        row["times_faster"] = rows["one-hot"]["seconds"] / row["seconds"]
        row["memory_share"] = row["added_mib"] / rows["one-hot"]["added_mib"]
        print(form, {key: round(value, 3) for key, value in row.items()})
    harness.save("quantizer", {"vectors": N, "dimensions": D, "codes": K,
                               "threads": torch.get_num_threads(), "rows": rows})


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="phantom", help="folder of slices, as for train.py")
    p.add_argument("--minutes", type=float, default=10.0, help="of training, each")
    p.add_argument("--quantizer", action="store_true", help="only the quantiser")
    p.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.form:
        print(json.dumps(measure(args.form)))
    elif args.quantizer:
        quantizers()
    else:
        race(args.data, args.minutes)


if __name__ == "__main__":
    main()

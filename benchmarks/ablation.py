"""What each choice of stage 1 is worth: one change at a time, each on the same budget.

    python benchmarks/ablation.py --data DIR                # 2 minutes of one core per row
    python benchmarks/ablation.py --data DIR --rows demo "no revival" --seconds 60 --out mine

A row is the preset `demo` with the flags named, or with a variant that was tried and is not part of
the project: the rotation trick (Fifty et al. 2024, arXiv 2410.06424), finite scalar quantisation
(Mentzer et al. 2023, arXiv 2309.15505), and, as baselines, no quantiser at all. Rows run side by
side, each on a core of its own, with the budget counted in processor seconds. Writes
benchmarks/results/OUT.json; rows already there with the same budget are kept unless named. With
--picture NAME it draws what each row makes of some test slices, and of which codes, as
figures/NAME.png.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import modules
import plots

N_SHOWN = 3

ROWS = {
    "demo": [],
    "demo, seed 1": ["--seed", "1"],
    "demo, seed 2": ["--seed", "2"],
    "Adam alone": [],
    "f=4": ["--downsample", "4"],
    "f=16": ["--downsample", "16"],
    "f=16, loss SSIM": ["--downsample", "16", "--loss", "ssim"],
    "K=256": ["--n_embeddings", "256"],
    "K=1024": ["--n_embeddings", "1024"],
    "codebook by loss": ["--codebook", "loss"],
    "no revival": [],
    "no k-means, no revival": [],
    "no diversity term": ["--diversity", "0"],
    "loss SSIM": ["--loss", "ssim"],
    "loss L1": ["--loss", "l1"],
    "loss MSE": ["--loss", "mse"],
    "width 64": ["--n_hiddens", "64", "--n_residual_hiddens", "64"],
    "width 128": ["--n_hiddens", "128", "--n_residual_hiddens", "128"],
    "strided stem": [],
    "no unit RMS": [],
    "averaged weights": [],
    "rotation trick": [],
    "FSQ 8 x 8 x 8": ["--embedding_dim", "3"],
    "autoencoder, 32 numbers a place": [],
    "VAE, 32 numbers a place": [],
    "VAE, 4 numbers a place": ["--embedding_dim", "4"],
}


class Strided(modules.Encoder):
    """With unit RMS, which only the folding stem has."""

    def __init__(self, config):
        super().__init__(config)
        self.append(modules.UnitRMS())


class RotationTrick(modules.VectorQuantizer):
    """The gradient is rotated and scaled as z is onto its code, not passed straight through."""

    def forward(self, z):
        z_q, codes, losses = super().forward(z)
        with torch.autocast(z.device.type, enabled=False):
            z, e = z.float(), z_q.detach()
            u, q = F.normalize(z, dim=1).detach(), F.normalize(e, dim=1)
            r = F.normalize(u + q, dim=1)
            scale = e.norm(dim=1, keepdim=True) / z.detach().norm(dim=1, keepdim=True)
            along_r, along_u = ((z * v).sum(1, keepdim=True) for v in (r, u))
            return scale * (z - 2 * along_r * r + 2 * along_u * q), codes, losses


class FiniteScalar(torch.nn.Module):
    """Three numbers rounded to 8 levels each: 512 codes without a codebook."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, z):
        z = z.float()
        bounded = torch.tanh(z + 0.144) * 3.504 - 0.5  # 8 levels, -4 to 3
        whole = bounded.round()
        levels = (whole.detach() + 4).long().clamp(0, 7)
        codes = levels[:, 0] + 8 * levels[:, 1] + 64 * levels[:, 2]
        return (bounded + (whole - bounded).detach()) / 4, codes, {}


class Continuous(torch.nn.Module):
    """A plain autoencoder's bottleneck: no codes, and no limit to the bits."""

    def __init__(self, *_):
        super().__init__()

    def forward(self, z):
        return z.float(), torch.zeros_like(z[:, 0], dtype=torch.int64), {}


class Gaussian(Continuous):
    """The bottleneck of a VAE (Kingma & Welling 2013): a posterior N(z, s^2), s learned by channel.

    The prior is N(0, 1).
    """

    def __init__(self, _, embedding_dim, *__):
        super().__init__()
        self.log_s = torch.nn.Parameter(torch.full((embedding_dim, 1, 1), -2.0))

    def forward(self, z):
        z, codes, _ = super().forward(z)
        if not self.training:
            return z, codes, {}
        divergence = 0.5 * (z.square() + (2 * self.log_s).exp() - 1) - self.log_s
        weight = 1e-4 * z.shape[1]  # sums over channels, means over places and slices
        noisy = z + self.log_s.exp() * torch.randn_like(z)
        return noisy, codes, {"divergence": weight * divergence.mean()}


def apply(row):
    """Change what the row's name says and no flag can."""
    presets = harness.train.PRESETS["demo"]["vq_vae"]
    if row == "no k-means, no revival":
        presets["model"]["revive"] = False
    elif row == "no revival":
        modules.VectorQuantizer.DEAD = 0.0
    elif row == "strided stem":
        presets["model"]["stem"] = "strided"
        modules.Encoder = Strided
    elif row == "no unit RMS":
        modules.UnitRMS = torch.nn.Identity
    elif row == "Adam alone":
        presets["train"]["optimizer"] = "adam"
    elif row == "averaged weights":
        presets["train"]["average"] = 0.99
    elif row == "rotation trick":
        modules.VectorQuantizer = RotationTrick
    elif row.startswith(("autoencoder", "VAE")):
        modules.VectorQuantizer = Continuous if row.startswith("auto") else Gaussian
        modules.UnitRMS = torch.nn.Identity
    elif row == "FSQ 8 x 8 x 8":
        modules.VectorQuantizer, modules.UnitRMS = FiniteScalar, torch.nn.Identity


def run(path, row, seconds, is_drawn):
    torch.set_num_threads(1)
    apply(row)
    data = harness.load(path)
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--mode", "vq_vae", *ROWS[row]]
        log = harness.train_for(seconds, data, Path(folder), argv, clock=time.process_time)
        model = harness.utils.load_model(folder, "vq_vae")
        pictures = ()
        if is_drawn:
            with torch.inference_mode():
                images, codes, _ = model(some_slices(data))
            colours = plots.code_colours(model.quantizer.codebook.detach().numpy())
            pictures = images[:, 0].clamp(0, 1).numpy(), colours[codes.numpy()]
        return row, pictures, {
            "updates": log[-1][1]["update"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "validate": log[-1][1]["validate"],
            "test": harness.test_figures(data, Path(folder)),
            "validation_ssim_over_seconds": [
                (round(t), round(e["validate"]["ssim"], 4)) for t, e in log
            ],
        }


def some_slices(data):
    return data["test"].batch(plots.picks(len(data["test"]), N_SHOWN))


def draw(shown, data, name):
    """figures/NAME.png: {title: images (N_SHOWN, H, W)}, in columns."""
    height, width = data.size
    figure, axes = plt.subplots(
        N_SHOWN, len(shown), figsize=(2 * len(shown), 2 * N_SHOWN * height / width + 0.6),
        layout="constrained",
    )  # fmt: skip
    for column, (title, images) in zip(axes.T, shown.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for axis, image in zip(column, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{data.name}: test slices", fontsize=9)
    figure.savefig(harness.ROOT / "figures" / f"{name}.png", dpi=100)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="phantom", help="folder of slices, as for train.py")
    p.add_argument("--seconds", type=float, default=120.0, help="of one core, per row")
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to run")
    p.add_argument("--out", default="ablation", help="name of the file of results")
    p.add_argument("--picture", metavar="NAME", help="draw what the rows make of slices")
    args = p.parse_args()
    data = harness.load(args.data)
    budget = {"data": data.name, "seconds_of_one_core": args.seconds}
    budget["demo"] = harness.train.PRESETS["demo"]["vq_vae"]  # rows are changes of it
    rows = harness.rows_so_far(args.out, budget)
    shown = {"slices": some_slices(data)[:, 0].numpy()}
    with ProcessPoolExecutor(mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        options = args.seconds, bool(args.picture)
        runs = [pool.submit(run, args.data, row, *options) for row in args.rows]
        for done in runs:
            row, pictures, figures = done.result()
            rows[row] = figures
            test = figures["test"]
            shown |= dict(zip((row, f"{row}:\n{test['used']} codes"), pictures, strict=False))
            print(
                f"{row:22s} {figures['updates']:5d} updates, SSIM {test['ssim']:.4f}, body "
                f"{test['ssim_body']:.4f}, PSNR {test['psnr']:.2f}, {test['used']} codes, "
                f"perplexity {test['perplexity']:.0f}", flush=True,
            )  # fmt: skip
            ordered = {name: rows[name] for name in ROWS if name in rows}
            harness.save(args.out, budget | {"rows": ordered})
    if args.picture:
        draw(shown, data, args.picture)


if __name__ == "__main__":
    main()

"""Stage 2 against the gated PixelCNN of 2016 as commonly ported, on the same codes.

    python benchmarks/prior.py --data DIR --run_dir RUN              # 10 minutes, a core for each
    python benchmarks/prior.py --data DIR --run_dir RUN --ablation   # 100 s of one core per row

RUN holds a trained stage 1 for DIR. The first trains both priors side by side, one core each, for
the same wall time, and scores the best weights of each on the test split; it needs two idle cores.
The second changes a choice of ours at a time (or several, joined by " + "), or adds what was tried
and is not part of the project, with the budget in processor seconds, a row per core; it prints bits
on the validation split, by which we chose, and on the test split. Writes
benchmarks/results/prior.json, or prior_ablation.json.
"""

import argparse
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness
import numpy as np
import temperature
import torch
import torch.nn.functional as F
from torch import nn

from modules import GatedPixelCNN, gate

ROWS = {
    "demo": [],
    "Adam alone": [],
    "no mirror": ["--mirror", "none"],
    "no summary": [],
    "row by row": ["--order", "rows"],
    "column by column": ["--order", "columns"],
    "no depth": [],
    "embeddings from nothing": [],
    "averaged weights": [],
    "no dropout": ["--dropout", "0"],
    "kernel 5": ["--kernel_size", "5"],
    "dilated by 1, 2, 4": [],
    "causal attention halfway": [],
    "normalised channels": [],
}


class ClassicLayer(nn.Module):
    """A gated layer as commonly ported: kernels cut to what they may see, residual on one stack."""

    def __init__(self, c, k, is_first, n_classes):
        super().__init__()
        self.k, self.is_first = k, is_first
        self.label = nn.Embedding(n_classes + 1, 2 * c)
        self.vertical = nn.Conv2d(c, 2 * c, (k // 2 + (not is_first), k))
        self.horizontal = nn.Conv2d(c, 2 * c, (1, k // 2 + (not is_first)))
        self.down = nn.Conv2d(2 * c, 2 * c, 1)
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, v, h, label):
        r, rows, columns = self.k // 2, v.shape[2], v.shape[3]
        label = self.label(label)[:, :, None, None]
        # the first layer must not see its own row (vertical) or its own code (horizontal)
        above = self.vertical(F.pad(v, (r, r, r, 0)))[:, :, :rows]
        left = self.horizontal(F.pad(h, (r, 0, 0, 0)))[:, :, :, :columns]
        out = self.out(gate(left + self.down(above) + label))
        return gate(above + label), out if self.is_first else out + h


class ClassicPrior(nn.Module):
    """15 layers of 64 channels, 7 x 7 then 3 x 3; classes, but no place in the volume."""

    def __init__(self, config):
        super().__init__()
        c, self.config = 64, config
        self.embedding = nn.Embedding(config.n_embeddings, c)
        self.layers = nn.ModuleList(
            ClassicLayer(c, 3 if i else 7, not i, config.n_classes) for i in range(15)
        )
        self.head = nn.Sequential(
            nn.Conv2d(c, 512, 1), nn.ReLU(), nn.Conv2d(512, config.n_embeddings, 1)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def start_from(self, codebook):
        """The classic one begins with embeddings that know nothing of the codes."""

    def forward(self, codes, label=None, depth=None):
        if label is None:
            label = torch.full((len(codes),), -1, device=codes.device)
        label = label % self.layers[0].label.num_embeddings  # -1, any, is the last
        v = h = self.embedding(codes).permute(0, 3, 1, 2)
        for layer in self.layers:
            v, h = layer(v, h, label)
        return self.head(h)


class Dilated(GatedPixelCNN):
    """Kernels spread out by 1, 2, 4, 1, 2, 4, ..., to see further."""

    def __init__(self, config):
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            d = 2 ** (i % 3)
            layer.reach *= d
            layer.vertical.dilation = layer.horizontal.dilation = (d, d)


class Attention(nn.Module):
    """Each place looks at all before it, as in PixelSNAIL (Chen et al. 2018), with 4 heads."""

    def __init__(self, config):
        super().__init__()
        c = config.n_channels
        self.place = nn.Parameter(0.02 * torch.randn(2 * c, *config.lines))
        self.queries_keys_values, self.out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h):
        x = self.queries_keys_values(h)
        x = x + F.pad(self.place, (0, 0, 0, 0, 0, h.shape[1]))
        parts = x.unflatten(1, (3, 4, -1)).flatten(4).transpose(3, 4).unbind(1)
        y = F.scaled_dot_product_attention(*parts, is_causal=True)  # (B, 4, h w, C / 4)
        return h + self.out(y.transpose(2, 3).reshape(h.shape))


class Attending(GatedPixelCNN):
    def __init__(self, config):
        super().__init__(config)
        half = config.n_layers // 2
        self.attention = Attention(config)
        self.layers[half].register_forward_hook(
            lambda layer, args, out: (out[0], self.attention(out[1]))
        )


class Normalised(GatedPixelCNN):
    """What each layer reads has, at each place, a root mean square of 1 over its channels."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            for conv in (layer.vertical, layer.horizontal):
                conv.register_forward_pre_hook(lambda conv, args: F.rms_norm(
                    args[0].permute(0, 2, 3, 1), args[0].shape[1:2]
                ).permute(0, 3, 1, 2))  # fmt: skip


VARIANTS = {
    "dilated by 1, 2, 4": Dilated,
    "causal attention halfway": Attending,
    "normalised channels": Normalised,
}
UNDRAWN = {*VARIANTS, "no depth"}


def apply(row):
    """Change what the row's name says; returns the network to train, and flags."""
    train, original = harness.train, harness.train.GatedPixelCNN.forward
    changes, flags = row.split(" + "), []
    for change in changes:
        flags += ROWS[change]
        if change == "averaged weights":
            train.PRESETS["demo"]["pixelcnn"]["train"]["average"] = 0.99
        elif change == "Adam alone":
            train.PRESETS["demo"]["pixelcnn"]["train"]["optimizer"] = "adam"
        elif change == "no summary":
            train.PRESETS["demo"]["pixelcnn"]["model"]["summary"] = False
        elif change == "embeddings from nothing":
            train.GatedPixelCNN.start_from = ClassicPrior.start_from
        elif change == "no depth":
            train.GatedPixelCNN.forward = lambda self, codes, label, depth: original(
                self, codes, label, None
            )
    kinds = tuple(VARIANTS[change] for change in changes if change in VARIANTS)
    if kinds:
        train.GatedPixelCNN = type(row, kinds, {})
    return train.GatedPixelCNN, flags


def bits(data, run_dir, kind):
    """Bits per code over the test split, of the best weights of a trained stage 2."""
    harness.utils.STAGES["pixelcnn"] = (harness.train.PixelCNNConfig, kind)
    model = harness.utils.load_model(run_dir, "pixelcnn")
    device = torch.device("cpu")
    vq_vae = harness.utils.load_model(run_dir, "vq_vae")
    codes = torch.from_numpy(harness.metrics.split_codes(run_dir, data, "test", vq_vae, device))
    split = data["test"]
    given = torch.from_numpy(split.labels), torch.from_numpy(split.positions)
    every = harness.metrics.code_bits(model, codes, *given, device)
    parameters = sum(p.numel() for p in model.parameters())
    return {"bits_per_code": float(every.mean(dtype="float64")), "parameters": parameters}


def drawn(data, run_dir, kind, n, settings):
    """Figures of n samples, drawn with `settings`, against the validation split; and of the same
    number of real slices, and of their reconstructions."""
    harness.utils.STAGES["pixelcnn"] = (harness.train.PixelCNNConfig, kind)
    vq_vae, prior = (harness.utils.load_model(run_dir, s) for s in harness.utils.STAGES)
    metrics, device, rng = harness.metrics, torch.device("cpu"), np.random.default_rng(0)
    real, held = (
        data[s].batch(np.sort(rng.choice(len(data[s]), n, replace=False)))[:, 0].numpy()
        for s in ("train", "validate")
    )
    made = temperature.draw(vq_vae, prior, data["train"].positions, n, **settings)
    of_held = metrics.features(vq_vae, held, device)
    is_turned = harness.train.evener_axis(data["train"]) == "columns"
    sets = {"samples": made, "real": real, "reconstructed": metrics.through(vq_vae, real, device)}
    apart, steps, light, rows = {}, {}, {}, {}
    for name, images in sets.items():
        bodies = [metrics.body_mask(image) for image in images]
        light[name] = [x[body].mean() for x, body in zip(images, bodies, strict=True) if body.any()]
        upright = [image.T if is_turned else image for image in images]
        apart[name] = [temperature.halves_differ(image) for image in upright]
        steps[name] = np.array([temperature.outline_step(image) for image in upright])
    largest = np.quantile(steps["reconstructed"], 0.99)
    for name, images in sets.items():
        features = metrics.features(vq_vae, images, device)
        precision, recall = metrics.precision_recall(of_held, features)
        rows[name] = {
            "halves_differ": float(np.mean(apart[name])),
            "standard_error": float(np.std(apart[name]) / n**0.5),
            "outline_breaks": float((steps[name] > largest).mean()),
            "spread_of_brightness": float(np.std(light[name])),
            "frechet": float(metrics.frechet_distance(features, of_held)),
            "precision": float(precision),
            "recall": float(recall),
        }
    return rows


def prepare(data, run_dir, folder):
    """A run in `folder` that starts from the stage 1 of `run_dir`, with the codes of `data`."""
    shutil.copytree(Path(run_dir) / "vq_vae", folder / "vq_vae")
    vq_vae = harness.utils.load_model(run_dir, "vq_vae")
    for name in harness.dataset.SPLITS:
        harness.metrics.split_codes(folder, data, name, vq_vae, torch.device("cpu"))
    return folder


def run(path, base, name, minutes):
    torch.set_num_threads(1)
    data, train = harness.load(path), harness.train
    preset, kind = {
        "classic": ("classic", ClassicPrior), "ours": ("demo", train.GatedPixelCNN)
    }[name]  # fmt: skip
    train.GatedPixelCNN = kind
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        shutil.copytree(base, run_dir)
        argv = ["--mode", "pixelcnn", "--preset", preset]
        log = harness.train_for(60 * minutes, data, run_dir, argv, scheduled=name == "ours")
        curve = [
            (round(t, 1), e["update"], *(e[k]["bits_per_code"] for k in ("train", "validate")))
            for t, e in log
        ]
        row = {"seconds": curve[-1][0], "updates": curve[-1][1]}
        return row | {"test": bits(data, run_dir, kind), "curve": curve}


def race(data, path, base, minutes):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = {name: pool.submit(run, path, base, name, minutes) for name in ("classic", "ours")}
    rows = {name: future.result() for name, future in runs.items()}
    for name, row in rows.items():
        print(f"{name:8s} {row | {'curve': None}}")
    classic, ours = (rows[name]["test"]["bits_per_code"] for name in ("classic", "ours"))
    print(f"{100 * (1 - ours / classic):.1f} % fewer bits per code")
    result = {"data": data.name, "minutes": minutes, "threads": 1, "rows": rows}
    result["fewer_bits"] = 1 - ours / classic
    harness.save("prior", result)


def run_row(path, base, row, seconds, n_drawn, settings, keep):
    torch.set_num_threads(1)
    kind, flags = apply(row)
    data = harness.load(path)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        shutil.copytree(base, run_dir)
        argv = ["--mode", "pixelcnn", *flags]
        log = harness.train_for(seconds, data, run_dir, argv, clock=time.process_time)
        validate = min(entry["validate"]["bits_per_code"] for _, entry in log)
        figures = {"updates": log[-1][1]["update"], "validate_bits_per_code": validate}
        figures |= bits(data, run_dir, kind)
        if n_drawn:
            whole = harness.dataset.load(path, progress=False)
            figures["drawn"] = drawn(whole, run_dir, kind, n_drawn, settings)
        if keep:
            shutil.copytree(run_dir, Path(keep) / row.replace(" ", "_"), dirs_exist_ok=True)
        return row, figures


def ablation(data, base, args):
    seconds, out = args.seconds, args.out
    settings = {"temperature": args.temperature, "guidance": args.guidance}
    budget = {"data": data.name, "seconds_of_one_core": seconds}
    if args.draw:
        budget |= {"drawn": args.draw, **settings}
    budget["demo"] = harness.train.PRESETS["demo"]["pixelcnn"]  # rows are changes of it
    rows = harness.rows_so_far(out, budget)
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        of_all = seconds, args.draw, settings, args.keep
        for done in [pool.submit(run_row, args.data, base, row, *of_all) for row in args.rows]:
            row, rows[row] = done.result()
            print(f"{row:24s} {rows[row]}", flush=True)
            ordered = {name: rows[name] for name in [*ROWS, *rows] if name in rows}
            harness.save(out, budget | {"rows": ordered})


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="phantom", help="folder of slices, as for train.py")
    p.add_argument("--run_dir", required=True, help="run whose stage 1 makes the codes")
    p.add_argument("--minutes", type=float, default=10.0, help="of training, each")
    p.add_argument("--ablation", action="store_true", help="one choice of ours at a time")
    p.add_argument("--seconds", type=float, default=100.0, help="of one core, per row")
    text = "samples to draw of each row, and to measure"
    p.add_argument("--draw", type=int, default=0, metavar="N", help=text)
    for name, value in zip(("temperature", "guidance"), temperature.DEFAULT, strict=True):
        p.add_argument(f"--{name}", type=float, default=value, metavar="X", help="of --draw")
    p.add_argument("--keep", metavar="DIR", help="folder for the trained runs, one for each row")
    text = "rows to run (default: all but the orders); several changes are joined by ' + '"
    default = [row for row in ROWS if "--order" not in ROWS[row]]
    p.add_argument("--rows", nargs="+", default=default, help=text)
    p.add_argument("--out", default="prior_ablation", help="name of the file of results")
    args = p.parse_args()
    if unknown := {c for row in args.rows for c in row.split(" + ")} - set(ROWS):
        p.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if args.draw and (strange := {c for row in args.rows for c in row.split(" + ")} & UNDRAWN):
        p.error(f"--draw: the cached sampler does not know {', '.join(sorted(strange))}")
    data = harness.load(args.data)
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(data, args.run_dir, Path(folder))
        if args.ablation:
            ablation(data, base, args)
        else:
            race(data, args.data, base, args.minutes)


if __name__ == "__main__":
    main()

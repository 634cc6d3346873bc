"""The README's figures: some drawn from the networks themselves, the others those of a run.

    python benchmarks/figures.py --run_dir runs/demo

figures/overview.png shows test slices, their codes and reconstructions, and samples,
figures/architecture.png the layers of a run's networks with the shapes that pass through them,
figures/receptive_field.png which codes a logit of its prior depends on, figures/curves.png how its
training went, figures/house.png which file imports which. The rest are what predict.py drew.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from demo import copy_small
from matplotlib.patches import FancyBboxPatch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dataset  # noqa: E402
import plots  # noqa: E402
import utils  # noqa: E402

COPIED = ["completions", "reconstructions", "surprise"]


@torch.no_grad()
def overview(vq_vae, data, run_dir, path, n=2):
    x = data["test"].batch(plots.picks(len(data["test"]), n))
    codes = vq_vae.encode(x)
    colours = plots.code_colours(vq_vae.quantizer.codebook.numpy())
    samples = sorted((run_dir / "predict" / "samples").glob("*.png"))[:n]
    of_whom = "phantom slices" if data.is_phantom else "slices"
    groups = [
        (f"{of_whom} of the test split", x[:, 0]),
        ("their codes", colours[codes.numpy()]),
        ("reconstructed from the codes", vq_vae.decode(codes)[:, 0].clamp(0, 1)),
        ("drawn from the prior", [plt.imread(file) for file in samples]),
    ]
    height = 2.6 * data.size[0] / data.size[1] / n + 0.4
    figure = plt.figure(figsize=(4 * 2.6, height), layout="constrained")
    for part, (title, images) in zip(figure.subfigures(1, 4), groups, strict=True):
        part.suptitle(title, fontsize=10)
        for axis, image in zip(part.subplots(1, n), images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def passed(layers, x):
    """[(what a layer does, shape of its output), ...], each shape as C x H x W."""
    rows = []
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            text = "conv {} x {}".format(*layer.kernel_size)
            text += f", stride {layer.stride[0]}" if layer.stride[0] > 1 else ""
        elif isinstance(layer, nn.PixelUnshuffle):
            text = f"fold {layer.downscale_factor} x {layer.downscale_factor}\npixels"
        elif isinstance(layer, nn.PixelShuffle):
            text = f"unfold {layer.upscale_factor} x {layer.upscale_factor}"
        elif isinstance(layer, nn.Sequential):
            text = f"{len(layer)} residual\nblocks"
        else:
            text = {"UnitRMS": "unit RMS"}.get(type(layer).__name__)
        if text:
            rows.append((text, " x ".join(map(str, x.shape[1:]))))
    return rows, x


def draw_row(axis, y, boxes, colour):
    """Boxes from left to right, an arrow before each but the first."""
    for i, (text, shape) in enumerate(boxes):
        patch = FancyBboxPatch((i, y), 0.8, 0.62, "round,pad=0.03", fc=colour, ec="0.3")
        axis.add_patch(patch)
        axis.text(i + 0.4, y + 0.42, text.replace(", ", ",\n"), ha="center", va="center", size=7)
        axis.text(i + 0.4, y + 0.12, shape, ha="center", va="center", size=6.5, color="0.25")
        if i:
            ends = (i - 0.04, y + 0.31), (i - 0.16, y + 0.31)
            axis.annotate("", *ends, arrowprops={"arrowstyle": "->"})


@torch.no_grad()
def architecture(vq_vae, prior, size, path):
    image = torch.zeros(1, 1, *size)
    encoder, z = passed(vq_vae.encoder, image)
    z_q, codes, _ = vq_vae.quantizer(z)
    decoder, _ = passed(vq_vae.decoder, z_q)
    k, c = prior.config.kernel_size, prior.config.n_channels
    n_layers = prior.config.n_layers
    grid, lines = (" x ".join(map(str, n)) for n in (prior.config.size, prior.config.lines))
    first = "embeddings\nof the codes" + ("" if grid == lines else ",\nturned")
    summary = "\n+ summary" if prior.summary else ""
    mirror = " + mirror" if prior.mirror else ""
    rows = [
        ("encoder", [("slice", f"1 x {size[0]} x {size[1]}"), *encoder], "#cfe3f5"),
        ("vector quantiser", [
            (f"nearest of\n{vq_vae.config.n_embeddings} vectors", f"{z.shape[1]} x {grid}"),
            ("codes", grid),
        ], "#f7e3b5"),
        ("decoder", [("vectors of\nthe codes", f"{z.shape[1]} x {grid}"), *decoder], "#d5efd2"),
        ("prior, vertical", [
            (first, f"{c} x {lines}"),
            (f"a line before,\n+ atlas{summary}", f"{c} x {lines}"),
            (f"{n_layers} x: {k // 2 + 1} x {k}\nconv, gate", f"{c} x {lines}"),
        ], "#ecd6ee"),
        ("prior, horizontal", [
            (first, f"{c} x {lines}"),
            (f"a code before,\n+ atlas{mirror}{summary}", f"{c} x {lines}"),
            (f"{n_layers} x: 1 x {k // 2 + 1} conv,\n+ vertical, gate", f"{c} x {lines}"),
            ("2 conv 1 x 1", f"{prior.config.n_embeddings} x {lines}"),
            ("p(code | codes\nbefore it)", f"{prior.config.n_embeddings} x {grid}"),
        ], "#ecd6ee"),
    ]  # fmt: skip
    width = max(len(boxes) for _, boxes, _ in rows)
    figure, axis = plt.subplots(figsize=(1.05 * width + 1.4, 5.4), layout="constrained")
    for i, (name, boxes, colour) in enumerate(rows):
        y = len(rows) - 1 - i
        axis.text(-0.12, y + 0.31, name, ha="right", va="center", size=9, weight="bold")
        draw_row(axis, y, boxes, colour)
    # each layer of the horizontal stack takes in what the vertical one found
    axis.annotate("", (2.4, 0.68), (2.4, 0.95), arrowprops={"arrowstyle": "->"})
    axis.set(xlim=(-1.5, width), ylim=(-0.15, len(rows) - 0.2))
    axis.set_axis_off()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def masked_stack(n_layers, size):
    """The single stack of masked 3 x 3 convolutions whose blind spot [2] mends."""
    layers = []
    for i in range(n_layers):
        conv = nn.Conv2d(1 if i == 0 else 8, 8, 3, padding=1)
        mask = torch.ones(3, 3)
        mask[1, 1 + (i > 0) :] = 0
        mask[2] = 0
        conv.weight.data *= mask
        layers += [conv, nn.Tanh()]
    x = torch.randn(1, 1, *size, requires_grad=True)
    return nn.Sequential(*layers)(x), x


def seen(y, x, place):
    """Size of the gradient of y at a place with respect to each place of x: the shape of x."""
    y[0, :, place[0], place[1]].square().sum().backward()
    return x.grad.abs().sum(1)[0]


def receptive_field(prior, codes, title, path):
    """Gradients of the logits at one place, mean over slices; codes: (N, h, w) of real ones."""
    h, w = prior.config.size
    place = (2 * h // 3, 2 * w // 3)
    is_turned = prior.config.order == "columns"
    kept = []

    def keep(module, args, output):
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = prior.embedding.register_forward_hook(keep)
    logits = prior(codes)
    handle.remove()
    logits[:, :, place[0], place[1]].square().sum().backward()
    ours = kept[0].grad.abs().sum(3).mean(0)  # in lines, as drawn
    torch.manual_seed(0)
    stack = masked_stack(prior.config.n_layers, prior.config.lines)
    theirs = seen(*stack, place[::-1] if is_turned else place)
    ours, theirs = (x.T if is_turned else x for x in (ours, theirs))
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 5), layout="constrained")
    titles = (f"{prior.config.n_layers} masked 3 x 3, untrained", "this prior, trained")
    for axis, gradient, text in zip(axes, (theirs, ours), titles, strict=True):
        shown = (gradient > 0) * (gradient / gradient.max()).clamp(min=1e-6).log10()
        shown = torch.where(gradient > 0, shown, torch.nan)
        image = axis.imshow(shown, cmap="viridis", vmin=-4, vmax=0)
        axis.set_facecolor("0.85")
        axis.plot(place[1], place[0], "r+", markersize=10)
        axis.set(title=text, xlabel="column of codes", ylabel="row of codes")
    figure.suptitle(title)
    figure.colorbar(image, ax=axes, label="gradient of the logits at +, log10 of its share")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def curves(run_dir, path):
    """The figures that say how both stages went, out of their logs."""
    config = utils.load_config(run_dir, "vq_vae")
    logs = {stage: (run_dir / stage / "log.jsonl").read_text() for stage in utils.STAGES}
    logs = {stage: [json.loads(line) for line in text.splitlines()] for stage, text in logs.items()}
    shown = [("vq_vae", "ssim"), ("vq_vae", "perplexity"), ("pixelcnn", "bits_per_code")]
    figure, axes = plt.subplots(1, len(shown), figsize=(10, 2.8), layout="constrained")
    for axis, (stage, name) in zip(axes, shown, strict=True):
        for part in ("train", "validate"):
            if name in logs[stage][0][part]:
                points = [(entry["update"], entry[part][name]) for entry in logs[stage]]
                axis.plot(*zip(*points, strict=True), ".-", label=part)
        axis.set(xlabel=f"update of {stage}", title=plots.TITLES[name])
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle(utils.data_name(config))
    figure.savefig(path, dpi=110)
    plt.close(figure)


HOUSE = {  # where each file stands, and what it is for
    "train": (0.5, 4, "learns a stage"), "predict": (2.5, 4, "scores, draws, reports"),
    "dataset": (0.5, 3, "what a slice is"), "metrics": (2.5, 3, "how good it is"),
    "phantom": (-0.1, 2, "the built-in pelvis"), "plots": (1.2, 2, "every figure, the page"),
    "utils": (1.8, 1, "runs, devices, SSIM"), "modules": (1.8, 0, "the networks of both papers"),
}  # fmt: skip


def imports():
    """{file: those of ours that it imports, but for what these import themselves}."""
    found = {}
    for name in HOUSE:
        names = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        found[name] = names & HOUSE.keys()

    def reached(name):
        return found[name].union(*map(reached, found[name]))

    return {name: of - set().union(*map(reached, of)) for name, of in found.items()}


def house(path):
    """The files, and which imports which."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    of_each = imports()
    for name, (x, y, text) in HOUSE.items():
        box = {"boxstyle": "round", "facecolor": "#e8eef5", "edgecolor": "0.5"}
        axis.text(x, y, f"{name}.py\n{text}", ha="center", va="center", size=9, bbox=box)
        for other in of_each[name]:
            to = HOUSE[other]
            axis.annotate("", (to[0], to[1] + 0.3), (x, y - 0.3), arrowprops={"arrowstyle": "->"})
    axis.set(xlim=(-0.7, 3.2), ylim=(-0.4, 4.4))
    axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="a run after predict.py")
    args = p.parse_args()
    figures = ROOT / "figures"
    vq_vae, prior = (utils.load_model(args.run_dir, stage) for stage in utils.STAGES)
    arguments = utils.load_config(args.run_dir, "vq_vae")["data"]["arguments"]
    data = dataset.load(**({"data": "phantom"} | arguments))
    overview(vq_vae, data, args.run_dir, figures / "overview.png")
    architecture(vq_vae, prior, data.size, figures / "architecture.png")
    codes = vq_vae.encode(data["test"].batch(plots.picks(len(data["test"]), 32)))
    title = utils.data_name(utils.load_config(args.run_dir, "vq_vae"))
    receptive_field(prior, codes, title, figures / "receptive_field.png")
    curves(args.run_dir, figures / "curves.png")
    house(figures / "house.png")
    for name in COPIED:
        copy_small(args.run_dir / "predict" / f"{name}.png", figures / f"{name}.png")


if __name__ == "__main__":
    main()

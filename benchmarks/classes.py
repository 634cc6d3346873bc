"""What a prior draws for each class, and what guidance without its limit does to it.

    python benchmarks/classes.py --run_dir RUN

For each class of a run, samples at one place in the volume, beside the training slices of that
class from around that place. What is counted is the share of the middle of a slice (half its
height, half its width) darker than a quarter of the range: in the brain set, the ventricles mostly;
and the share of slices with a patch of light where nearly all training slices have air.
Writes benchmarks/results/classes.json and figures/classes.png.
"""

import argparse
import math
from pathlib import Path

import harness
import matplotlib.pyplot as plt
import numpy as np
import temperature
import torch

N, SHOWN, PLACE, AROUND = 32, 8, 0.4, 0.1
LIMIT = harness.train.GatedPixelCNN.MOST_TOLD
SETTINGS = {  # guidance, and what it may see at most in favour of a code
    "guidance 0": (0, LIMIT),
    "guidance 1": (1, LIMIT),
    "guidance 2": (2, LIMIT),
    "guidance 1, no limit": (1, math.inf),
}


def dark_share(images):
    """(N, H, W) -> mean share of dark pixels in the middle of the slices."""
    h, w = images.shape[1:]
    middle = images[:, h // 4 : h - h // 4, w // 4 : w - w // 4]
    return float((middle < 0.25).mean())


def air_of(split):
    """(H, W), where fewer than one slice in a thousand is brighter than a tenth of the range."""
    some = split.batch(np.arange(0, len(split), max(1, len(split) // 1000)))[:, 0].numpy()
    return np.quantile(some, 0.999, axis=0) < 0.1


def with_patches(images, air):
    """Share of images (N, H, W) with over 20 pixels brighter than a fifth of the range in air."""
    return float((((images > 0.2) & air).sum((1, 2)) > 20).mean())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, required=True, help="with both stages and classes")
    args = p.parse_args()
    config = harness.utils.load_config(args.run_dir, "vq_vae")
    data = harness.dataset.load(**config["data"]["arguments"])
    vq_vae, prior = (harness.utils.load_model(args.run_dir, s) for s in harness.utils.STAGES)
    train, rows, shown = data["train"], {}, {}
    air, patches = air_of(train), {name: [] for name in SETTINGS}
    for k, name in enumerate(data.classes):
        near = (train.labels == k) & (abs(train.positions - PLACE) < AROUND)
        row = {"real_slices": int(near.sum())}
        row["real"] = dark_share(train.batch(np.flatnonzero(near))[:, 0].numpy())
        for setting, (guidance, limit) in SETTINGS.items():
            prior.MOST_TOLD = limit
            codes = prior.sample(
                N, label=k, depth=PLACE, temperature=temperature.DEFAULT[0], guidance=guidance,
                generator=[harness.utils.generator(0, i) for i in range(N)],
            )  # fmt: skip
            with torch.inference_mode():
                images = vq_vae.decode(codes).clamp(0, 1)[:, 0].numpy()
            row[setting] = dark_share(images)
            patches[setting].append(with_patches(images, air))
            if guidance == 1 and (limit == LIMIT or k == 0):
                shown[f"{name}\n{setting}".replace(", ", ",\n")] = images[:SHOWN]
        rows[name] = row
        print(name, row, flush=True)
    patches = {name: float(np.mean(shares)) for name, shares in patches.items()}
    patches["real"] = with_patches(data["test"].batch(range(len(data["test"])))[:, 0].numpy(), air)
    print("patches in the air", patches)
    result = {"data": data.name, "n": N, "position": PLACE, "patches_in_air": patches}
    harness.save("classes", result | {"rows": rows})

    height = len(shown) * data.size[0] / data.size[1]
    figure, axes = plt.subplots(
        len(shown), SHOWN, figsize=(SHOWN, height + 0.4), layout="constrained"
    )
    for axis_row, (label, images) in zip(axes, shown.items(), strict=True):
        for axis, image in zip(axis_row, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axis_row[0].set_ylabel(label, fontsize=7)
    name = harness.utils.data_name(config)
    figure.suptitle(f"{name}: generated slices at position {PLACE:g}", fontsize=10)
    figure.savefig(harness.ROOT / "figures" / "classes.png", dpi=110)


if __name__ == "__main__":
    main()

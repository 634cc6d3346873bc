"""What a prior draws for each class, and what too much guidance does to it.

    python benchmarks/classes.py --run_dir RUN

For each class of a run, samples at one place in the volume, beside the training slices of that
class from around that place. What is counted is the share of the middle of a slice (half its
height, half its width) darker than a quarter of the range: in the brain set, the ventricles mostly.
Writes benchmarks/results/classes.json and figures/classes.png.
"""

import argparse
from pathlib import Path

import harness
import matplotlib.pyplot as plt
import numpy as np
import temperature
import torch

N, SHOWN, PLACE, AROUND = 32, 8, 0.4, 0.1
GUIDANCE = [0.0, 0.5, 2.0]


def dark_share(images):
    """(N, H, W) -> mean share of dark pixels in the middle of the slices."""
    h, w = images.shape[1:]
    middle = images[:, h // 4 : h - h // 4, w // 4 : w - w // 4]
    return float((middle < 0.25).mean())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, required=True, help="with both stages and classes")
    args = p.parse_args()
    config = harness.utils.load_config(args.run_dir, "vq_vae")
    data = harness.dataset.load(**config["data"]["arguments"])
    vq_vae, prior = (harness.utils.load_model(args.run_dir, s) for s in harness.utils.STAGES)
    train, rows, shown = data["train"], {}, {}
    for k, name in enumerate(data.classes):
        near = (train.labels == k) & (abs(train.positions - PLACE) < AROUND)
        row = {"real_slices": int(near.sum())}
        row["real"] = dark_share(train.batch(np.flatnonzero(near))[:, 0].numpy())
        for guidance in GUIDANCE:
            codes = prior.sample(
                N, label=k, depth=PLACE, temperature=temperature.DEFAULT[0], guidance=guidance,
                generator=[harness.utils.generator(0, i) for i in range(N)],
            )  # fmt: skip
            with torch.inference_mode():
                images = vq_vae.decode(codes).clamp(0, 1)[:, 0].numpy()
            row[f"guidance {guidance:g}"] = dark_share(images)
            if guidance == GUIDANCE[0] or k == 0:
                shown[f"{name}\nguidance {guidance:g}"] = images[:SHOWN]
        rows[name] = row
        print(name, row, flush=True)
    harness.save("classes", {"data": data.name, "n": N, "position": PLACE, "rows": rows})

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

"""What a prior draws for each class.

    python benchmarks/classes.py --run_dir RUN

For each class of a run, samples at one place in the volume, beside the training slices of that
class from around that place. What is counted is the share of the middle of a slice (half its
height, half its width) darker than a quarter of the range: in the brain set, the ventricles mostly.
Writes benchmarks/results/classes.json and figures/classes.png.
"""

import argparse
from pathlib import Path

import harness
import numpy as np
import temperature
import torch

N, SHOWN, PLACE, AROUND = 32, 8, 0.4, 0.1
GUIDANCE = [0, 0.5, 1, 2]


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
            row[f"guidance {guidance}"] = dark_share(images)
            if guidance == temperature.DEFAULT[1]:
                shown[name] = images[:SHOWN]
        rows[name] = row
        print(name, row, flush=True)
    result = {"data": data.name, "n": N, "position": PLACE, "temperature": temperature.DEFAULT[0]}
    harness.save("classes", result | {"rows": rows})

    name = harness.utils.data_name(config)
    temperature.picture(shown, f"{name}: generated slices at position {PLACE:g}", "classes")


if __name__ == "__main__":
    main()

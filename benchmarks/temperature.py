"""What temperature and guidance do to samples: figures of merit, and pictures.

    python benchmarks/temperature.py --run_dir runs/demo

Judges 128 samples per setting against the validation split, as predict.py does against the test
split, beside real training slices and their reconstructions. The same random numbers serve every
setting. Also measured is how much the halves of a slice differ along its first axis, which runs
from left to right in the phantom and in HipMRI's slices. Writes benchmarks/results/temperature.json
and figures/temperature.png, and the slices whose halves differ most as figures/halves.png.
"""

import argparse
from pathlib import Path

import harness
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

import predict

N, SHOWN = 128, 8
SETTINGS = [(0.75, 0), (0.9, 0), (1, 0), (0.75, 0.5), (0.85, 0.5), (0.9, 0.5), (0.6, 1), (0.75, 1)]
DEFAULT = tuple(predict.parser().get_default(name) for name in ("temperature", "guidance"))
SETTINGS += [DEFAULT] * (DEFAULT not in SETTINGS)
PICTURED = [DEFAULT, (0.75, 1), (0.75, 0), (1, 0)]


def named(temperature, guidance):
    return f"temperature {temperature:g}, guidance {guidance:g}"


def draw(vq_vae, prior, depths, n=N, **settings):
    generators = [harness.utils.generator(0, i) for i in range(n)]
    picks = [torch.randint(len(depths), (), generator=g).item() for g in generators]
    codes = prior.sample(n, generator=generators, depth=depths[picks], **settings)
    with torch.inference_mode():
        return vq_vae.decode(codes).clamp(0, 1)[:, 0].numpy()


def halves_differ(image):
    """Mean difference between a blurred slice (H, W) and its mirror image, relative to its mean.

    The least over small shifts, since a body need not lie in the middle.
    """
    small = gaussian_filter(image, 6)[::4, ::4]
    shifted = (np.roll(small[::-1], shift, axis=0) for shift in range(-4, 5))
    return min(float(np.abs(small - mirrored).mean()) for mirrored in shifted) / small.mean()


def outline_step(image):
    """The largest step, in rows, of the body's upper or lower edge between columns 6 apart."""
    body = harness.metrics.body_mask(image)
    body = body[:, body.any(0)]
    if body.shape[1] <= 6:
        return 0
    edges = np.stack([body.argmax(0), body[::-1].argmax(0)])
    return int(np.abs(edges[:, 6:] - edges[:, :-6]).max())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, default=Path("runs/demo"), help="with both stages")
    args = p.parse_args()
    metrics, device = harness.metrics, torch.device("cpu")
    config = harness.utils.load_config(args.run_dir, "vq_vae")
    data = harness.dataset.load(**({"data": "phantom"} | config["data"]["arguments"]))
    vq_vae, prior = (harness.utils.load_model(args.run_dir, s) for s in harness.utils.STAGES)
    rng, validate = np.random.default_rng(0), data["validate"]
    parts = data["train"], validate
    which = [np.sort(rng.choice(len(part), N, replace=False)) for part in parts]
    both = list(zip(parts, which, strict=True))
    train, held = (part.batch(some)[:, 0].numpy() for part, some in both)
    patients = [[part.patients[i] for i in some] for part, some in both]
    coded = metrics.through(vq_vae, held, device)
    sets = {"real": train, "reconstructed": metrics.through(vq_vae, train, device)}
    for t, w in SETTINGS:
        positions = data["train"].positions
        sets[named(t, w)] = draw(vq_vae, prior, positions, temperature=t, guidance=w)
    of_held, rows = metrics.features(vq_vae, held, device), {}
    for name, images in sets.items():
        features = metrics.features(vq_vae, images, device)
        precision, recall = metrics.precision_recall(of_held, features)
        rows[name] = {
            "best_match_ssim": float(metrics.nearest(images, validate)[1].mean()),
            "pairwise_ssim": metrics.pairwise_ssim(images),
            "frechet": metrics.frechet_distance(features, of_held),
            "wasserstein": metrics.sliced_wasserstein(images, held),
            "precision": precision,
            "recall": recall,
            "halves_differ": float(np.mean([halves_differ(image) for image in images])),
        }
        if name != "real":  # which has no blur, and is told by that
            groups = patients[0] if name == "reconstructed" else None
            rows[name]["told"], _ = metrics.two_sample_accuracy(images, coded, patients[1], groups)
        print(f"{name:16s} {rows[name]}", flush=True)
    harness.save("temperature", {"data": data.name, "n": N, "rows": rows})

    name = harness.utils.data_name(config)
    shown = {named(*setting): sets[named(*setting)][:SHOWN] for setting in PICTURED}
    picture(shown, f"{name}: the same draws in several settings", "temperature")
    shown = {"samples": least_even(sets[named(*DEFAULT)]), "real": least_even(train)}
    picture(shown, f"{name}: of {N} each, those whose halves differ most", "halves")


def least_even(images):
    return images[np.argsort([-halves_differ(image) for image in images])[:SHOWN]]


def picture(rows, title, name):
    """figures/NAME.png: {name of a row: images (SHOWN, H, W)}."""
    height = len(rows) * next(iter(rows.values())).shape[1] / next(iter(rows.values())).shape[2]
    figure, axes = plt.subplots(len(rows), SHOWN, figsize=(SHOWN, height + 0.4),
                                layout="constrained")  # fmt: skip
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label.replace(", ", ",\n"), fontsize=8)
    figure.suptitle(title)
    figure.savefig(harness.ROOT / "figures" / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()

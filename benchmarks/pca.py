"""The linear baseline: principal components of the training slices, at as many bits as the codes.

    python benchmarks/pca.py --data DIR

Test slices are written in the components of (some) training slices, every coefficient rounded to
the same step, which spends most bits where the variance is. The step is the finest for which the
rounded coefficients take no more bits than the codes of the preset `demo`, by an ideal coder that
knows how often each value occurs in training. Writes benchmarks/results/pca.json.
"""

import argparse
import math

import harness
import numpy as np

N_FITTED = 2000  # training slices


def entropy(values):
    """Bits per number of each column of whole numbers (N, M), summed over the columns."""
    total = 0.0
    for column in values.T.astype(int):
        p = np.bincount(column - column.min()) / len(column)
        total -= (p[p > 0] * np.log2(p[p > 0])).sum()
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="phantom", help="folder of slices, as for train.py")
    args = p.parse_args()
    data = harness.load(args.data)
    model = harness.train.PRESETS["demo"]["vq_vae"]["model"]
    h, w = (n // model["downsample"] for n in data.size)
    bits = h * w * math.log2(model["n_embeddings"])

    n = len(data["train"])
    some = np.random.default_rng(0).permutation(n)[:N_FITTED]
    x = data["train"].batch(np.sort(some)).flatten(1).numpy()
    mean = x.mean(0)
    x -= mean
    values, vectors = np.linalg.eigh(x @ x.T)
    kept = values > 1e-6 * values[-1]
    components = (vectors[:, kept] / np.sqrt(values[kept])).T @ x  # orthonormal rows
    of_train = x @ components.T
    low, high = 1e-3, 1e2
    for _ in range(30):
        step = math.sqrt(low * high)
        low, high = (low, step) if entropy(np.round(of_train / step)) <= bits else (step, high)

    rows = []
    for image in data["test"].batch(np.arange(len(data["test"])))[:, 0].numpy():
        rounded = np.round((image.ravel() - mean) @ components.T / high) * high
        again = (rounded @ components + mean).reshape(image.shape).clip(0, 1).astype(np.float32)
        rows.append(harness.metrics.slice_scores(image, again))
    test = {name: round(float(np.nanmean([r[name] for r in rows])), 4) for name in rows[0]}
    used = int((np.abs(of_train) > high / 2).any(0).sum())
    result = {"data": data.name, "bits_per_slice": bits, "components": used, "test": test}
    print(result)
    harness.save("pca", result)


if __name__ == "__main__":
    main()

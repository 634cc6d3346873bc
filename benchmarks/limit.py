"""What guidance draws where slices have air, with its limit and without.

    python benchmarks/limit.py --run_dir RUN

Samples as predict.py draws them, the same random numbers in each setting. Counted are those with a
patch of light where fewer than one training slice in a thousand is brighter than a tenth of the
range: more than 20 pixels over a fifth of it. Writes benchmarks/results/limit.json, and the samples
with the largest patches as figures/limit.png.
"""

import argparse
import math
from pathlib import Path

import harness
import numpy as np
import temperature

N, SHOWN = 128, 8
LIMIT = harness.train.GatedPixelCNN.MOST_TOLD
SETTINGS = {  # guidance, and what it may see at most in favour of a code
    "guidance 0": (0, LIMIT),
    "guidance 1": (1, LIMIT),
    "guidance 1, no limit": (1, math.inf),
}


def air_of(split):
    """(H, W), where fewer than one slice in a thousand is brighter than a tenth of the range."""
    some = split.batch(np.arange(0, len(split), max(1, len(split) // 1000)))[:, 0].numpy()
    return np.quantile(some, 0.999, axis=0) < 0.1


def lit(images, air):
    """(N, H, W) -> (N,) pixels of air that are brighter than a fifth of the range."""
    return ((images > 0.2) & air).sum((1, 2))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, required=True, help="with both stages")
    args = p.parse_args()
    config = harness.utils.load_config(args.run_dir, "vq_vae")
    data = harness.dataset.load(**config["data"]["arguments"])
    vq_vae, prior = (harness.utils.load_model(args.run_dir, s) for s in harness.utils.STAGES)
    air = air_of(data["train"])
    sets, rows = {}, {}
    for name, (guidance, prior.MOST_TOLD) in SETTINGS.items():
        settings = {"temperature": temperature.DEFAULT[0], "guidance": guidance}
        sets[name] = temperature.draw(vq_vae, prior, data["train"].positions, N, **settings)
    test = data["test"].batch(range(len(data["test"])))[:, 0].numpy()
    for name, images in (sets | {"real, test": test}).items():
        n_patched = int((lit(images, air) > 20).sum())
        rows[name] = {"slices": len(images), "with_a_patch": n_patched}
        print(name, rows[name], flush=True)
    result = {"data": data.name, "temperature": temperature.DEFAULT[0], "limit": LIMIT}
    harness.save("limit", result | {"rows": rows})

    torn = "guidance 1, no limit"
    worst = np.argsort(-lit(sets[torn], air), kind="stable")[:SHOWN]
    shown = {name: sets[name][worst] for name in (torn, "guidance 1")}
    temperature.picture(shown, f"{harness.utils.data_name(config)}: generated slices", "limit")


if __name__ == "__main__":
    main()

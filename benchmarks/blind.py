"""Are samples whole? Sheets for a reader who cannot tell them from reconstructions.

    python benchmarks/blind.py --run_dir runs/demo              # writes RUN/blind/sheet*.png
    python benchmarks/blind.py --run_dir runs/demo --failed 3 17 101 --failed 17 20

The first shuffles the first 64 samples of a run after predict.py among as many reconstructions of
test slices, numbered, and keeps the key in RUN/blind/key.json. Whoever reads the sheets names the
tiles that are no whole body; the second looks up those of each reader and writes
benchmarks/results/blind.json.
"""

import argparse
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image, ImageDraw

N, SEED, ACROSS, SCALE = 64, 1616, 4, 1.5


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--run_dir", type=Path, required=True, help="a run after predict.py")
    text = "tiles that are not whole, once for each reader"
    p.add_argument("--failed", type=int, nargs="*", action="append", metavar="TILE", help=text)
    args = p.parse_args()
    config = harness.utils.load_config(args.run_dir, "vq_vae")
    folder = args.run_dir / "blind"
    if args.failed is not None:
        key = harness.utils.read_json(folder / "key.json")
        readings = []
        for tiles in args.failed:
            failed = {kind: [] for kind in ("samples", "reconstructions")}
            for kind, i in (key[tile] for tile in sorted(tiles)):
                failed[kind].append(i)
            print({kind: f"{len(which)} of {N}: {which}" for kind, which in failed.items()})
            readings.append(failed)
        name = harness.utils.data_name(config)
        harness.save("blind", {"data": name, "n": N, "readings": readings})
        return
    data = harness.dataset.load(**({"data": "phantom"} | config["data"]["arguments"]))
    vq_vae = harness.utils.load_model(args.run_dir, "vq_vae")
    which = np.sort(np.random.default_rng(16).choice(len(data["test"]), N, replace=False))
    test = data["test"].batch(which)[:, 0].numpy()
    coded = harness.metrics.through(vq_vae, test, torch.device("cpu"))
    samples = sorted((args.run_dir / "predict" / "samples").glob("sample_*.png"))[:N]
    tiles = [("samples", i, Image.open(path).convert("L")) for i, path in enumerate(samples)]
    coded = map(Image.fromarray, harness.utils.to_uint8(coded))
    tiles += [("reconstructions", int(i), tile) for i, tile in zip(which, coded, strict=True)]
    tiles = [tiles[i] for i in np.random.default_rng(SEED).permutation(len(tiles))]
    folder.mkdir(exist_ok=True)
    for first in range(0, len(tiles), ACROSS**2):
        part = [tile.rotate(90 * data.is_phantom, expand=True)  # its slices lie on their side
                for *_, tile in tiles[first : first + ACROSS**2]]  # fmt: skip
        width, height = (round(SCALE * n) for n in part[0].size)
        sheet = Image.new("L", (ACROSS * (width + 8), ACROSS * (height + 22)), 90)
        for k, tile in enumerate(part):
            x, y = k % ACROSS * (width + 8), k // ACROSS * (height + 22)
            sheet.paste(tile.resize((width, height), Image.Resampling.BICUBIC), (x + 4, y + 18))
            ImageDraw.Draw(sheet).text((x + 6, y + 3), f"#{first + k}", fill=255)
        sheet.save(folder / f"sheet{first // ACROSS**2:02d}.png")
    harness.utils.write_json(folder / "key.json", [[kind, i] for kind, i, _ in tiles])


if __name__ == "__main__":
    main()

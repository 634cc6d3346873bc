"""Put the numbers of benchmarks/results/*.json into the tables of the README.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`. A test compares them. The tables of
flags are made from the commands' own parsers.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import predict  # noqa: E402
import train  # noqa: E402

BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def of_test(test):
    return [
        f"{test['ssim']:.4f}", f"{test['ssim_body']:.4f}", f"{test['psnr']:.2f}",
        f"{test['used']} of {test['size']}", f"{test['perplexity']:.0f}",
    ]  # fmt: skip


def with_interval(found, name):
    low, high = found[f"{name}_ci95"]
    return f"{found[f'{name}_mean']:.4f} ({low:.4f} to {high:.4f})"


def reconstruction():
    rows = []
    for name in RUNS:
        run = results(name)
        r, c, at = run["reconstruction"], run["codebook"], run["rate"]["at_as_many_bits"]
        rows.append([
            run["data"], with_interval(r, "ssim"), with_interval(r, "ssim_body"),
            f"{r['psnr_mean']:.2f}", f"{c['used']} of {c['size']}", f"{c['perplexity']:.0f}",
            f"{run['rate']['bits_per_slice']:.0f}",
            ", ".join(f"{name} {x['ssim']:.2f} at {x['bits']:.0f}" for name, x in at.items()),
        ])  # fmt: skip
    return table(["data", "SSIM (95 %)", "in the body (95 %)", "PSNR (dB)", "codes used",
                  "perplexity", "bits per slice", "SSIM of other codecs, bits"], rows)  # fmt: skip


def samples():
    rows = []
    for name in RUNS:
        found = results(name)["samples"]
        near, told = found["nearest_training_ssim"], [
            found["two_sample_accuracy"] | {"n": found["judged"]}, found["told_with_many"]
        ]  # fmt: skip
        kinds = ("samples", "real")
        of = {kind: [f"{t[kind]:.2f} of {2 * t['n']}" for t in told] for kind in kinds}
        of["samples"] += [f"{len(near[key])} of {near['looked_up']}"
                          for key in ("nearer_than_any_reconstruction", "copies")]  # fmt: skip
        of |= {"real": [*of["real"], "", ""], "reconstructions": 4 * [""]}
        for kind in of:
            values = [
                f"{found[key][kind]:.3f}" if kind in found[key] else ""
                for key in ("best_match_ssim", "pairwise_ssim", "frechet", "precision", "recall")
            ]
            values.append(", ".join(f"{x:.0f}" for x in found["wasserstein"][kind]))
            values.append(f"{near[kind]:.3f}" if kind in near else "")
            rows.append([results(name)["data"], kind, *values, *of[kind]])
    return table(["data", "slices", "best match (SSIM)", "pairs (SSIM)", "Fréchet", "precision",
                  "recall", "sliced Wasserstein, fine to coarse", "nearest training slice (SSIM)",
                  "told from reconstructions", "with more slices", "nearer", "copies"],
                 rows)  # fmt: skip


def bits():
    rows = []
    for name in RUNS:
        found = results(name)["prior"]
        known = found["bits_per_code_without_network"]
        low, high = found["bits_per_code_ci95"]
        rows.append([results(name)["data"],
                     f"**{found['bits_per_code']:.3f}** ({low:.3f} to {high:.3f})",
                     *(f"{known[k]:.3f}" for k in BITS)])  # fmt: skip
    return table(["data", "prior (95 %)", *BITS.values()], rows)


def seconds():
    names = {"vq_vae": "stage 1 (s)", "pixelcnn": "stage 2 (s)", "predict": "predict.py (s)"}
    found = results("demo")["seconds"]
    row = [*(found[key] for key in names), sum(found.values())]
    return table([*names.values(), "in all (s)"], [[f"{x:.0f}" for x in row]])


def reach():
    def cell(row):
        low, high = row["ci95"]
        text = f"{row['more_bits_per_code']:.4f} ({low:.4f} to {high:.4f})"
        return text.replace("-0.0000", "0.0000")

    found = [results(name)["rows"] for name in ("reach_without", "reach")]
    rows = [[gap, *(cell(rows[gap]) for rows in found)] for gap in found[0]]
    head = ["lines between that stay", "more bits per code (95 %), no summary", "with it"]
    return table(head, rows)


RUNS = ["demo", "brain"]
BITS = {"uniform": "log2 K", "unigram": "histogram", "position": "of each position",
        "gzip": "gzip", "xz": "xz"}  # fmt: skip
QUALITY = ["SSIM", "in the body", "PSNR (dB)", "codes used", "perplexity"]


def vq_vae():
    found = results("vq_vae")
    rows = []
    for name, row in found["rows"].items():
        reached = row["seconds_to_goal"]
        reached = f"{reached:.0f} s" if reached else f"not in {row['seconds']:.0f} s"
        rows.append([f"`{name}`", row["updates"], *of_test(row["test"]), reached])
    return table(["preset", "updates", *QUALITY, f"SSIM {found['goal']} after"], rows)


def ablation():
    rows = []
    for name, row in results("ablation")["rows"].items():
        cells = [name, row["updates"], f"{row['validate']['ssim']:.4f}", *of_test(row["test"])]
        if name.startswith(("autoencoder", "VAE")):
            cells[-2:] = "none", ""
        rows.append(cells)
    return table(["change", "updates", "SSIM, validation", "SSIM, test", *QUALITY[1:]], rows)


def prior():
    rows = results("prior")["rows"]
    return table(
        ["prior", "updates", "parameters", "bits per code"],
        [
            [name, row["updates"], f"{row['test']['parameters']:,}",
             f"{row['test']['bits_per_code']:.3f}"]
            for name, row in rows.items()
        ],
    )  # fmt: skip


def prior_ablation():
    rows = results("prior_ablation")["rows"]
    return table(
        ["change", "updates", "parameters", "bits per code, validation", "test"],
        [
            [name, row["updates"], f"{row['parameters']:,}",
             f"{row['validate_bits_per_code']:.3f}", f"{row['bits_per_code']:.3f}"]
            for name, row in rows.items()
        ],
    )  # fmt: skip


def dropout():
    return table(
        ["data", "change", "updates", "bits per code, validation", "test"],
        [
            [found["data"], name, row["updates"], f"{row['validate_bits_per_code']:.3f}",
             f"{row['bits_per_code']:.3f}"]
            for found in map(results, ("dropout", "dropout_brain"))
            for name, row in found["rows"].items()
        ],
    )  # fmt: skip


def drawn(file="drawn"):
    rows, found = [], results(file)["rows"]
    sets = [
        (f"samples, {name}", row["drawn"]["samples"], f"{row['bits_per_code']:.3f}")
        for name, row in found.items()
    ]
    sets += [(kind, found["demo"]["drawn"][kind], "") for kind in ("real", "reconstructed")]
    for kind, row, bits in sets:
        halves = f"{row['halves_differ']:.3f} +- {row['standard_error']:.3f}"
        broken = f"{100 * row['outline_breaks']:.1f} %"
        keys = ("spread_of_brightness", "frechet", "precision", "recall")
        rows.append([kind, bits, halves, broken, *(f"{row[key]:.3f}" for key in keys)])
    head = ["slices", "bits per code, test", "halves differ", "outline breaks",
            "spread of brightness", "Fréchet", "precision", "recall"]  # fmt: skip
    return table(head, rows)


def drawn_brain():
    return drawn("drawn_brain")


def pca():
    found = results("pca")
    test = found["test"]
    row = [f"{found['bits_per_slice']:.0f}", found["components"], f"{test['ssim']:.4f}",
           f"{test['ssim_body']:.4f}", f"{test['psnr']:.2f}"]  # fmt: skip
    return table(["bits per slice", "components in use", *QUALITY[:3]], [row])


def sampling():
    return table(
        ["slices", "grid", "cached (s)", "full passes (s)", "ratio", "logits differ by"],
        [
            [row["slices"], " x ".join(map(str, row["grid"])), f"{row['cached_s']:.2f}",
             f"{row['full_s']:.0f}", f"{row['ratio']:.0f}",
             f"{row['largest_logit_difference']:.0e}"]
            for row in results("sampling")["rows"]
        ],
    )  # fmt: skip


def quantizer():
    return table(
        ["quantiser", "seconds", "memory (MiB)", "times faster", "share of the memory"],
        [
            [name, f"{row['seconds']:.3f}", f"{row['added_mib']:.0f}", f"{row['times_faster']:.1f}",
             f"{row['memory_share']:.2f}"]
            for name, row in results("quantizer")["rows"].items()
        ],
    )  # fmt: skip


def runs():
    return table(
        ["slices", "stage", "first start (s)", "later start (s)",
         "resumed start (s)", "time spent on saving", "peak memory (GiB)"],
        [
            [n, f"`{stage}`", f"{row['first_update_s']:.1f}", f"{row['fresh_s']:.1f}",
             f"{row['resumed_s']:.1f}", f"{100 * row['saving_share']:.1f} %",
             f"{row['peak_gib']:.1f}"]
            for n, stages in results("runs")["rows"].items()
            for stage, row in stages.items()
        ],
    )  # fmt: skip


def presets():
    rows = []
    for name, stages in results("presets")["rows"].items():
        for stage, row in stages.items():
            sample = f"{row['sample_s']:.3f}" if "sample_s" in row else ""
            rows.append([name, f"`{stage}`", f"{row['parameters']:,}", row["batch_size"],
                         f"{row['update_s']:.2f}", f"{row['peak_gib']:.1f}", sample])  # fmt: skip
    head = ["preset", "stage", "parameters", "slices an update", "update (s)", "peak memory (GiB)",
            "sample (s)"]  # fmt: skip
    return table(head, rows)


def temperature():
    rows = []
    for name, row in results("temperature")["rows"].items():
        levels = ", ".join(f"{x:.0f}" for x in row["wasserstein"])
        names = ("best_match_ssim", "pairwise_ssim", "frechet", "precision", "recall",
                 "halves_differ")  # fmt: skip
        told = f"{row['told']:.2f}" if "told" in row else ""
        rows.append([name, *(f"{row[key]:.3f}" for key in names), told, levels])
    head = ["slices", "best match (SSIM)", "pairs (SSIM)", "Fréchet", "precision", "recall",
            "halves differ", "told from reconstructions",
            "sliced Wasserstein, fine to coarse"]  # fmt: skip
    return table(head, rows)


def classes():
    rows = results("classes")["rows"]
    kinds = [key for key in next(iter(rows.values())) if key.startswith("guidance")]
    return table(
        ["class", "training slices near there", "their share", *(f"samples, {k}" for k in kinds)],
        [
            [name, row["real_slices"], *(f"{100 * row[key]:.1f} %" for key in ("real", *kinds))]
            for name, row in rows.items()
        ],
    )


def blind():
    found = results("blind")
    kinds = ("samples", "reconstructions")
    return table(
        ["reader", *kinds],
        [[i, *(f"{len(failed[k])} of {found['n']}" for k in kinds)]
         for i, failed in enumerate(found["readings"], 1)],
    )  # fmt: skip


def flags(parser):
    formatter, rows = parser._get_formatter(), []
    for action in parser._actions:
        name = max(action.option_strings, key=len)
        if name != "--help":
            values = formatter._format_args(action, action.dest.upper())
            text = formatter._expand_help(action).replace("|", "\\|")
            rows.append([f"`{f'{name} {values}'.strip()}`".replace("|", "\\|"), text])
    return table(["flag", "what it sets"], rows)


def flags_train():
    return flags(train.parser())


def flags_predict():
    return flags(predict.parser())


TABLES = {
    f.__name__: f
    for f in (
        reconstruction, samples, bits, seconds, reach, vq_vae, ablation, pca, prior,
        prior_ablation, dropout, drawn, drawn_brain, sampling, quantizer, runs, presets,
        temperature, classes, blind, flags_train, flags_predict,
    )
}  # fmt: skip


def filled(text):
    """The README with every table as the results have it."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))

"""Every figure: training curves, reconstructions, code maps, samples."""

import base64
import html
import json
import textwrap

import matplotlib

matplotlib.use("Agg")  # no screen is needed, or looked for

import matplotlib.pyplot as plt
import numpy as np

import utils

plt.rcParams["text.parse_math"] = False  # a dollar in a file's name is one

TITLES = {
    "ssim": "SSIM on validation",
    "psnr": "PSNR on validation (dB)",
    "used": "codes in use on validation",
    "perplexity": "perplexity of the codes on validation",
    "bits_per_code": "bits per code",
    "reconstruction": "reconstruction loss",
    "commitment": "commitment loss",
    "codebook": "codebook loss",
    "diversity": "diversity loss",
}


def _save(figure, path, config, text):
    """Write a figure whose title names the data, so that no phantom passes for a patient."""
    title = textwrap.fill(f"{utils.data_name(config)}: {text}", int(11 * figure.get_figwidth()))
    figure.suptitle(title)
    _write(figure, path)


def _write(figure, path):
    utils.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=160, format="png"))
    plt.close(figure)


def picks(n, k):
    """At most k of the indices below n, from all over, at varied positions in their volumes."""
    k = min(n, k)
    # each a step of at least 1 behind the last, so that none is picked twice
    return [i + int((i + 0.618 * i % 1) * (n - k) / k) for i in range(k)]


def curves(log, path, config):
    """Training and validation figures over updates.

    Args:
        log: entries {"update": int, "train": {name: float}, "validate": {name: float}}.
    """
    names = [n for n in TITLES if any(n in log[-1][part] for part in ("train", "validate"))]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    width, height = 4.5 * columns, 3.1 * rows + 0.3
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(  # to work out a layout would take as long as to draw
        left=0.75 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.9 / height,
        wspace=0.25, hspace=0.4,
    )  # fmt: skip
    for axis, name in zip(axes.flat, names, strict=False):
        for part, style in (("train", "C0-"), ("validate", "C1.-")):
            if name in log[-1][part]:
                x, y = zip(
                    *((e["update"], e[part][name]) for e in log if name in e[part]), strict=True
                )
                axis.plot(x, y, style, label={"train": "training", "validate": "validation"}[part])
        axis.set(title=TITLES[name], xlabel="update")
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    _save(figure, path, config, f"training of the {config['stage']}")


def _panels(rows, columns, size, width=1.15):
    """Axes without ticks for images of `size` (H, W), each `width` inches wide."""
    height = width * size[0] / size[1]
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * width + 1.0, rows * height + 0.9),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _bar(axes, label="intensity\n(1: 99.5th percentile)", extend="neither"):
    """A colour bar beside a row of axes, of the image in the first of them."""
    options = {"extend": extend, "fraction": 0.05, "aspect": 12}
    bar = axes[0].figure.colorbar(axes[0].images[0], ax=axes, **options)
    bar.set_label(label, fontsize=7)
    bar.ax.tick_params(labelsize=7)


def reconstructions(x, x_hat, titles, path, config, protocol):
    """Rows of slice, reconstruction and their difference; x, x_hat: (N, H, W) in [0, 1]."""
    figure, axes = _panels(3, len(x), x.shape[1:])
    for i in range(len(x)):
        axes[0, i].imshow(x[i], cmap="gray", vmin=0, vmax=1)
        axes[1, i].imshow(x_hat[i], cmap="gray", vmin=0, vmax=1)
        axes[2, i].imshow(x_hat[i] - x[i], cmap="RdBu_r", vmin=-0.3, vmax=0.3)
        axes[1, i].set_title(titles[i], fontsize=8)
    for axis, text in zip(axes[:, 0], ("slice", "reconstruction", "difference"), strict=True):
        axis.set_ylabel(text)
    _bar(axes[2], "reconstruction - slice", "both")
    _bar(axes[0])
    text = f"reconstructions of the {protocol['split']} split"
    _save(figure, path, config, text)


def code_colours(codebook):
    """(K, D) -> (K, 3), a colour for each code.

    A code is a name, not a quantity, so its colour is its place along the three main axes of the
    codebook: codes that look alike have like colours.
    """
    centred = codebook - codebook.mean(0)
    colours = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    colours = np.pad(colours, ((0, 0), (0, 3 - colours.shape[1])))  # D may be less than 3
    return colours.argsort(0).argsort(0) / max(1, len(colours) - 1)


def codes(x, maps, codebook, path, config):
    """Slices above their code maps; x: (N, H, W), maps: (N, h, w), codebook: (K, D)."""
    colours = code_colours(codebook)
    figure, axes = _panels(2, len(x), x.shape[1:])
    for i in range(len(x)):
        axes[0, i].imshow(x[i], cmap="gray", vmin=0, vmax=1)
        axes[1, i].imshow(colours[maps[i]], interpolation="nearest")
    axes[0, 0].set_ylabel("slice")
    axes[1, 0].set_ylabel(f"codes, {maps.shape[1]} x {maps.shape[2]}")
    _save(figure, path, config, "code maps (colour: principal axes of the codebook)")


def samples(images, path, config, note):
    """A grid of generated slices (N, H, W) in [0, 1]; `note` says how they were drawn."""
    columns = min(8, len(images))
    figure, axes = _panels(-(-len(images) // columns), columns, images.shape[1:], width=0.95)
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    _bar(axes[0])
    _save(figure, path, config, f"generated slices ({note})")


def surprise(x, bits, bodies, path, config):
    """Slices (N, H, W) above what the prior did not expect of them, bits (N, h, w) per code.

    bodies: (N, H, W) bool, drawn as an outline.
    """
    figure, axes = _panels(2, len(x), x.shape[1:])
    h, w = x.shape[1:]
    for i in range(len(x)):
        axes[0, i].imshow(x[i], cmap="gray", vmin=0, vmax=1)
        axes[1, i].imshow(
            bits[i], cmap="magma", vmin=0, vmax=np.percentile(bits, 99.5),
            extent=(-0.5, w - 0.5, h - 0.5, -0.5), interpolation="bilinear",
        )  # fmt: skip
        if bodies[i].any() and not bodies[i].all():
            axes[1, i].contour(bodies[i], levels=[0.5], colors="w", linewidths=0.5)
        axes[1, i].set_title(f"mean {bits[i].mean():.2f}", fontsize=9)
    axes[0, 0].set_ylabel("slice")
    axes[1, 0].set_ylabel("surprise")
    _bar(axes[1], "bits per code", "max")
    _bar(axes[0])
    _save(figure, path, config, "what the prior did not expect, -log2 p of each code")


def completions(whole, hidden, drawn, path, config, note):
    """Slices of which a part was hidden and drawn anew, beside what was there.

    whole: (N, H, W) reconstructions; hidden: (N, H, W) bool; drawn: (N, M, H, W).
    """
    n, m = drawn.shape[:2]
    figure, axes = _panels(n, m + 2, whole.shape[1:])
    for i in range(n):
        axes[i, 0].imshow(whole[i], cmap="gray", vmin=0, vmax=1)
        axes[i, 1].imshow(np.where(hidden[i], 0.5, whole[i]), cmap="gray", vmin=0, vmax=1)
        for axis, image in zip(axes[i, 2:], drawn[i], strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.contour(hidden[i], levels=[0.5], colors="C1", linewidths=0.6)
    for axis, text in zip(axes[0], ["reconstruction", "given"], strict=False):
        axis.set_title(text, fontsize=9)
    axes[0, 2].set_title("drawn inside the line", fontsize=9, loc="left")
    _bar(axes[0])
    _save(figure, path, config, f"completions ({note})")


def nearest(images, neighbours, titles, path, config):
    """Samples above the training slices most like them (N, H, W), and what differs.

    titles: N pairs, of the sample and of its neighbour.
    """
    figure, axes = _panels(3, len(images), images.shape[1:])
    for i in range(len(images)):
        axes[0, i].imshow(images[i], cmap="gray", vmin=0, vmax=1)
        axes[0, i].set_title(titles[i][0], fontsize=9)
        axes[1, i].imshow(neighbours[i], cmap="gray", vmin=0, vmax=1)
        axes[1, i].set_title(titles[i][1], fontsize=8)
        difference = images[i] - neighbours[i]
        axes[2, i].imshow(difference, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    for axis, text in zip(axes[:, 0], ("sample", "training slice", "difference"), strict=True):
        axis.set_ylabel(text)
    _bar(axes[2], "sample - slice", "both")
    _bar(axes[0])
    _save(figure, path, config, "the samples most like a training slice, and that slice")


def by_place(ssim, positions, patients, path, config):
    """SSIM of each slice by its position in the volume, and by patient (at most 40 of them)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    known = positions >= 0
    left.plot(positions[known], ssim[known], "C0.", markersize=3, alpha=0.6)
    left.set(xlabel="relative position in the volume", ylabel="SSIM", title="by position")
    names = np.unique(patients)
    shown = names[:40]
    of_each = [ssim[patients == name] for name in shown]
    right.boxplot(of_each, flierprops={"marker": ".", "markersize": 3})
    right.set(xlabel="patient", ylabel="SSIM", title=f"by patient ({len(shown)} of {len(names)})")
    right.set_xticks(range(1, len(shown) + 1), [name[-10:] for name in shown], rotation=90)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    _save(figure, path, config, "SSIM of reconstructions")


def usage(counts, path, config):
    """How often each code is used over a split, the most used first; counts: (K,)."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    share = np.sort(counts)[::-1] / counts.sum()
    axis.plot(np.arange(1, len(share) + 1), np.where(share > 0, share, np.nan), "C0")
    axis.axhline(1 / len(share), color="C1", label="all codes alike")
    axis.set(yscale="log", xlabel="code, the most used first", ylabel="share of all places")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
    axis.grid(alpha=0.3)
    used = int((counts > 0).sum())
    _save(figure, path, config, f"usage of the codebook, {used} of {len(counts)} codes")


def interpolations(images, path, config):
    """Images (N, n, H, W) on the way from one slice's codes to another's, a row each."""
    rows, columns = images.shape[:2]
    figure, axes = _panels(rows, columns, images.shape[2:])
    for row, of_row in zip(axes, images, strict=True):
        for j, (axis, image) in enumerate(zip(row, of_row, strict=True)):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{j / (columns - 1):.2f}", fontsize=9)
    _bar(axes[0])
    text = "between two slices' codes; above each, the share of the right one"
    _save(figure, path, config, text)


def data_set(data, out):
    """contact_sheet.png, slices of every split of a `dataset.SliceData`, and histogram.png."""
    columns, (h, w) = 8, data.size
    sheet, axes = plt.subplots(
        len(data.splits), columns, figsize=(14, 0.6 + 3 * (14 / columns * h / w + 0.4)),
        layout="constrained",
    )
    histogram, bars = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, split), row in zip(data.splits.items(), axes, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, i in zip(row, picks(len(split), columns), strict=False):
            item = split.slices[i]
            axis.imshow(split.images[i], cmap="gray", vmin=0, vmax=65535)
            title = f"{name}: {item.volume[-24:]}\n{item.label or ''} at {item.position:.2f}"
            axis.set_title(title, fontsize=7)
        some = split.images[:: max(1, len(split) // 500)] / 65535
        counts, edges = np.histogram(some, bins=100, range=(0, 1), density=True)
        bars.stairs(counts, edges, label=f"{name} ({len(some)} slices)")
    bars.set(yscale="log", xlabel="intensity in use", ylabel="density of pixels", title=data.name)
    bars.yaxis.set_major_formatter("{x:g}")
    bars.legend()
    sheet.suptitle(data.describe(), fontsize=8)
    _write(sheet, out / "contact_sheet.png")
    _write(histogram, out / "histogram.png")


# ------------------------------------------------------------------------------------------------
# The report page
# ------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
h1, h2, h3 { break-after: avoid; }
img { max-width: 100%; height: auto; }
figure { margin: 1rem 0; break-inside: avoid; }
figcaption { font-size: 0.9rem; color: #444; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; }
td { overflow-wrap: anywhere; }
tr { border-bottom: 1px solid #ddd; }
.phantom { background: #fe9; padding: 0.5rem; }
pre { font-size: 0.8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { .wide { overflow-x: visible; } body { font-size: 11px; padding: 0; } }
"""
CAPTIONS = {
    "reconstructions": "Slices, what is left of them after coding, and the difference.",
    "codes": "Each code has the colour of its place in the codebook; like codes, like colours.",
    "ssim": "Where in the volume, and in whom, reconstruction is better or worse.",
    "usage": "A healthy codebook has no code that is hardly ever used.",
    "interpolations": "Halfway between two slices lies no third one, if the codes are discrete.",
    "samples": "Slices drawn from the prior. No scanner took them and they are of no patient.",
    "nearest": "The samples most like a training slice, and that slice: are they copies?",
    "completions": "A part of each slice was hidden and drawn anew from what was left.",
    "surprise": "Bits each code costs under the prior: bright where a slice is unlike the others.",
}


def report(result, config, out, run_dir):
    """Write report.html, one page with every number and picture of a call to predict.py.

    The pictures are inside the file; nothing is fetched, nothing runs.

    Args:
        result: what goes into metrics.json. config: of stage 1. out: folder with the pictures.
        run_dir: where both stages left their training curves.
    """
    name = html.escape(utils.data_name(config))
    parts = [f"<h1>Reconstructions and samples: {name}</h1>"]
    scored, learned = config["data"], utils.load_config(run_dir, "vq_vae")["data"]
    if scored["is_phantom"] or learned["is_phantom"]:
        text = "nothing here is of a patient"
        if not learned["is_phantom"]:
            text = "what is scored; the training slices and the samples are not"
        elif not scored["is_phantom"]:
            text = "what the run learned from, and its samples; what is scored is not"
        parts.append(f'<p class="phantom">PHANTOM (synthetic slices): {text}.</p>')
    about = result["data"]["report"]
    who = "bodies" if scored["is_phantom"] else "patients"
    if not about["patients_separable"]:
        who = "files, whose patients cannot be told apart"
    rows = {split: f"{n['slices']} slices of {n['patients']} {who}"
            for split, n in about["splits"].items()}  # fmt: skip
    rows |= {"scored": result["protocol"]["split"], "pixels": " x ".join(map(str, about["size"]))}
    names = ("split_origin", "intensity_rule", "shrunk", "cropped", "padded", "unreadable")
    rows |= {name: about[name] for name in (*names, "warnings") if about.get(name)}
    rows["learned from"] = utils.data_name({"data": learned})
    parts += ["<h2>Data</h2>", _table(rows)]
    r = result["reconstruction"]
    names = [key.removesuffix("_mean") for key in r if key.endswith("_mean")]
    kinds = {"mean": "mean", "std": "standard deviation", "ci95": "95 % interval"}
    figures = {n: {text: r[f"{n}_{kind}"] for kind, text in kinds.items()} for n in names}
    counts = {key: r[key] for key in ("n_slices", "n_patients")}
    parts += ["<h2>Reconstruction</h2>", _columns(figures), _table(counts)]
    parts += _pictures(out, "reconstructions", "ssim", "interpolations")
    parts += ["<h2>Codes</h2>", _table(result["codebook"]), *_pictures(out, "codes", "usage")]
    rate = {key: value for key, value in result["rate"].items() if not isinstance(value, dict)}
    parts += ["<h2>Rate</h2>", _table(rate), _columns(result["rate"]["at_as_many_bits"])]
    if p := result["prior"]:
        known = p["bits_per_code_without_network"] or {}
        rows = {f"bits per code without a network: {key}": known[key] for key in known}
        figures = {key: p[key] for key in p if key != "bits_per_code_without_network"}
        parts += ["<h2>Prior</h2>", _table(figures | rows)]
        parts += _pictures(out, "surprise")
    if s := result["samples"]:
        drawn = {key: value for key, value in s.items() if not isinstance(value, dict)}
        parts += ["<h2>Samples</h2>", _table(drawn), *_pictures(out, "samples")]
        kinds = ("samples", "real", "reconstructions")
        judged = {key: {kind: value[kind] for kind in kinds if kind in value}
                  for key, value in s.items() if isinstance(value, dict)}  # fmt: skip
        if told := s.get("two_sample_accuracy"):
            low, high = told["samples_ci95"]
            with_interval = f"{told['samples']:.3f} (95 % {low:.3f} to {high:.3f})"
            judged["two_sample_accuracy"]["samples"] = with_interval
        if judged:
            parts += ["<h3>Each figure beside that of real slices</h3>", _columns(judged)]
        if near := s.get("nearest_training_ssim"):
            rest = {key: value for key, value in near.items() if key not in kinds}
            parts += ["<h3>Copies of training slices</h3>", _table(rest)]
        parts += _pictures(out, "nearest", "completions")
    parts += ["<h2>Protocol</h2>", _table(result["protocol"])]
    parts += ["<h2>Training</h2>"]
    for stage in utils.STAGES:
        parts += _picture(run_dir / stage / "curves.png", f"Training of the {stage}.")
    stages = utils.STAGES if result["prior"] else ["vq_vae"]
    for stage in stages:
        stored = utils.load_config(run_dir, stage)
        settings = {key: stored[key] for key in ("preset", "model", "train", "precision")}
        parts += [f"<h2>Configuration of the {stage}</h2>"]
        parts += [f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre>"]
    parts += ["<h2>Seed and versions</h2>", _table({"seed": result["seed"]} | result["versions"])]
    parts += ["<p>Not for diagnosis.</p>"]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{name}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    utils.write_atomically(out / "report.html", lambda path: path.write_text(page, encoding="utf8"))


def _pictures(out, *names):
    for name in names:
        yield from _picture(out / f"{name}.png", CAPTIONS[name])


def _picture(path, caption):
    """A figure with the file's bytes in the page, if it is there."""
    if path.exists():
        data, caption = base64.b64encode(path.read_bytes()).decode(), html.escape(caption)
        yield (
            f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )


def _shown(value):
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else html.escape(str(value))


def _table(values):
    rows = (
        f"<tr><th>{html.escape(key.replace('_', ' '))}</th><td>{_shown(value)}</td></tr>"
        for key, value in values.items()
    )
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _columns(values):
    """A table of {row: {column: value}}."""
    columns = list(dict.fromkeys(name for row in values.values() for name in row))
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    rows = (
        f"<tr><th>{html.escape(key.replace('_', ' '))}</th>"
        + "".join(f"<td>{_shown(row[name]) if name in row else ''}</td>" for name in columns)
        + "</tr>"
        for key, row in values.items()
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'

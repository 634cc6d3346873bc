"""Score the reconstructions of a trained run, and draw new slices from its prior.

`python predict.py` reads what `train.py` left in the run's directory, reconstructs the test split,
samples new slices, and writes metrics.json, per_slice.csv, pictures and NIfTI files to RUN/predict.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import io
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dataset
import metrics
import plots
import utils
from utils import UserError

N_SHOWN = 8  # slices in most figures
N_RANKED = 9  # slices in the figure of reconstructions: worst, best, and those between
N_PACKED = 32  # slices packed by other codecs
N_JUDGED = 512  # samples at most that are compared with real slices
WRITTEN = ["metrics.json", "report.html", "per_slice.csv", "surprise/[0-9]*_*.nii.gz"]
WRITTEN += [f"{name}.png" for name in plots.CAPTIONS]
SAMPLE = re.compile(r"sample_(\d{5,})\.(nii\.gz|png)")
UNFINISHED = ".unfinished"  # folder for what a call has written until it is done
PROTOCOL = {
    "images": "float32 in [0, 1]; reconstructions clipped to it",
    "arithmetic": "float32",
    "ssim": "skimage.metrics.structural_similarity, data_range=1, uniform 7 x 7 window",
    "ssim_gaussian": "the same, Gaussian window of sigma 1.5, population covariance (Wang 2004)",
    "ssim_body": "mean of the SSIM map where the slice shows body; slices without any left out",
    "psnr": "10 log10(1 / mean squared error) in dB, mean over slices",
    "interval": "95 %, bootstrap over patients, 2000 draws",
    "bits_per_code": "mean over slices of -log2 p(code | codes before it, label, position)",
}


def parser():
    p = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=utils.HelpFormatter, allow_abbrev=False
    )
    run = p.add_argument_group("run")
    run.add_argument("--run_dir", metavar="DIR", default="runs/demo", help="where the run lives")
    run.add_argument("--split", choices=dataset.SPLITS, default="test", help="split to score")
    run.add_argument(
        "--input", metavar="PATH",
        help="a slice of your own, or a folder of them, to score instead of a split",
    )
    text = "where to write (default: RUN_DIR/predict, or RUN_DIR/input with --input)"
    run.add_argument("--out", metavar="DIR", help=text)
    run.add_argument(
        "--n_maps", type=utils.at_least(0), metavar="N", default=64,
        help="slices, from all over the split, whose surprise is written as NIfTI",
    )
    dataset.add_data_arguments(p, suppress_default=True)
    sample = p.add_argument_group("samples")
    sample.add_argument(
        "--n_samples", type=utils.at_least(0), metavar="N", default=64, help="slices to draw"
    )
    sample.add_argument(
        "--temperature",
        type=utils.at_least(0.0, float),
        metavar="T",
        default=0.75,
        help="1 draws from the prior as learned; less gives likelier, less varied slices",
    )
    sample.add_argument(
        "--guidance", type=utils.at_least(0.0, float), metavar="W", default=0.5,
        help="how much more a slice shall look like its position and label: 0 draws as learned, "
        "more than 1 may tear slices",
    )
    sample.add_argument(
        "--top_k", type=utils.at_least(1), metavar="K", help="draw among the K likeliest codes only"
    )
    sample.add_argument("--label", metavar="L", help="class to draw (default: any)")
    sample.add_argument(
        "--position", type=fraction, metavar="X",
        help="place in the volume to draw, 0 to 1 (default: those of the training slices)",
    )
    utils.add_seed(sample)
    utils.add_runtime_arguments(p, precision=False)
    return p


def fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def main():
    args = parser().parse_args()
    with utils.joined(args.device) as device, contextlib.ExitStack() as held:
        predict(args, device, held)


def predict(args, device, held):
    """The command; `held` keeps the lock of the folder that is written to."""
    run_dir = Path(args.run_dir)
    config = utils.load_config(run_dir, "vq_vae")
    models = utils.load_model(run_dir, "vq_vae", device), load_prior(run_dir, device)
    label = pick_label(args.label, config["data"]["classes"])
    if args.input:
        data = dataset.load_alone(args.input, config["data"]["size"])
        args.split, args.n_samples = "input", 0
    else:
        arguments = utils.data_arguments(args, dataset.load, config["data"]["arguments"])
        utils.announce(arguments)
        check_size(run_dir, config, arguments.get("image_size"))
        with utils.first_goes_first():
            data = dataset.load(**arguments)
    print(data.describe())
    check_size(run_dir, config, data.size)
    final = Path(args.out or run_dir / ("input" if args.input else "predict"))
    out = final / UNFINISHED  # so that a call that fails leaves the results of the last one alone
    has_samples = models[1] is not None and args.n_samples > 0
    with utils.first_goes_first():
        learned = training_data(config, data) if has_samples else None
    draw = functools.partial(
        draw_samples, args, models, label, learned or data, run_dir, device, out, config
    )
    if utils.processes()[0] > 0:  # all but the first help with the samples only
        if has_samples:
            draw()
        return
    held.enter_context(utils.only_one(final / ".lock"))
    utils.make_folder(out)
    remove(out, WRITTEN)
    result = {
        "reconstruction": None,
        "codebook": None,
        "rate": None,
        "prior": None,
        "samples": None,
        "protocol": PROTOCOL | {"split": args.split},
        "data": {"name": data.name, "is_phantom": data.is_phantom, "report": data.report},
        "seed": args.seed,
        "versions": utils.versions(),
    }
    names = {"name": data.name, "is_phantom": data.is_phantom}
    shown = config | {"data": config["data"] | names}  # for what is of `data`, not of the run's own
    codes, labels = score(args, models, data, run_dir, shown, device, out, result)
    if has_samples:
        images, result["samples"], folder = draw()
        if learned is not None:
            split = data[args.split]
            judge_samples(
                images, models[0], learned["train"], split, config, device, out, result, args.seed
            )
        complete(args, models, codes, labels, data[args.split], shown, device, out)
    utils.write_json(out / "metrics.json", result)
    plots.report(result, shown, out, run_dir)
    publish(out, final, folder if has_samples else None, args.n_samples)
    summarise(result, final, data, args.split)


def training_data(config, data):
    """The slices a run learned from: `data` if it is they; None where they are not to be found."""
    if data.fingerprint == config["data"]["fingerprint"]:
        return data
    try:
        learned = dataset.load(**{"data": "phantom"} | config["data"]["arguments"])
        if learned.fingerprint == config["data"]["fingerprint"]:
            return learned
        why = "they have changed"
    except UserError as error:
        why = str(error)
    print(f"note: samples are drawn, but not judged without what was learned from: {why}",
          file=sys.stderr)  # fmt: skip
    return None


def score(args, models, data, run_dir, config, device, out, result):
    """All that is known of the slices of a split; returns their codes (N, h, w) and labels (N,)."""
    vq_vae, prior = models
    split = data[args.split]
    rows, codes = score_reconstructions(vq_vae, split, config, device, out, result)
    labels = known_labels(split, config["data"]["classes"])
    if prior is not None:
        bits = score_prior(prior, codes, labels, split.positions, device, result)
        for row, of_slice in zip(rows, bits, strict=True):
            row["bits"] = float(of_slice.sum(dtype=np.float64))
            row["bits_per_code"] = row["bits"] / of_slice.size
        train_codes = None
        if data.fingerprint == config["data"]["fingerprint"]:
            train_codes = metrics.split_codes(run_dir, data, "train", device)
        elif stored := metrics.stored_codes(run_dir, "train", prior.config.n_embeddings):
            train_codes = stored[1]
        if train_codes is not None:
            result["prior"]["bits_per_code_without_network"] = metrics.known_code_bits(
                train_codes, codes.numpy(), prior.config.n_embeddings
            )
        write_surprise(bits, split, data, config, out, args.n_maps)
    write_rows(out / "per_slice.csv", split, rows)
    compare_rate(codes, rows, split, vq_vae.config.n_embeddings, result)
    return codes, labels


def remove(folder, patterns):
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()


def samples_in(folder):
    """{file of a sample: its number}; whatever else is in the folder is not ours."""
    found = {path: SAMPLE.fullmatch(path.name) for path in sorted(folder.glob("sample_*"))}
    return {path: int(match[1]) for path, match in found.items() if match}


def remove_samples(folder):
    (folder / "settings.json").unlink(missing_ok=True)  # first: what a kill leaves has no stamp
    for path in samples_in(folder):
        path.unlink()


def publish(out, final, folder, n_samples):
    """Move what this call wrote from `out` to `final`, in place of what an earlier one had.

    Args:
        folder: where the samples of this call are, below `out` or below `final`; None for none.
    """

    def files(top):
        there = [path for path in top.rglob("*") if path.is_file() and path.name[0] != "."]
        return [path for path in there if path.parent.name != "samples"]

    def move(path):
        target = final / path.relative_to(out)
        utils.make_folder(target.parent)
        path.replace(target)

    try:
        ours = {path.relative_to(out) for path in files(out)}
        for path in files(out):
            move(path)
        stale = [path for pattern in WRITTEN for path in final.glob(pattern)]
        for path in stale:
            if path.relative_to(final) not in ours:
                path.unlink()  # or it would pass for this call's
        if folder == out / "samples":
            remove_samples(final / "samples")
            for path in samples_in(folder):
                move(path)
            move(folder / "settings.json")
        if folder is not None:
            for path, i in samples_in(final / "samples").items():
                if i >= n_samples:
                    path.unlink()
            shutil.rmtree(out)
        elif not (out / "samples").exists():  # else of a call that may yet go on
            shutil.rmtree(out)
    except OSError as error:
        message = f"{error.filename or final}: cannot be replaced ({error.strerror})"
        raise UserError(message) from error


def check_size(run_dir, config, size):
    trained_on = config["data"]["size"]
    if size and list(size) != trained_on:
        raise UserError(
            f"{run_dir}: trained on slices of {trained_on[0]} x {trained_on[1]}, not of "
            f"{size[0]} x {size[1]}; train a run for that size, or give --image_size "
            f"{trained_on[0]} {trained_on[1]}"
        )


def load_prior(run_dir, device):
    """The prior of a run, trained on the codes of its VQ-VAE; None where there is none yet."""
    if not (run_dir / "pixelcnn" / "model.safetensors").exists():
        print(
            f"note: {run_dir} has no prior, so no samples are drawn; to train one run: "
            f"python train.py --mode pixelcnn --run_dir {run_dir}",
            file=sys.stderr,
        )
        return None
    first, config = (utils.load_config(run_dir, stage) for stage in utils.STAGES)
    f, k = first["model"].get("downsample", 8), first["model"].get("n_embeddings", 512)
    belongs = config["model"].get("size") == [n // f for n in first["data"]["size"]]
    belongs &= config["model"].get("n_embeddings") == k
    belongs &= config["model"].get("n_classes", 0) == len(first["data"]["classes"])
    made_for = utils.file_hash(run_dir / "vq_vae" / "model.safetensors")
    if not belongs or config["vq_vae"] != made_for:
        raise UserError(
            f"{run_dir}/pixelcnn: trained on codes of another VQ-VAE than {run_dir}/vq_vae; run: "
            f"python train.py --mode pixelcnn --run_dir {run_dir} --fresh"
        )
    return utils.load_model(run_dir, "pixelcnn", device)


def pick_label(name, classes):
    """Class name -> its number; None -> -1, any."""
    if name is None:
        return -1
    if name not in classes:
        there = f"choose one of {', '.join(classes)}" if classes else "this run has none"
        raise UserError(f"--label {name}: no such label; {there}")
    return classes.index(name)


def score_reconstructions(vq_vae, split, config, device, out, result):
    """Reconstruct `split`, draw its figures; returns a row per slice and the codes (N, h, w)."""
    rows, codes = [], []
    for x, x_hat, c in metrics.reconstruct(vq_vae, split, device, "reconstructing"):
        pairs = zip(x[:, 0].numpy(), x_hat[:, 0].numpy(), strict=True)
        rows += [metrics.slice_scores(*pair) for pair in pairs]
        codes.append(c)
    codes = torch.cat(codes)
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    patients, n = np.array(split.patients), len(rows)
    figures = {}
    for name, value in values.items():
        known = ~np.isnan(value)
        figures[f"{name}_mean"] = float(value[known].mean()) if known.any() else None
        figures[f"{name}_std"] = float(value[known].std()) if known.any() else None
        figures[f"{name}_ci95"] = metrics.patient_interval(value[known], patients[known])
    result["reconstruction"] = figures | {
        "n_slices": n,
        "n_patients": len(set(split.patients)),
        "per_patient": {
            p: {
                "ssim_mean": float(values["ssim"][patients == p].mean()),
                "n_slices": int((patients == p).sum()),
            }
            for p in sorted(set(split.patients))
        },
    }
    result["codebook"] = metrics.usage(codes, vq_vae.config.n_embeddings)

    ranks = np.unique(np.linspace(0, n - 1, min(n, N_RANKED)).round().astype(int))
    shown = np.argsort(values["ssim"], kind="stable")[ranks]
    x = split.batch(shown)[:, 0].numpy()
    titles = [f"SSIM {values['ssim'][i]:.3f}" for i in shown]
    titles[0] = f"worst, {titles[0]}"
    titles[-1] = f"best, {titles[-1]}"
    if len(ranks) == N_RANKED:
        titles[N_RANKED // 2] = f"median, {titles[N_RANKED // 2]}"
    again = metrics.through(vq_vae, x, device)
    plots.reconstructions(x, again, titles, out / "reconstructions.png", config, result["protocol"])
    shown = plots.picks(n, N_SHOWN)
    codebook = vq_vae.quantizer.codebook.detach().cpu().numpy()
    x = split.batch(shown)[:, 0].numpy()
    plots.codes(x, codes[shown].numpy(), codebook, out / "codes.png", config)
    plots.by_place(values["ssim"], split.positions, patients, out / "ssim.png", config)
    counts = np.bincount(codes.numpy().ravel(), minlength=vq_vae.config.n_embeddings)
    plots.usage(counts, out / "usage.png", config)
    ends = plots.picks(n, 4)
    if len(ends) == 4:
        images = interpolate(vq_vae, codes[ends], device)
        plots.interpolations(images, out / "interpolations.png", config)
    return rows, codes


@torch.inference_mode()
def interpolate(vq_vae, codes, device, n=7):
    """Codes of slices a, b, c, d -> images (2, n, H, W) on the way from a to b, and from c to d.

    The way is straight between the codebook vectors, and what lies on it is decoded as it is.
    """
    a, b = vq_vae.quantizer.lookup(codes.to(device)).unflatten(0, (2, 2)).unbind(1)
    t = torch.linspace(0, 1, n, device=device).view(1, n, 1, 1, 1)
    images = vq_vae.decoder(torch.lerp(a[:, None], b[:, None], t).flatten(0, 1))
    return images.clamp(0, 1)[:, 0].unflatten(0, (2, n)).cpu().numpy()


def write_rows(path, split, rows):
    """per_slice.csv: where each slice comes from, and its figures."""
    text = io.StringIO()
    names = ["patient", "volume", "position", "label"]
    writer = csv.DictWriter(text, ["index", "file", *names, *rows[0]])
    writer.writeheader()
    for i, (item, row) in enumerate(zip(split.slices, rows, strict=True)):
        origin = {name: getattr(item, name) for name in names}
        writer.writerow({"index": i, "file": Path(item.path).name, **origin, **row})
    utils.write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))


def known_labels(split, classes):
    """(N,) numbers of the slices' labels among the classes of the run, -1 for any other."""
    return np.array([classes.index(s.label) if s.label in classes else -1 for s in split.slices])


def score_prior(prior, codes, labels, positions, device, result):
    """Bits of every code (N, h, w) under the prior."""
    given = torch.from_numpy(labels), torch.from_numpy(positions)
    bits = metrics.code_bits(prior, codes, *given, device, "likelihood of codes")
    mean, n = float(bits.mean(dtype=np.float64)), codes[0].numel()
    result["prior"] = {
        "bits_per_code": mean,
        "bits_per_slice": mean * n,
        "codes_per_slice": n,
        "bits_per_code_without_network": None,
    }
    return bits


def compare_rate(codes, rows, split, n_embeddings, result):
    """Bits per slice of the codes, and what picture formats make of as many."""
    some = plots.picks(len(split), N_PACKED)
    bits = codes[0].numel() * math.log2(n_embeddings)
    result["rate"] = {
        "bits_per_slice": bits,
        "bits_per_slice_under_the_prior": (result["prior"] or {}).get("bits_per_slice"),
        "n_slices": len(some),
        "ssim_of_these": float(np.mean([rows[i]["ssim"] for i in some])),
        "at_as_many_bits": metrics.codec_ssim(split.batch(some)[:, 0].numpy(), bits),
    }


def write_surprise(bits, split, data, config, out, n_maps):
    """Maps of bits per code: a figure of some slices, and NIfTI files that lie on theirs."""
    shown = plots.picks(len(split), N_SHOWN)
    x = split.batch(shown)[:, 0].numpy()
    bodies = [metrics.body_mask(image) for image in x]
    plots.surprise(x, bits[shown], bodies, out / "surprise.png", config)
    folder, f = out / "surprise", config["model"]["downsample"]
    utils.make_folder(folder)
    for i in plots.picks(len(split), n_maps):
        item = split.slices[i]
        whole = bits[i].repeat(f, 0).repeat(f, 1)
        path = folder / f"{i:05d}_{Path(item.path).name.split('.')[0]}.nii.gz"
        save_nifti(whole, data.affine_of(item), path, "bits per code under the prior")


def save_nifti(image, affine, path, description):
    """Write an image (H, W) as NIfTI, whole or not at all."""
    nifti = nib.Nifti1Image(image[:, :, None], affine)
    nifti.header["descrip"] = description.encode()[:79]
    packed = gzip.compress(nifti.to_bytes(), mtime=0)
    utils.write_atomically(path, lambda temporary: temporary.write_bytes(packed))


def complete(args, models, codes, labels, split, config, device, out, n_draws=4):
    """Draw what is hidden of a few slices, from what is left, and show it."""
    vq_vae, prior = models
    h, w = prior.config.size
    lower, middle = torch.zeros(2, h, w, dtype=torch.bool)
    lower[h // 2 :] = True
    middle[h // 4 : h - h // 4, w // 4 : w - w // 4] = True
    rows = [(i, hidden) for hidden in (lower, middle) for i in plots.picks(len(split), 2)]
    given = torch.stack([codes[i].masked_fill(hidden, -1) for i, hidden in rows])
    which = np.repeat([i for i, _ in rows], n_draws)
    n = len(which)
    generators = [utils.generator(args.seed, i) for i in range(n)]
    drawn = prior.sample(
        n,
        label=torch.from_numpy(labels[which]),
        temperature=args.temperature,
        top_k=args.top_k,
        guidance=args.guidance,
        given=given.repeat_interleave(n_draws, 0),
        generator=generators,
        depth=split.positions[which],
    )
    with torch.inference_mode():
        whole = vq_vae.decode(codes[[i for i, _ in rows]].to(device))
        images = torch.cat([whole, vq_vae.decode(drawn)]).clamp(0, 1)[:, 0].cpu().numpy()
    f = config["model"]["downsample"]
    hidden = torch.stack([hidden for _, hidden in rows]).numpy().repeat(f, 1).repeat(f, 2)
    plots.completions(
        images[: len(rows)],
        hidden,
        images[len(rows) :].reshape(len(rows), n_draws, *images.shape[1:]),
        out / "completions.png",
        config,
        sampling_note(args),
    )


def sampling_note(args):
    note = f"temperature {args.temperature:g}, guidance {args.guidance:g}"
    return note + (f", top {args.top_k}" if args.top_k else "")


def draw_samples(args, models, label, data, run_dir, device, out, config):
    """Sample slices, each written as NIfTI and PNG as soon as it is drawn; figure of the first.

    Samples that an earlier call with the same models and settings has written, finished or not, are
    left as they are. Under torchrun each process draws its share. Returns the first `N_JUDGED`
    (N, H, W) in [0, 1], what metrics.json says of how they were drawn, and their folder.
    """
    vq_vae, prior = models
    made_by = [utils.file_hash(run_dir / stage / "model.safetensors") for stage in utils.STAGES]
    names = ("temperature", "guidance", "top_k", "label", "position")
    settings = {name: getattr(args, name) for name in names}
    stamp = {"models": made_by, "seed": args.seed, "data": data.fingerprint, **settings}

    def is_alike(folder):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((folder / "settings.json").read_text()) == stamp
        return False

    folder = out.parent / "samples"
    folder = folder if is_alike(folder) else out / "samples"
    if utils.processes()[0] == 0 and not is_alike(folder):
        remove_samples(folder)
        utils.write_json(folder / "settings.json", stamp)
    utils.wait_for_all()
    depths = data["train"].positions
    if args.position is not None:
        depths = np.array([args.position], np.float32)
    name = f"generated, no patient; like {utils.data_name(config)}"
    start, rows = time.perf_counter(), prior.config.size[0]
    images = [np.empty((0, *config["data"]["size"]), np.float32)]
    share = utils.share(args.n_samples)
    batches = range(share.start, share.stop, metrics.BATCH)
    bar = tqdm(total=len(batches) * rows, desc="sampling", unit="row")
    for first in batches:
        indices = range(first, min(first + metrics.BATCH, share.stop))
        paths = [folder / f"sample_{i:05d}.nii.gz" for i in indices]
        pictures = [path.with_name(path.name.replace("nii.gz", "png")) for path in paths]
        if first >= N_JUDGED and all(path.exists() for path in [*paths, *pictures]):
            bar.update(rows)
            continue
        # one generator a sample: sample i of a seed is the same whatever --n_samples is
        generators = [utils.generator(args.seed, i) for i in indices]
        picks = [torch.randint(len(depths), (), generator=g).item() for g in generators]
        codes = prior.sample(
            len(indices),
            label=label,
            temperature=args.temperature,
            top_k=args.top_k,
            guidance=args.guidance,
            generator=generators,
            depth=depths[picks],
            progress=bar.update,
        )
        with torch.inference_mode():
            drawn = vq_vae.decode(codes).clamp(0, 1)[:, 0].cpu().numpy()
        for image, path, picture in zip(drawn, paths, pictures, strict=True):
            if not (path.exists() and picture.exists()):
                save_nifti(in_units(image, data), data.affine, path, name)
                grey = Image.fromarray(utils.to_uint8(image))
                utils.write_atomically(picture, functools.partial(grey.save, format="PNG"))
        if first < N_JUDGED:
            images.append(drawn)
    bar.close()
    images = utils.gathered(torch.from_numpy(np.concatenate(images)))[:N_JUDGED].numpy()
    note = sampling_note(args)
    note += f", label {args.label}" if args.label else ""
    note += f", position {args.position:g}" if args.position is not None else ""
    if utils.processes()[0] == 0:
        plots.samples(images[:32], out / "samples.png", config, note)
    seconds = round(time.perf_counter() - start, 2)
    return images, {"n": args.n_samples, "seconds": seconds, **settings}, folder


def judge_samples(images, vq_vae, learned, split, config, device, out, result, seed):
    """Are the samples good, varied, new? Each figure beside that of as many real slices.

    The yardstick "real" are the slices `learned` from, judged against the split as the samples are;
    for novelty, slices of the split, looked up among the learned ones as the samples are.
    """
    n = min(len(images), len(split), len(learned), N_JUDGED)
    if n < 8:
        print(
            "note: samples are judged only where there are 8 of them, 8 slices to compare with, "
            "and 8 that were learned from",
            file=sys.stderr,
        )
        return
    rng = np.random.default_rng(seed)
    which = {
        name: np.sort(rng.choice(len(part), n, replace=False))
        for name, part in (("train", learned), ("held", split))
    }
    made = images[:n]
    real = {name: (learned if name == "train" else split).batch(which[name])[:, 0].numpy()
            for name in which}  # fmt: skip
    again = {name: metrics.through(vq_vae, x, device) for name, x in real.items()}
    held, train = real["held"], real["train"]
    seen = {"samples": made, "real": train, "reconstructions": again["held"]}
    features = {name: metrics.features(vq_vae, x, device) for name, x in seen.items()}
    of_held = metrics.features(vq_vae, held, device)

    result["samples"]["judged"] = n
    for name, measure in (
        ("wasserstein", lambda x, f: metrics.sliced_wasserstein(x, held, seed)),
        ("frechet", lambda x, f: metrics.frechet_distance(f, of_held)),
        ("precision", lambda x, f: metrics.precision_recall(of_held, f)[0]),
        ("recall", lambda x, f: metrics.precision_recall(of_held, f)[1]),
        ("pairwise_ssim", lambda x, f: metrics.pairwise_ssim(x, seed)),
    ):
        result["samples"][name] = {kind: measure(seen[kind], features[kind]) for kind in seen}
    best = {
        kind: metrics.nearest(seen[kind], split, desc=f"best match of {kind}")[1]
        for kind in ("samples", "real")
    }
    result["samples"]["best_match_ssim"] = {kind: float(x.mean()) for kind, x in best.items()}

    nearest, ssim = metrics.nearest(images, learned, desc="nearest training slice")
    _, of_real = metrics.nearest(held, learned, desc="the same for real slices")
    own = [metrics.slice_scores(x, y)["ssim"] for x, y in zip(train, again["train"], strict=True)]
    limit = float(np.percentile(own, 5))
    result["samples"]["nearest_training_ssim"] = {
        "samples": float(ssim.mean()),
        "real": float(of_real.mean()),
        "highest_sample": float(ssim.max()),
        "highest_real": float(of_real.max()),
        "looked_up": len(images),
        "copy_from": limit,
        "copies": [int(i) for i in np.flatnonzero(ssim >= limit)],
    }
    order = np.argsort(-ssim)[:N_SHOWN]
    neighbours = learned.batch(nearest[order])[:, 0].numpy()
    plots.nearest(images[order], neighbours, ssim[order], order, out / "nearest.png", config)

    groups = {"held": [split.patients[i] for i in which["held"]],
              "train": [learned.patients[i] for i in which["train"]]}  # fmt: skip
    if min(len(set(names)) for names in groups.values()) < 2:
        result["samples"]["two_sample_accuracy"] = None  # no patient would be left to test with
        return
    accuracy, interval = metrics.two_sample_accuracy(
        made, again["held"], groups["held"], seed=seed, desc="telling samples from real"
    )
    yardstick, _ = metrics.two_sample_accuracy(
        again["train"], again["held"], groups["held"], groups["train"], seed, desc="real from real"
    )
    result["samples"]["two_sample_accuracy"] = {
        "samples": accuracy, "samples_ci95": interval, "real": yardstick,
    }  # fmt: skip


def in_units(image, data):
    """A slice in [0, 1] -> the units of its data: integers, unless those are too coarse."""
    units = image * data.intensity_scale
    if data.intensity_scale >= 50:
        units = np.round(units).astype(np.int16 if data.intensity_scale < 2**15 else np.int32)
    return units


def summarise(result, out, data, split):
    """The lines a user reads first."""
    r, c, p, s = (result[k] for k in ("reconstruction", "codebook", "prior", "samples"))
    ci = r["ssim_ci95"]
    interval = f" (95 % {ci[0]:.4f} to {ci[1]:.4f})" if ci else ""
    print(f"data           {data.describe()}")
    print(
        f"reconstruction SSIM {r['ssim_mean']:.4f} +- {r['ssim_std']:.4f}{interval}, "
        f"PSNR {r['psnr_mean']:.2f} dB, {r['n_slices']} slices of {r['n_patients']} patients"
    )
    others = ", ".join(
        f"{name} {x['ssim']:.3f} at {x['bits']:.0f}"
        for name, x in result["rate"]["at_as_many_bits"].items()
    )
    print(f"rate           {result['rate']['bits_per_slice']:.0f} bits per slice; SSIM of {others}")
    print(f"codebook       {c['used']} of {c['size']} codes used, perplexity {c['perplexity']:.0f}")
    if p:
        bits = f"{p['bits_per_code']:.3f} bits per code, {p['bits_per_slice']:.0f} per slice"
        if known := p["bits_per_code_without_network"]:
            bits += f" (histogram of each position {known['position']:.3f}, xz {known['xz']:.3f})"
        print(f"prior          {bits}")
    if s:
        print(f"samples        {s['n']} in {s['seconds']:.1f} s")
        if "judged" in s:
            match, near, told = (
                s[k] for k in ("best_match_ssim", "nearest_training_ssim", "two_sample_accuracy")
            )
            line = f"best match in {split} {match['samples']:.3f} (real slices {match['real']:.3f})"
            line += f"; {len(near['copies'])} copies of training slices"
            if near["looked_up"] < s["n"]:
                line += f" among the first {near['looked_up']}"
            if told:
                share = 100 * told["samples"]
                line += f"; told from real ones {share:.0f} % of the time (50 is chance)"
            print(f"{'':15s}{line}")
    else:
        why = "--input" if split == "input" else "--n_samples 0" if p else "the run has no prior"
        print(f"samples        skipped ({why})")
    print(f"pictures and numbers are in {out}; all on one page: {out / 'report.html'}")


if __name__ == "__main__":
    utils.run_main(main)

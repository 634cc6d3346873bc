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
from dataclasses import dataclass
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
from modules import VQVAE, GatedPixelCNN
from utils import UserError

N_SHOWN = 6  # slices in most figures
N_RANKED = 7  # slices in the figure of reconstructions: worst, best, and those between
N_PACKED = 32  # slices packed by other codecs
N_JUDGED = 512  # samples at most that are compared with real slices
WRITTEN = ["metrics.json", "report.html", "per_slice.csv", "nearest.csv"]
WRITTEN += ["surprise/[0-9]*_*.nii.gz"]
WRITTEN += [f"{name}.png" for name in plots.CAPTIONS]
SAMPLE = re.compile(r"sample_\d{5,}\.(nii\.gz|png)")
UNFINISHED = ".unfinished"  # folder for what a call has written until it is done
PROTOCOL = {
    "images": "float32 in [0, 1]; reconstructions clipped to it",
    "arithmetic": "float32",
    "ssim": "skimage.metrics.structural_similarity, data_range=1, uniform 7 x 7 window",
    "ssim_gaussian": "the same, Gaussian window of sigma 1.5, population covariance (Wang 2004)",
    "ssim_body": "mean of the SSIM map where the slice shows body; slices without any left out",
    "psnr": "10 log10(1 / mean squared error) in dB, mean over slices",
    "interval": "95 %, bootstrap over patients, 2000 draws",
    "body": "largest region above 0.05 after a 3 x 3 mean, holes filled",
    "bits_per_code": "mean over slices of -log2 p(code | codes before it, label, position)",
    "rate": f"best quality whose 8-bit file, headers included, fits; else the worst; {N_PACKED} "
    "slices",
    "samples": f"the first {N_JUDGED} at most, but for copies, which are sought among all; against "
    "as many slices of the split; real: training slices; reconstructions: theirs",
    "pairwise_ssim": "mean over 512 random pairs",
    "nearest_training_ssim": "found as the best match is; real: slices of the split, looked up "
    "among the training slices; reconstructions: theirs",
    "wasserstein": "per Laplacian level, fine to coarse: 64 patches of 7 x 7 per slice, 256 "
    "directions, times 1000",
    "frechet": "of the encoder's output, averaged over each quarter of the slice",
    "precision, recall": "3 nearest neighbours, in the same features",
    "best_match_ssim": "nearest slice of the split: best SSIM among the 16 of least squared "
    "difference at a quarter of the resolution",
    "copies": "as near to a training slice as 95 % of training slices are to their "
    "reconstructions, as many as judged and 64 at least; those nearer to one than the "
    "reconstruction of any slice looked up beside them are named too",
    "two_sample_accuracy": "4 folds, by patient; a network of four strided convolutions on the "
    "slice and what a 3 x 3 mean takes away, "
    f"{metrics.JUDGE_UPDATES} updates and one for each slice it learns from, on crops of "
    f"{metrics.CROP}, as many of each kind; samples against reconstructions of the split, real: of "
    "training slices against the same; Wilson's interval, widened to that of a bootstrap over "
    "patients and samples",
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
        "--first_sample", type=utils.at_least(0), metavar="I", default=0,
        help="number of the first of them: with --n_samples 1, sample I of a seed alone",
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
        help="how much more a slice shall look like its position and label: 0 draws as learned, in "
        "half the time",
    )
    sample.add_argument(
        "--top_k", type=utils.at_least(1), metavar="K", help="draw among the K likeliest codes only"
    )
    sample.add_argument("--label", metavar="L", help="class to draw, or of --input (default: any)")
    sample.add_argument(
        "--position", type=fraction, metavar="X",
        help="place in the volume to draw, or of --input, 0 to 1 (default: those of the training "
        "slices, and unknown)",
    )
    utils.add_seed(sample)
    utils.add_runtime_arguments(p, precision=False)
    return p


def fraction(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


@dataclass
class Call:
    """What all parts of a call to predict.py share."""

    args: argparse.Namespace
    run_dir: Path
    device: torch.device
    config: dict  # of stage 1
    shown: dict  # the same, with the name of the data that is scored, for titles
    vq_vae: VQVAE
    prior: GatedPixelCNN | None
    split: dataset.SliceSplit  # that is scored
    out: Path  # where files are written until all is done
    result: dict  # what goes into metrics.json


def main():
    args = parser().parse_args()
    with utils.joined(args.device) as device, contextlib.ExitStack() as held:
        predict(args, device, held)


def predict(args, device, held):
    """The command; `held` keeps the lock of the folder that is written to."""
    torch.backends.cudnn.allow_tf32 = False  # or a GPU's figures are of 10 bits, not of float32
    run_dir = Path(args.run_dir)
    config = utils.load_config(run_dir, "vq_vae")
    vq_vae = utils.load_model(run_dir, "vq_vae", device)
    prior = load_prior(run_dir, vq_vae, device)
    if not utils.is_agreed([model.file_hash for model in (vq_vae, prior) if model]):
        raise UserError(f"{run_dir}: other weights were saved meanwhile; start again")
    label = pick_label(args.label, config["data"]["classes"])
    if args.input:
        of_all = args.label, -1.0 if args.position is None else args.position
        data = dataset.load_alone(args.input, config["data"]["size"], *of_all)
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
    call = Call(
        args, run_dir, device, config, config | {"data": config["data"] | names}, vq_vae, prior,
        data[args.split], final / UNFINISHED, result,
    )  # fmt: skip
    has_samples = prior is not None and args.n_samples > 0
    with utils.first_goes_first():
        learned = training_data(call, data) if has_samples else None
    if utils.processes()[0] > 0:  # all but the first help with the samples only
        if has_samples:
            draw_samples(call, label, learned or data)
        return
    held.enter_context(utils.only_one(final / ".lock"))
    if call.out.is_symlink():  # a stranger's link leads anywhere
        call.out.unlink()
    utils.make_folder(call.out)  # so that a call that fails leaves the results of the last one
    remove(call.out, WRITTEN)
    codes, labels = score(call, data)
    folder = None
    if has_samples:
        images, folder = draw_samples(call, label, learned or data)
        if learned is not None:
            first, n = args.first_sample, args.n_samples
            rest = [picture_of(folder, i) for i in range(first + len(images), first + n)]
            judge_samples(call, images, rest, learned["train"])
        complete(call, codes, labels)
    utils.write_json(call.out / "metrics.json", result)
    plots.report(result, call.shown, call.out, run_dir)
    publish(call.out, final, folder)
    summarise(result, final, data, args.split)


def training_data(call, data):
    """The slices a run learned from: `data` if it is they; None where they are not to be found."""
    its = call.config["data"]
    if data.fingerprint == its["fingerprint"]:
        return data
    here = {k: v for k, v in vars(call.args).items() if k in ("cache_dir", "workers")}
    try:
        learned = dataset.load(**{"data": "phantom"} | its["arguments"] | here)
        if learned.fingerprint == its["fingerprint"]:
            return learned
        why = "they have changed"
    except UserError as error:
        why = str(error)
    print(f"note: samples are drawn, but not judged without what was learned from: {why}",
          file=sys.stderr)  # fmt: skip
    return None


def score(call, data):
    """All that is known of the slices of a split; returns their codes (N, h, w) and labels (N,)."""
    split, prior, result = call.split, call.prior, call.result
    rows, codes = score_reconstructions(call)
    labels = known_labels(split, call.config["data"]["classes"])
    if prior is not None:
        bits = score_prior(call, codes, labels)
        for row, of_slice in zip(rows, bits, strict=True):
            row["bits"] = float(of_slice.sum(dtype=np.float64))
            row["bits_per_code"] = row["bits"] / of_slice.size
        train_codes = None
        if data.fingerprint == call.config["data"]["fingerprint"]:
            train_codes = metrics.split_codes(
                call.run_dir, data, "train", call.vq_vae, call.device
            )
        elif stored := metrics.stored_codes(call.run_dir, "train", prior.config.n_embeddings):
            train_codes = stored[1] if stored[1].shape[1:] == prior.config.size else None
        if train_codes is not None:
            result["prior"]["bits_per_code_without_network"] = metrics.known_code_bits(
                train_codes, codes.numpy(), prior.config.n_embeddings
            )
        write_surprise(call, bits, data)
    write_rows(call.out / "per_slice.csv", split, rows)
    compare_rate(call, codes, rows)
    return codes, labels


def remove(folder, patterns):
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        path.unlink()


def samples_in(folder):
    """The files of samples; whatever else is in the folder is not ours."""
    return [path for path in sorted(folder.glob("sample_*")) if SAMPLE.fullmatch(path.name)]


def remove_samples(folder):
    (folder / "settings.json").unlink(missing_ok=True)  # first: what a kill leaves has no stamp
    for path in samples_in(folder):
        path.unlink()


def publish(out, final, folder):
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
        # else a call may yet go on: one without samples was not asked, a long one takes hours
        n_left = len(samples_in(out / "samples")) // 2 if folder != out / "samples" else 0
        if not n_left or (folder is not None and n_left <= N_JUDGED):
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


def load_prior(run_dir, vq_vae, device):
    """The prior of a run, if it is of the codes of its `vq_vae`; else None, and a note."""
    note = "note: {}, so no samples are drawn; to train one run: python train.py --mode pixelcnn"
    note += f" --run_dir {run_dir}"
    if not (run_dir / "pixelcnn" / "model.safetensors").exists():
        print(note.format(f"{run_dir} has no prior"), file=sys.stderr)
        return None
    first, config = (utils.load_config(run_dir, stage) for stage in utils.STAGES)
    f, k = first["model"]["downsample"], first["model"]["n_embeddings"]
    belongs = config["model"].get("size") == [n // f for n in first["data"]["size"]]
    belongs &= config["model"].get("n_embeddings") == k
    belongs &= config["model"].get("n_classes", 0) == len(first["data"]["classes"])
    if config["vq_vae"] != vq_vae.file_hash:
        why = f"the prior of {run_dir} was trained on the codes of another VQ-VAE than is there now"
        print(note.format(why) + " --fresh", file=sys.stderr)
        return None
    if not belongs:
        raise UserError(
            f"{run_dir}/pixelcnn/config.json: not of the codes of {run_dir}/vq_vae; run: "
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


def score_reconstructions(call):
    """Reconstruct the split; returns a row per slice and the codes (N, h, w)."""
    split, rows, codes = call.split, [], []
    for x, x_hat, c in metrics.reconstruct(call.vq_vae, split, call.device, "reconstructing"):
        pairs = zip(x[:, 0].numpy(), x_hat[:, 0].numpy(), strict=True)
        rows += [metrics.slice_scores(*pair) for pair in pairs]
        codes.append(c)
    codes = torch.cat(codes)
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    patients, figures = np.array(split.patients), {}
    for name, value in values.items():
        known = ~np.isnan(value)
        figures[f"{name}_mean"] = float(value[known].mean()) if known.any() else None
        figures[f"{name}_std"] = float(value[known].std()) if known.any() else None
        figures[f"{name}_ci95"] = metrics.patient_interval(value[known], patients[known])
    call.result["reconstruction"] = figures | {
        "n_slices": len(rows),
        "n_patients": len(set(split.patients)),
        "per_patient": {
            p: {
                "ssim_mean": float(values["ssim"][patients == p].mean()),
                "n_slices": int((patients == p).sum()),
            }
            for p in sorted(set(split.patients))
        },
    }
    call.result["codebook"] = metrics.usage(codes, call.vq_vae.config.n_embeddings)
    draw_reconstructions(call, values["ssim"], codes)
    return rows, codes


def draw_reconstructions(call, ssim, codes):
    """The figures of stage 1, of ssim (N,) and codes (N, h, w) of the split."""
    split, vq_vae, out, config, n = call.split, call.vq_vae, call.out, call.shown, len(codes)
    ranks = np.unique(np.linspace(0, n - 1, min(n, N_RANKED)).round().astype(int))
    shown = np.argsort(ssim, kind="stable")[ranks]
    x = split.batch(shown)[:, 0].numpy()
    titles = [f"SSIM {ssim[i]:.3f}" for i in shown]
    if n > 1:
        titles[0], titles[-1] = f"worst\n{titles[0]}", f"best\n{titles[-1]}"
    if len(ranks) % 2 and n > 2:
        titles[len(ranks) // 2] = f"median\n{titles[len(ranks) // 2]}"
    again = metrics.through(vq_vae, x, call.device)
    path, protocol = out / "reconstructions.png", call.result["protocol"]
    plots.reconstructions(x, again, titles, path, config, protocol)
    shown = plots.picks(n, N_SHOWN)
    codebook = vq_vae.quantizer.codebook.detach().cpu().numpy()
    x = split.batch(shown)[:, 0].numpy()
    plots.codes(x, codes[shown].numpy(), codebook, out / "codes.png", config)
    patients = np.array(split.patients)
    plots.by_place(ssim, split.positions, patients, out / "ssim.png", config)
    counts = np.bincount(codes.numpy().ravel(), minlength=vq_vae.config.n_embeddings)
    plots.usage(counts, out / "usage.png", config)
    ends = plots.picks(n, 4)
    if len(ends) == 4:
        images = interpolate(vq_vae, codes[ends], call.device)
        plots.interpolations(images, out / "interpolations.png", config)


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
    pairs = zip(split.slices, rows, strict=True)
    write_csv(path, [{"index": i, **origin(item), **row} for i, (item, row) in enumerate(pairs)])


def origin(item):
    """Where a slice comes from, for a file of comma-separated values."""
    names = ["patient", "volume", "position", "label"]
    known = {name: getattr(item, name) for name in names}
    known["position"] = "" if item.position < 0 else item.position
    return {"file": Path(item.path).name, **known}


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    utils.write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))


def known_labels(split, classes):
    """(N,) numbers of the slices' labels among the classes of the run, -1 for any other."""
    return np.array([classes.index(s.label) if s.label in classes else -1 for s in split.slices])


def score_prior(call, codes, labels):
    """Bits of every code (N, h, w) under the prior."""
    given = torch.from_numpy(labels), torch.from_numpy(call.split.positions)
    bits = metrics.code_bits(call.prior, codes, *given, call.device, "likelihood of codes")
    of_slice = bits.mean((1, 2), dtype=np.float64)
    mean, n = float(of_slice.mean()), codes[0].numel()
    call.result["prior"] = {
        "bits_per_code": mean,
        "bits_per_code_ci95": metrics.patient_interval(of_slice, call.split.patients),
        "bits_per_slice": mean * n,
        "codes_per_slice": n,
        "bits_per_code_without_network": None,
    }
    return bits


def compare_rate(call, codes, rows):
    """Bits per slice of the codes, and what picture formats make of as many."""
    split = call.split
    some = plots.picks(len(split), N_PACKED)
    bits = codes[0].numel() * math.log2(call.vq_vae.config.n_embeddings)
    call.result["rate"] = {
        "bits_per_slice": bits,
        "bits_per_slice_under_the_prior": (call.result["prior"] or {}).get("bits_per_slice"),
        "n_slices": len(some),
        "ssim_of_these": float(np.mean([rows[i]["ssim"] for i in some])),
        "at_as_many_bits": metrics.codec_ssim(split.batch(some)[:, 0].numpy(), bits),
    }


def write_surprise(call, bits, data):
    """Maps of bits per code: a figure of some slices, and NIfTI files that lie on theirs."""
    split = call.split
    shown = plots.picks(len(split), N_SHOWN)
    x = split.batch(shown)[:, 0].numpy()
    bodies = [metrics.body_mask(image) for image in x]
    plots.surprise(x, bits[shown], bodies, call.out / "surprise.png", call.shown)
    folder, f = call.out / "surprise", call.vq_vae.config.downsample
    utils.make_folder(folder)
    for i in plots.picks(len(split), call.args.n_maps):
        item = split.slices[i]
        whole = bits[i].repeat(f, 0).repeat(f, 1)
        path = folder / f"{i:05d}_{Path(item.path).name.split('.')[0]}.nii.gz"
        save_nifti(whole, data.affine_of(item), path, "bits per code under the prior")


def save_nifti(image, affine, path, description):
    """Write an image (H, W) as NIfTI, whole or not at all."""
    nifti = nib.Nifti1Image(image[:, :, None], affine)
    nifti.header["descrip"] = description.encode()[:79]
    if not np.array_equal(affine, np.eye(4)):  # that of pictures, whose pixels have no size
        nifti.header.set_xyzt_units("mm")
    packed = gzip.compress(nifti.to_bytes(), mtime=0)
    utils.write_atomically(path, lambda temporary: temporary.write_bytes(packed))


def complete(call, codes, labels, n_draws=4):
    """Draw what is hidden of a few slices, from what is left, and show it."""
    args, split, vq_vae = call.args, call.split, call.vq_vae
    h, w = call.prior.config.size
    lower, middle = torch.zeros(2, h, w, dtype=torch.bool)
    lower[h // 2 :] = True
    middle[h // 4 : h - h // 4, w // 4 : w - w // 4] = True
    rows = [(i, hidden) for hidden in (lower, middle) for i in plots.picks(len(split), 2)]
    given = torch.stack([codes[i].masked_fill(hidden, -1) for i, hidden in rows])
    which = np.repeat([i for i, _ in rows], n_draws)
    n = len(which)
    generators = [utils.generator(args.seed, i) for i in range(n)]
    drawn = call.prior.sample(
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
        whole = vq_vae.decode(codes[[i for i, _ in rows]].to(call.device))
        images = torch.cat([whole, vq_vae.decode(drawn)]).clamp(0, 1)[:, 0].cpu().numpy()
    f = vq_vae.config.downsample
    hidden = torch.stack([hidden for _, hidden in rows]).numpy().repeat(f, 1).repeat(f, 2)
    plots.completions(
        images[: len(rows)],
        hidden,
        images[len(rows) :].reshape(len(rows), n_draws, *images.shape[1:]),
        call.out / "completions.png",
        call.shown,
        sampling_note(args),
    )


def sampling_note(args):
    note = f"temperature {args.temperature:g}, guidance {args.guidance:g}"
    return note + (f", top {args.top_k}" if args.top_k else "")


def picture_of(folder, i):
    return folder / f"sample_{i:05d}.png"


def draw_samples(call, label, data):
    """Sample slices, each written as NIfTI and PNG as soon as it is drawn; figure of the first.

    Samples that an earlier call with the same models and settings has written, finished or not, are
    left as they are. Under torchrun each process draws its share.

    Args:
        label: number of the class to draw, -1 for any. data: that the samples are to be like.
    Returns:
        images: the first `N_JUDGED` (N, H, W) in [0, 1]. folder: where all of them are.
    """
    args, prior, out = call.args, call.prior, call.out
    made_by = [call.vq_vae.file_hash, prior.file_hash]
    names = ("temperature", "guidance", "top_k", "label", "position")
    settings = {name: getattr(args, name) for name in names}
    stamp = {"models": made_by, "seed": args.seed, "data": data.fingerprint, **settings}
    stamp |= {"most_told": prior.MOST_TOLD, "block": metrics.BATCH}

    def is_alike(folder):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((folder / "settings.json").read_text()) == stamp
        return False

    folder = out.parent / "samples"
    for place in [folder] if is_alike(folder) else [folder, out / "samples"]:
        n_others = sum(path.suffix == ".png" for path in samples_in(place))
        if not is_alike(place) and n_others > max(args.n_samples, N_JUDGED):
            raise UserError(
                f"{place}: holds {n_others} samples of other settings, which this call would "
                "replace; give another --out, or delete them"
            )
    folder = folder if is_alike(folder) else out / "samples"
    if utils.processes()[0] == 0:
        remove(folder, [".*.tmp"])  # of a process that was killed
        if not is_alike(folder):
            remove_samples(folder)
            utils.write_json(folder / "settings.json", stamp)
    utils.wait_for_all()
    depths = data["train"].positions
    if args.position is not None:
        depths = np.array([args.position], np.float32)
    name = f"generated, no patient; like {utils.data_name(call.config)}"
    start, lines = time.perf_counter(), prior.config.lines[0]
    images = [np.empty((0, *data.size), np.float32)]
    wanted = range(args.first_sample, args.first_sample + args.n_samples)
    # whole blocks are drawn, always the same: products of another size round differently
    size = metrics.BATCH
    blocks = range(wanted.start // size, -(-wanted.stop // size))
    blocks = blocks[utils.share(len(blocks))]
    bar = tqdm(total=len(blocks) * lines, desc="sampling", unit="line")
    for block in blocks:
        indices = range(block * size, (block + 1) * size)
        kept = [i for i in indices if i in wanted]
        pictures = [picture_of(folder, i) for i in kept]
        paths = [picture.with_suffix(".nii.gz") for picture in pictures]
        is_judged = kept[0] < wanted.start + N_JUDGED
        if not is_judged and all(path.exists() for path in [*paths, *pictures]):
            bar.update(lines)
            continue
        # one generator a sample: sample i of a seed is the same whatever --n_samples is
        generators = [utils.generator(args.seed, i) for i in indices]
        picks = [torch.randint(len(depths), (), generator=g).item() for g in generators]
        codes = prior.sample(
            size,
            label=label,
            temperature=args.temperature,
            top_k=args.top_k,
            guidance=args.guidance,
            generator=generators,
            depth=depths[picks],
            progress=bar.update,
        )
        with torch.inference_mode():
            drawn = call.vq_vae.decode(codes).clamp(0, 1)[:, 0].cpu().numpy()
        drawn = drawn[kept[0] - indices.start :][: len(kept)]
        for image, path, picture in zip(drawn, paths, pictures, strict=True):
            if not (path.exists() and picture.exists()):
                save_nifti(in_units(image, data), data.affine, path, name)
                grey = Image.fromarray(utils.to_uint8(image))
                utils.write_atomically(picture, functools.partial(grey.save, format="PNG"))
        if is_judged:
            images.append(drawn)
    bar.close()
    images = utils.gathered(torch.from_numpy(np.concatenate(images)))[:N_JUDGED].numpy()
    note = sampling_note(args)
    note += f", label {args.label}" if args.label else ""
    note += f", position {args.position:g}" if args.position is not None else ""
    if utils.processes()[0] == 0:
        plots.samples(images[:32], out / "samples.png", call.config, note)
    seconds = round(time.perf_counter() - start, 2)
    counts = {"n": args.n_samples, "first": args.first_sample}
    call.result["samples"] = {**counts, "seconds": seconds, **settings}
    return images, folder


def judge_samples(call, images, rest, learned):
    """Are the samples good, varied, new? Each figure beside that of as many real slices.

    What is judged are the first, `images` (N, H, W) in [0, 1]; copies are sought among the others
    of a long export too, by their pictures, `rest`.

    The yardsticks are slices `learned` from ("real") and, as blurred as samples are, their
    reconstructions, judged against the split as the samples are; for novelty, slices of the split
    and theirs, looked up among the learned ones as the samples are.
    """
    args, split, vq_vae, device = call.args, call.split, call.vq_vae, call.device
    result, seed = call.result["samples"], args.seed
    n = min(len(images), len(split), len(learned), N_JUDGED)
    rng = np.random.default_rng(seed)
    pairs = [(x, np.sort(rng.choice(len(x), n, replace=False))) for x in (learned, split)]
    train, held = (x.batch(which)[:, 0].numpy() for x, which in pairs)
    train_groups, held_groups = ([x.patients[i] for i in which] for x, which in pairs)
    coded = metrics.through(vq_vae, held, device)  # as blurred as samples, which raises SSIM
    seek_copies(call, images, rest, held, coded, learned)
    if n < 8:
        print(
            "note: copies are looked for, but samples are judged further only where there are 8 of "
            "them, 8 slices to compare with, and 8 that were learned from",
            file=sys.stderr,
        )
        return
    if n < min(args.n_samples, N_JUDGED):
        few = min((len(split), f"the {args.split} split"), (len(learned), "training"))
        print(f"note: {n} samples are judged, as {few[1]} has no more slices", file=sys.stderr)
    if args.label or args.position is not None:
        print(
            "note: samples of one label or position are judged against slices of all, so that "
            "recall and variety say less",
            file=sys.stderr,
        )

    made, blurred = images[:n], metrics.through(vq_vae, train, device)
    seen = {"samples": made, "real": train, "reconstructions": blurred}
    features = {name: metrics.features(vq_vae, x, device) for name, x in seen.items()}
    of_held = metrics.features(vq_vae, held, device)
    result["judged"] = n
    among = {kind: metrics.precision_recall(of_held, f) for kind, f in features.items()}
    result |= {
        "wasserstein": {k: metrics.sliced_wasserstein(x, held, seed) for k, x in seen.items()},
        "frechet": {k: metrics.frechet_distance(f, of_held) for k, f in features.items()},
        "precision": {kind: precision for kind, (precision, _) in among.items()},
        "recall": {kind: recall for kind, (_, recall) in among.items()},
        "pairwise_ssim": {k: metrics.pairwise_ssim(x, seed) for k, x in seen.items()},
        "best_match_ssim": {
            kind: float(metrics.nearest(x, split, desc=f"best match of {kind}")[1].mean())
            for kind, x in seen.items()
        },
    }
    if min(len(set(names)) for names in (train_groups, held_groups)) < 2:
        result["two_sample_accuracy"] = None  # no patient would be left to test with
        return
    accuracy, interval = metrics.two_sample_accuracy(
        made, coded, held_groups, seed=seed, desc="telling samples from real"
    )
    yardstick, _ = metrics.two_sample_accuracy(
        blurred, coded, held_groups, train_groups, seed, desc="real from real"
    )
    result["two_sample_accuracy"] = {
        "samples": accuracy, "samples_ci95": interval, "real": yardstick,
    }  # fmt: skip


def seek_copies(call, images, rest, held, coded, learned):
    """Look samples up among the slices `learned` from; figure and table of the nearest.

    Args:
        images: the first samples (N, H, W) in [0, 1]; rest: pictures of the others, on disk.
        held, coded: real slices not learned from, and their reconstructions, looked up likewise.
    """
    first, device = call.args.first_sample, call.device

    def sample(i):
        if i < len(images):
            return images[i]
        with Image.open(rest[i - len(images)]) as picture:
            return np.asarray(picture, np.float32) / 255

    n_all = len(images) + len(rest)
    nearest, ssim = metrics.nearest(
        map(sample, range(n_all)), learned, desc="nearest training slice", total=n_all
    )
    _, of_real = metrics.nearest(held, learned, desc="the same for real slices")
    _, of_coded = metrics.nearest(coded, learned, desc="and for their reconstructions")
    some = learned.batch(plots.picks(len(learned), max(len(held), 64)))[:, 0].numpy()
    pairs = zip(some, metrics.through(call.vq_vae, some, device), strict=True)
    limit = float(np.percentile([metrics.slice_scores(x, y)["ssim"] for x, y in pairs], 5))
    call.result["samples"]["nearest_training_ssim"] = {
        "samples": float(ssim.mean()),
        "real": float(of_real.mean()),
        "reconstructions": float(of_coded.mean()),
        "highest_sample": float(ssim.max()),
        "highest_real": float(of_real.max()),
        "highest_reconstruction": float(of_coded.max()),
        "looked_up": n_all,
        "copy_from": limit,
        "copies": [int(i) for i in first + np.flatnonzero(ssim >= limit)],
        "nearer_than_any_reconstruction": [
            int(i) for i in first + np.flatnonzero(ssim > of_coded.max())
        ],
        "copies_among_real": int((of_real >= limit).sum()),
    }
    pairs = zip(nearest, ssim, strict=True)
    rows = [{"sample": i, "ssim": float(s), "copy": bool(s >= limit), **origin(learned.slices[k])}
            for i, (k, s) in enumerate(pairs, first)]  # fmt: skip
    write_csv(call.out / "nearest.csv", rows)
    order = np.argsort(-ssim)[:N_SHOWN]
    neighbours = learned.batch(nearest[order])[:, 0].numpy()
    titles = [(f"sample {rows[i]['sample']}" + rows[i]["copy"] * "\nA COPY",
               f"SSIM {ssim[i]:.3f}\n{rows[i]['patient'][-12:]}") for i in order]  # fmt: skip
    shown = np.stack([sample(i) for i in order])
    plots.nearest(shown, neighbours, titles, call.out / "nearest.png", call.config)


def in_units(image, data):
    """A slice in [0, 1] -> the units of its data: integers, unless those are too coarse."""
    units = image * data.intensity_scale + data.intensity_shift
    if data.intensity_scale >= 50:
        is_small = abs(data.intensity_shift) + data.intensity_scale < 2**15
        units = np.round(units).astype(np.int16 if is_small else np.int32)
    return units


def summarise(result, out, data, split):
    """The lines a user reads first."""
    r, c, p, s = (result[k] for k in ("reconstruction", "codebook", "prior", "samples"))
    ci = r["ssim_ci95"]
    interval = f" (95 % {ci[0]:.4f} to {ci[1]:.4f})" if ci else ""
    print(f"data           {data.describe()}")
    print(
        f"reconstruction SSIM {r['ssim_mean']:.4f} +- {r['ssim_std']:.4f}{interval}, "
        f"PSNR {r['psnr_mean']:.2f} dB, {r['n_slices']} slices of {r['n_patients']} "
        + ("bodies" if data.is_phantom else "patients")
    )
    others = ", ".join(
        f"{name} {x['ssim']:.3f} at {x['bits']:.0f}"
        for name, x in result["rate"]["at_as_many_bits"].items()
    )
    print(f"rate           {result['rate']['bits_per_slice']:.0f} bits per slice; SSIM of {others}")
    print(f"codebook       {c['used']} of {c['size']} codes used, perplexity {c['perplexity']:.0f}")
    if p:
        bits = f"{p['bits_per_code']:.3f} bits per code"
        if ci := p["bits_per_code_ci95"]:
            bits += f" (95 % {ci[0]:.3f} to {ci[1]:.3f})"
        bits += f", {p['bits_per_slice']:.0f} per slice"
        if known := p["bits_per_code_without_network"]:
            bits += f"; histogram of each position {known['position']:.3f}, xz {known['xz']:.3f}"
        print(f"prior          {bits}")
    if s:
        print(f"samples        {s['n']} in {s['seconds']:.1f} s")
        if near := s.get("nearest_training_ssim"):
            line = f"{len(near['copies'])} copies of training slices"
            if "judged" in s:
                match, told = s["best_match_ssim"], s["two_sample_accuracy"]
                real = f"(real slices {match['real']:.3f})"
                line = f"best match in {split} {match['samples']:.3f} {real}; {line}"
                if told:
                    share = 100 * told["samples"]
                    line += f"; told from reconstructions {share:.0f} % of the time (50: chance)"
            print(f"{'':15s}{line}")
    else:
        why = "--input" if split == "input" else "--n_samples 0" if p else "no prior"
        print(f"samples        skipped ({why})")
    print(f"pictures and numbers are in {out}; all on one page: {out / 'report.html'}")


if __name__ == "__main__":
    utils.run_main(main)

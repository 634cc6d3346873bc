"""How good reconstructions, codes and priors are: per slice, with uncertainty over patients.

The reported SSIM is scikit-image's own; `utils.ssim` is the same number, for the loss and for
validation on the device.
"""

import functools
import gzip
import lzma
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.metrics import structural_similarity
from tqdm import tqdm

import utils

BATCH = 32  # slices evaluated at a time; no figure depends on it


def _batches(n, desc):
    steps = range(0, n, BATCH)
    return (slice(i, min(i + BATCH, n)) for i in tqdm(steps, desc=desc, disable=desc is None))


@torch.inference_mode()
def reconstruct(model, split, device, desc=None):
    """Encode and decode a split.

    Args:
        model: `modules.VQVAE` in eval mode.
        split: `dataset.SliceSplit`.
        desc: name of the progress bar; None for no bar.
    Yields:
        x, x_hat: (B, 1, H, W) float32 on the CPU, x_hat clipped to [0, 1]; codes: (B, h, w) int64.
    """
    for part in _batches(len(split), desc):
        x = split.batch(np.arange(part.start, part.stop))
        x_hat, codes, _ = model(x.to(device, memory_format=torch.channels_last))
        yield x, x_hat.float().clamp(0, 1).cpu(), codes.cpu()


@torch.inference_mode()
def encode(model, split, device, desc=None):
    """Codes (N, h, w) int64 of a split, as numpy; arguments as `reconstruct`."""
    parts = [
        model.encode(
            split.batch(np.arange(part.start, part.stop)).to(
                device, memory_format=torch.channels_last
            )
        ).cpu()
        for part in _batches(len(split), desc)
    ]
    return torch.cat(parts).numpy()


def split_codes(run_dir, data, name, device, keep=True):
    """Codes (N, h, w) int64 of a split under the VQ-VAE of a run, as numpy.

    Read from RUN/codes where this VQ-VAE and these data made what is there; else made, and kept
    there if `keep`.
    """
    made_by = utils.file_hash(run_dir / "vq_vae" / "model.safetensors") + data.fingerprint
    path = run_dir / "codes" / f"{name}.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["made_by"]) == made_by:
                return stored["codes"].astype(np.int64)
    model = utils.load_model(run_dir, "vq_vae", device)
    codes = encode(model, data[name], device, f"encoding {name}")
    if keep:
        small = codes.astype(np.min_scalar_type(model.config.n_embeddings - 1))
        arrays = {"codes": small, "labels": data[name].labels, "made_by": made_by}
        arrays["positions"] = data[name].positions
        utils.write_atomically(path, functools.partial(_save_npz, arrays=arrays))
    return codes


def _save_npz(path, arrays):
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def bits(logits, codes):
    """-log2 p(code): logits (B, K, h, w), codes (B, h, w) -> (B, h, w)."""
    return F.cross_entropy(logits.float(), codes, reduction="none") / np.log(2)


@torch.inference_mode()
def code_bits(model, codes, labels, depths, device, desc=None):
    """Bits of every code under the prior; their sum over a grid is exactly -log2 p(grid).

    Args:
        model: `modules.GatedPixelCNN` in eval mode.
        codes: (N, h, w) int64 tensor.
        labels: (N,) int64 tensor, -1 for any.
        depths: (N,) float tensor in [0, 1], -1 for any.
    Returns:
        (N, h, w) numpy float32.
    """
    parts = []
    for part in _batches(len(codes), desc):
        batch, label, depth = (x[part].to(device) for x in (codes, labels, depths))
        parts.append(bits(model(batch, label, depth), batch).cpu())
    return torch.cat(parts).numpy()


def known_code_bits(train, codes, n_embeddings):
    """Mean bits per code by means that need no network: what a prior has to beat.

    Args:
        train, codes: (N, h, w) integers, to count in and to describe.
    Returns:
        dict: "uniform", log2 K; "unigram", how often each code is used in train; "position", the
        same at each place of the grid, mixed with the unigram in the proportion that serves it
        best; "gzip" and "xz", the packed file of all of `codes`.
    """
    k = n_embeddings
    unigram = np.bincount(train.ravel(), minlength=k) + 0.5
    unigram /= unigram.sum()
    places = np.arange(train[0].size).reshape(train[0].shape)
    counts = np.bincount((places * k + train).ravel(), minlength=places.size * k)
    seen, p = counts[places * k + codes], unigram[codes]
    mixed = [(seen + w * p) / (len(train) + w) for w in 2.0 ** np.arange(12)]
    small = codes.astype("<u2")
    raw = (small & 255).astype(np.uint8).tobytes() + (small >> 8).astype(np.uint8).tobytes()
    strongest = 9 | lzma.PRESET_EXTREME
    packed = {"gzip": gzip.compress(raw, 9), "xz": lzma.compress(raw, preset=strongest)}
    return {
        "uniform": math.log2(k),
        "unigram": float(-np.log2(p).mean()),
        "position": float(min(-np.log2(m).mean() for m in mixed)),
        **{name: 8 * len(data) / codes.size for name, data in packed.items()},
    }


def usage(codes, n_embeddings):
    """How a whole split uses the codebook: codes used at least once, and exp(entropy)."""
    counts = np.bincount(np.asarray(codes).ravel(), minlength=n_embeddings)
    p = counts[counts > 0] / counts.sum()
    return {
        "size": n_embeddings,
        "used": int((counts > 0).sum()),
        "perplexity": float(np.exp(-(p * np.log(p)).sum())),
    }


def psnr(mse):
    """Mean squared errors of images in [0, 1] -> dB, at most 100: a blank slice has no error."""
    return -10 * mse.clamp(min=1e-10).log10()


def body_mask(x):
    """Where the body is in a slice (H, W) in [0, 1]: its largest bright region, holes filled.

    Bright is above 0.05, half of what muscle has and above the noise of air. All False in a slice
    without such a pixel.
    """
    regions, n = ndimage.label(ndimage.uniform_filter(x, 3) > 0.05)
    if not n:
        return np.zeros(x.shape, bool)
    return ndimage.binary_fill_holes(regions == 1 + np.bincount(regions.flat)[1:].argmax())


def slice_scores(x, y):
    """Figures of y as a copy of x: (H, W) in [0, 1] each.

    Returns:
        "ssim", skimage's default; "ssim_gaussian", the window of Wang et al. 2004, NaN below its 11
        pixels; "ssim_body", the mean of the first one's map over `body_mask`, NaN without a body;
        "psnr" in dB; "mae".
    """
    mse = torch.tensor(np.mean((x - y) ** 2, dtype=np.float64))
    ssim, ssim_map = structural_similarity(x, y, data_range=1.0, full=True)
    gaussian = float("nan")
    if min(x.shape) >= 11:
        window = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        gaussian = float(structural_similarity(x, y, data_range=1.0, **window))
    body = body_mask(x)
    return {
        "ssim": float(ssim),
        "ssim_gaussian": gaussian,
        "ssim_body": float(ssim_map[body].mean()) if body.any() else float("nan"),
        "psnr": float(psnr(mse)),
        "mae": float(np.mean(np.abs(x - y), dtype=np.float64)),
    }


def patient_interval(values, patients, seed=0, n_draws=2000):
    """95 % interval of the mean over slices, by drawing whole patients with replacement.

    Slices of one patient are alike, so drawing slices would give an interval too narrow.

    Args:
        values: (N,); patients: (N,) names.
    Returns:
        [low, high]; None where there is only one patient, since nothing can be drawn.
    """
    names, which = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2:
        return None
    total = np.bincount(which, weights=values)
    count = np.bincount(which)
    draws = np.random.default_rng(seed).integers(len(names), size=(n_draws, len(names)))
    means = total[draws].sum(1) / count[draws].sum(1)
    return [float(q) for q in np.percentile(means, [2.5, 97.5])]

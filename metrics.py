"""How good reconstructions, codes and priors are: per slice, with uncertainty over patients.

The reported SSIM is scikit-image's own; `utils.ssim` is the same number, for the loss and for
validation on the device.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.metrics import structural_similarity
from tqdm import tqdm

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


def bits(logits, codes):
    """-log2 p(code): logits (B, K, h, w), codes (B, h, w) -> (B, h, w)."""
    return F.cross_entropy(logits.float(), codes, reduction="none") / np.log(2)


@torch.inference_mode()
def bits_per_code(model, codes, labels, depths, device, desc=None):
    """Mean bits per code of each slice under the prior.

    Args:
        model: `modules.GatedPixelCNN` in eval mode.
        codes: (N, h, w) int64 tensor.
        labels: (N,) int64 tensor, -1 for any.
        depths: (N,) float tensor in [0, 1], -1 for any.
    Returns:
        (N,) numpy float32.
    """
    parts = []
    for part in _batches(len(codes), desc):
        batch, label, depth = (x[part].to(device) for x in (codes, labels, depths))
        parts.append(bits(model(batch, label, depth), batch).mean((1, 2)).cpu())
    return torch.cat(parts).numpy()


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

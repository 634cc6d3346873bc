"""How good reconstructions, codes and priors are: per slice, with uncertainty over patients.

The reported SSIM is scikit-image's own; `utils.ssim` is the same number, for the loss and for
validation on the device.
"""

import contextlib
import functools
import gzip
import io
import itertools
import lzma
import math
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.metrics import structural_similarity
from torch import nn
from tqdm import tqdm

import utils
from utils import UserError

BATCH = 32  # slices evaluated at a time
CROP = 64  # pixels of a side that the network of the two-sample test learns from
JUDGE_UPDATES = 400  # of that network, and one more for each image it is shown


def _batches(n, desc, share=slice(None)):
    start, stop, _ = share.indices(n)
    steps = range(start, stop, BATCH)
    return (slice(i, min(i + BATCH, stop)) for i in tqdm(steps, desc=desc, disable=desc is None))


@torch.inference_mode()
def reconstruct(model, split, device, desc=None, share=slice(None)):
    """Encode and decode a split.

    Args:
        model: `modules.VQVAE` in eval mode.
        split: `dataset.SliceSplit`.
        desc: name of the progress bar; None for no bar.
        share: slice, of the split.
    Yields:
        x, x_hat: (B, 1, H, W) float32 on the CPU, x_hat clipped to [0, 1]; codes: (B, h, w) int64.
    """
    for part in _batches(len(split), desc, share):
        x = split.batch(np.arange(part.start, part.stop))
        x_hat, codes, _ = model(x.to(device, memory_format=torch.channels_last))
        yield x, x_hat.float().clamp(0, 1).cpu(), codes.cpu()


@torch.inference_mode()
def _mapped(network, images, device, desc=None):
    """What a network makes of a split, or of images (N, H, W) in [0, 1], on the CPU."""
    parts = []
    for part in _batches(len(images), desc):
        if isinstance(images, np.ndarray):
            x = torch.from_numpy(np.ascontiguousarray(images[part], dtype=np.float32))[:, None]
        else:
            x = images.batch(np.arange(part.start, part.stop))
        parts.append(network(x.to(device, memory_format=torch.channels_last)).cpu())
    return torch.cat(parts)


def split_codes(run_dir, data, name, model, device):
    """Codes (N, h, w) int64 of a split under a run's VQ-VAE, `model`, loaded, as numpy.

    Read from RUN/codes where this VQ-VAE and these data made what is there; else made, and kept if
    the run can be written to.
    """
    made_by = model.file_hash + data.fingerprint
    shape = len(data[name]), *(n // model.config.downsample for n in data.size)
    stored = stored_codes(run_dir, name, model.config.n_embeddings)
    if stored is not None and stored[0] == made_by and stored[1].shape == shape:
        return stored[1]
    codes = _mapped(model.encode, data[name], device, f"encoding {name}").numpy()
    small = codes.astype(np.min_scalar_type(model.config.n_embeddings - 1))
    arrays = {"codes": small, "labels": data[name].labels, "positions": data[name].positions}
    save = functools.partial(_save_npz, arrays=arrays | {"made_by": made_by})
    if utils.processes()[0] == 0:
        with contextlib.suppress(UserError):
            utils.write_atomically(run_dir / "codes" / f"{name}.npz", save)
    return codes


def stored_codes(run_dir, name, n_embeddings):
    """(What made them, codes (N, h, w) int64) from RUN/codes; None if not there, or damaged."""
    path = run_dir / "codes" / f"{name}.npz"
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            utils.check_unpacked(archive, most=100)
            for entry in archive.infolist():  # or numpy makes room for what a header says
                with archive.open(entry) as array:
                    np.lib.format.read_magic(array)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(array)
                    if math.prod(shape) * dtype.itemsize > entry.file_size:
                        raise ValueError("cut short")
        with np.load(path) as stored:
            made_by, codes = str(stored["made_by"]), stored["codes"].astype(np.int64)
        is_ours = codes.ndim == 3 and codes.size and 0 <= codes.min() <= codes.max() < n_embeddings
        return (made_by, codes) if is_ours else None
    except Exception:  # whatever is wrong with a file of codes, they can be made again
        return None


def _save_npz(path, arrays):
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def bits(logits, codes):
    """-log2 p(code): logits (B, K, h, w), codes (B, h, w) -> (B, h, w)."""
    rows = logits.movedim(1, -1).flatten(0, 2)  # as channels_last has them: twice as fast
    nats = F.cross_entropy(rows.float(), codes.flatten(), reduction="none")
    return nats.view(codes.shape) / np.log(2)


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
    mixed = ((seen + w * p) / (len(train) + w) for w in 2.0 ** np.arange(12))
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


CODECS = {  # how each picture format is asked for one of 64 qualities
    "JPEG": lambda q: dict(format="JPEG", quality=1 + q * 99 // 63, optimize=True),
    "WebP": lambda q: dict(format="WEBP", quality=q * 100 // 63, method=4),
    "JPEG 2000": lambda q: dict(
        format="JPEG2000", quality_mode="rates", quality_layers=[2000 * 0.9**q], irreversible=True
    ),
}


def codec_ssim(images, bits):
    """SSIM of common picture formats at a rate, as 8-bit grey: what a reader can compare with.

    Args:
        images: (N, H, W) in [0, 1]; bits: that each file may have, headers included.
    Returns:
        {format: {"ssim", "bits"}}, means over the slices, each at the best quality that fits, or at
        the worst there is if none does.
    """
    found = {}
    for name, options in CODECS.items():
        scores = []
        for x in images:
            low, high = 0, 63  # bisection: files grow with the quality
            while low < high:
                middle = (low + high + 1) // 2
                is_small = 8 * len(_packed(x, options(middle))) <= bits
                low, high = (middle, high) if is_small else (low, middle - 1)
            packed = _packed(x, options(low))
            with Image.open(io.BytesIO(packed)) as picture:
                y = np.asarray(picture.convert("L"), np.float32) / 255
            scores.append((structural_similarity(x, y, data_range=1.0), 8 * len(packed)))
        ssim, size = np.mean(scores, axis=0)
        found[name] = {"ssim": float(ssim), "bits": float(size)}
    return found


def _packed(x, options):
    file = io.BytesIO()
    Image.fromarray(utils.to_uint8(x)).save(file, **options)
    return file.getvalue()


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


# ------------------------------------------------------------------------------------------------
# Samples: are they good, are they varied, are they new
# ------------------------------------------------------------------------------------------------


def features(model, images, device):
    """What the VQ-VAE's encoder sees in images (N, H, W) in [0, 1]: (N, 4 D) float64.

    Its output, averaged over each quarter of the slice.
    """

    def quarters(x):
        return F.adaptive_avg_pool2d(model.encoder(x).float(), 2).flatten(1)

    return _mapped(quarters, images, device).double().numpy()


def through(model, images, device):
    """Images (N, H, W) in [0, 1] -> their reconstructions (N, H, W), clipped."""
    return _mapped(lambda x: model(x)[0][:, 0].float().clamp(0, 1), images, device).numpy()


def frechet_distance(a, b):
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features (N, D), (M, D)."""
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values = np.linalg.eigvals(covariances[0] @ covariances[1]).real  # never below 0, but rounding
    trace = sum(np.trace(c) for c in covariances) - 2 * np.sqrt(values.clip(min=0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + trace)


def sliced_wasserstein(a, b, seed=0, n_patches=64, n_directions=256, size=7):
    """Sliced Wasserstein distance between the patches of two sets of images, per Laplacian level.

    Karras et al. 2018 (arXiv 1710.10196) section 5: 7 x 7 patches of each level of a Laplacian
    pyramid, each level standardised, compared along random directions. The finest level is first;
    it tells of texture, the last of shapes.

    Args:
        a, b: (N, H, W) and (N, H, W), as many of each.
    Returns:
        one distance per level, times 1000.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = zip(_laplacian(a), _laplacian(b), strict=True)
    return [_swd(x, y, generator, n_patches, n_directions, size) for x, y in levels]


def _laplacian(images):
    """Images (N, H, W) -> differences between each level and the next, until 16 pixels are left."""
    x = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))[:, None]
    levels = []
    while min(x.shape[2:]) >= 32:
        small = F.avg_pool2d(x, 2)
        levels.append(x - F.interpolate(small, x.shape[2:], mode="bilinear"))
        x = small
    return [*levels, x]


def _swd(x, y, generator, n_patches, n_directions, size):
    rows, columns = (n - size + 1 for n in x.shape[2:])
    sets = []
    for images in (x, y):
        n = len(images)
        i = torch.randint(rows, (n, n_patches), generator=generator)
        j = torch.randint(columns, (n, n_patches), generator=generator)
        windows = images[:, 0].unfold(1, size, 1).unfold(2, size, 1)  # (N, rows, columns, 7, 7)
        patches = windows[torch.arange(n)[:, None], i, j].flatten(0, 1).flatten(1)
        sets.append((patches - patches.mean()) / patches.std().clamp(min=1e-8))
    directions = torch.randn(size * size, n_directions, generator=generator)
    directions /= directions.norm(dim=0)
    a, b = ((patches @ directions).sort(0).values for patches in sets)
    return float((a - b).abs().mean() * 1000)


def precision_recall(real, made, k=3):
    """Share of made features among the real ones, and of real among the made.

    Kynkaanniemi et al. 2019 (arXiv 1904.06991): a point is among a set if it is nearer to one of
    them than that one's k-th nearest neighbour. Precision is low if samples are bad, recall if they
    lack variety.
    """
    between = cdist(real, made)  # (R, M)

    def radii(points):
        own = np.sort(cdist(points, points), axis=1)
        return own[:, min(k, len(points) - 1)]  # the 0-th is the point itself

    precision = (between <= radii(real)[:, None]).any(0).mean()
    recall = (between <= radii(made)[None]).any(1).mean()
    return float(precision), float(recall)


def nearest(images, reference, n_candidates=16, desc=None, total=None):
    """The reference slice most like each image by SSIM.

    Candidates are those with the least mean squared difference at a quarter of the resolution.

    Args:
        images: N of (H, W) in [0, 1]; total: how many, for the bar, where `images` does not tell.
        reference: `dataset.SliceSplit` of R slices.
    Returns:
        indices (N,) into reference, their SSIM (N,).
    """

    def small(x):
        return F.avg_pool2d(x, 4).flatten(1)

    parts = _batches(len(reference), None)
    coarse = torch.cat([small(reference.batch(np.arange(p.start, p.stop))) for p in parts])
    best = []
    for image in tqdm(images, desc=desc, total=total, unit="slice", disable=desc is None):
        x = torch.from_numpy(np.asarray(image, dtype=np.float32))[None, None]
        far = (coarse - small(x)).square().sum(1)
        candidates = far.topk(min(n_candidates, len(reference)), largest=False).indices.numpy()
        ssim = utils.ssim(x.expand(len(candidates), -1, -1, -1), reference.batch(candidates))
        best.append((candidates[int(ssim.argmax())], float(ssim.max())))
    indices, ssim = zip(*best, strict=True)
    return np.array(indices), np.array(ssim)


def pairwise_ssim(images, seed=0, n_pairs=512):
    """Mean SSIM of random pairs of images (N, H, W): lower is more varied."""
    n = len(images)
    rng = np.random.default_rng(seed)
    first = rng.integers(n, size=n_pairs)
    second = (first + rng.integers(1, n, size=n_pairs)) % n
    x = torch.from_numpy(np.asarray(images, dtype=np.float32))[:, None]
    parts = [utils.ssim(x[first[p]], x[second[p]]) for p in _batches(n_pairs, None)]
    return float(torch.cat(parts).mean())


def two_sample_accuracy(
    made, real, real_groups, made_groups=None, seed=0, n_folds=4, desc=None
):
    """How well a small network tells made images from real ones that it has not seen.

    Cross-validated; the slices of a group (a patient) are in one fold. As many of each are shown in
    training, however many a fold has left. 0.5 is indistinguishable.

    Args:
        made, real: (N, H, W) in [0, 1], as many of each.
        real_groups, made_groups: N names each; None where each image is a group of its own.
    Returns:
        accuracy, its 95 % interval: Wilson's, which takes slices for independent, widened to that
        of `patient_interval` where this reaches further.
    """
    groups = (np.arange(len(made)) if made_groups is None else made_groups, real_groups)
    fold = np.concatenate([_folds(names, seed + i) % n_folds for i, names in enumerate(groups)])
    x = torch.from_numpy(np.concatenate([made, real]).astype(np.float32))[:, None]
    # fine texture as a channel of its own: next to the shapes it is too faint to be learned from
    x = torch.cat([x, 10 * (x - F.avg_pool2d(x, 3, 1, 1))], 1)
    y = torch.cat([torch.ones(len(made)), torch.zeros(len(real))])
    right = np.zeros(len(y))
    with torch.random.fork_rng(devices=[]):
        for k in tqdm(range(n_folds), desc=desc, unit="fold", disable=desc is None):
            torch.manual_seed(seed + k)
            seen, held = (torch.from_numpy(np.flatnonzero(m)) for m in (fold != k, fold == k))
            if len(held):
                network = _judge(x[seen], y[seen])
                with torch.inference_mode():  # crops, as in its training: whole slices are unlike
                    scores = [network(crop)[:, 0] for crop in _crops(x[held])]
                right[held] = (torch.stack(scores).mean(0) > 0) == y[held].bool()
    names = [f"{kind} {name}" for kind, of_kind in enumerate(groups) for name in of_kind]
    accuracy, interval = _wilson(right.sum(), len(right))
    low, high = zip(interval, patient_interval(right, names), strict=True)
    return accuracy, [min(low), max(high)]


def _crops(x):
    """Images (N, C, H, W) -> crops (N, C, CROP, CROP) that overlap by half; all of x if small."""
    starts = (range(0, max(1, n - CROP + 1), CROP // 2) for n in x.shape[2:])
    return [x[:, :, i : i + CROP, j : j + CROP] for i, j in itertools.product(*starts)]


def _folds(names, seed):
    """N names -> N numbers, the same for the same name, in an order of chance."""
    _, which = np.unique(np.asarray(names), return_inverse=True)
    return np.random.default_rng(seed).permutation(which.max() + 1)[which]


def _judge(x, y):
    """A small convolutional classifier, trained on crops: what gives a sample away is texture."""
    layers, channels = [], x.shape[1]
    for width in (16, 32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(4, width)]
        layers.append(nn.ReLU())
        channels = width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    n_updates, kinds = JUDGE_UPDATES + len(x), [torch.nonzero(y == kind)[:, 0] for kind in (0, 1)]
    for update in range(n_updates):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, 10 * update / n_updates, 1 - update / n_updates)
        batch = torch.cat([of[torch.randint(len(of), (BATCH // 2,))] for of in kinds])
        i, j = (int(torch.randint(max(1, n - CROP + 1), ())) for n in x.shape[2:])
        crops = x[batch, :, i : i + CROP, j : j + CROP]
        loss = F.binary_cross_entropy_with_logits(network(crops)[:, 0], y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def _wilson(right, n, z=1.96):
    p = float(right / n)
    centre, scale = (p + z * z / (2 * n)), 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]

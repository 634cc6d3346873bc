"""Figures against closed forms."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity

import metrics
from modules import GatedPixelCNN, PixelCNNConfig


def test_usage_of_a_codebook():
    even = metrics.usage(np.arange(8).repeat(3), 16)
    assert (even["used"], even["size"]) == (8, 16)
    assert even["perplexity"] == pytest.approx(8)
    p = np.array([0.5, 0.25, 0.25])
    uneven = metrics.usage(np.array([0, 0, 1, 2]), 16)
    assert uneven["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_bits_of_a_prior_that_knows_nothing_are_log2_k():
    torch.manual_seed(0)
    model = GatedPixelCNN(PixelCNNConfig(16, (3, 4), n_channels=4, n_layers=1)).eval()
    model.head[-1].weight.data.zero_()
    model.head[-1].bias.data.zero_()
    codes = torch.randint(16, (5, 3, 4))
    bits = metrics.code_bits(model, codes, torch.full((5,), -1), torch.rand(5), "cpu")
    assert bits == pytest.approx(np.full((5, 3, 4), 4.0), abs=1e-5)


def test_known_code_bits_against_entropies():
    rng = np.random.default_rng(0)
    places = rng.integers(0, 64, (6, 8))  # what lies where is fixed, but for one code in two
    train, test = (
        np.where(rng.random((n, 6, 8)) < 0.5, places, rng.integers(0, 64, (n, 6, 8)))
        for n in (3000, 500)
    )
    bits = metrics.known_code_bits(train, test, 64)
    p = 0.5 + 0.5 / 64
    exact = -p * np.log2(p) - 63 * (0.5 / 64) * np.log2(0.5 / 64)
    assert bits["uniform"] == 6
    assert bits["position"] == pytest.approx(exact, abs=0.05)
    seen = np.bincount(train.ravel(), minlength=64) / train.size
    expected = -np.log2(seen[test]).mean()
    assert bits["unigram"] == pytest.approx(expected, abs=1e-3)
    for name in ("gzip", "xz"):  # no packer beats the entropy, none needs more than the bytes
        assert exact < bits[name] < 8


def test_code_bits_add_up_to_the_likelihood_of_the_grid():
    torch.manual_seed(0)
    model = GatedPixelCNN(PixelCNNConfig(3, (2, 2), n_channels=4, n_layers=1)).eval()
    grids = torch.cartesian_prod(*[torch.arange(3)] * 4).view(-1, 2, 2)
    n = len(grids)
    bits = metrics.code_bits(model, grids, torch.full((n,), -1), torch.full((n,), -1.0), "cpu")
    assert (2.0 ** -bits.astype(float).sum((1, 2))).sum() == pytest.approx(1, abs=1e-5)


def test_psnr_and_mean_absolute_error():
    x = np.full((16, 16), 0.5, np.float32)
    scores = metrics.slice_scores(x, x + np.float32(0.1))
    assert scores["psnr"] == pytest.approx(20, abs=1e-3)
    assert scores["mae"] == pytest.approx(0.1, abs=1e-6)
    assert metrics.slice_scores(x, x)["psnr"] == 100


def test_body_mask_is_the_largest_region_with_its_holes():
    x = np.zeros((40, 40), np.float32)
    x[8:30, 10:28] = 0.5
    x[15:20, 15:20] = 0  # a dark organ
    x[36:39, 36:39] = 0.9  # something beside the body
    mask = metrics.body_mask(x)
    assert mask[8:30, 10:28].all()
    assert mask.sum() <= 24 * 20  # the edge is smeared by a pixel
    assert not metrics.body_mask(np.zeros_like(x)).any()


def test_gaussian_ssim_against_the_formula_of_2004():
    """An 11 x 11 window of sigma 1.5 within the slice, weighed sums, C1 = 0.01^2, C2 = 0.03^2."""
    rng = np.random.default_rng(0)
    x = ndimage.gaussian_filter(rng.random((40, 30)), 2).astype(np.float32)
    y = (x + 0.05 * rng.standard_normal(x.shape)).clip(0, 1).astype(np.float32)
    i = np.arange(-5, 6)
    window = np.exp(-(i[:, None] ** 2 + i**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for r in range(5, 35):
        for c in range(5, 25):
            a, b = (z[r - 5 : r + 6, c - 5 : c + 6].astype(float) for z in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            top = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    found = metrics.slice_scores(x, y)["ssim_gaussian"]
    assert found == pytest.approx(np.mean(values), abs=1e-5)
    assert np.isnan(metrics.slice_scores(x[:10], y[:10])["ssim_gaussian"])


def test_black_background_does_not_count_in_the_body():
    rng = np.random.default_rng(0)
    x = np.zeros((64, 64), np.float32)
    x[16:48, 16:48] = 0.5 + 0.2 * rng.random((32, 32))
    y = np.where(x > 0, x + 0.1 * rng.standard_normal(x.shape), 0).astype(np.float32)
    scores = metrics.slice_scores(x, y)
    _, every = structural_similarity(x, y, data_range=1.0, full=True)
    assert scores["ssim_body"] == pytest.approx(every[metrics.body_mask(x)].mean())
    assert scores["ssim_body"] < scores["ssim"] - 0.1
    assert np.isnan(metrics.slice_scores(np.zeros_like(x), y)["ssim_body"])


def test_codecs_use_the_bits_they_may_and_no_more():
    rng = np.random.default_rng(0)
    x = ndimage.gaussian_filter(rng.random((2, 128, 96)), (0, 3, 3)).astype(np.float32)
    x = (x - x.min()) / np.ptp(x)
    few, many = (metrics.codec_ssim(x, bits) for bits in (10_000, 30_000))
    for name in ("JPEG", "WebP", "JPEG 2000"):
        assert few[name]["bits"] <= 10_000
        assert 15_000 < many[name]["bits"] <= 30_000
        assert few[name]["ssim"] < many[name]["ssim"]
    nothing = metrics.codec_ssim(x, 1)
    assert nothing["JPEG"]["bits"] > 1  # even the least does not fit, and that is told


def test_interval_draws_patients_not_slices():
    rng = np.random.default_rng(0)
    level = rng.normal(0, 1, 8)
    patients = np.repeat(np.arange(8).astype(str), 50)
    values = np.repeat(level, 50) + rng.normal(0, 0.01, 400)
    low, high = metrics.patient_interval(values, patients)
    assert low < values.mean() < high
    # the spread of a mean of 8 patients, ten times that of a mean of 400 slices
    expected = 2 * 1.96 * level.std() / np.sqrt(8)
    assert high - low == pytest.approx(expected, rel=0.15)
    assert metrics.patient_interval(values, np.full(400, "one")) is None


# --------------------------------------------------------------------------------- samples


def test_frechet_distance_of_two_normals_is_the_closed_form():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 1, (200_000, 2)) * (1, 3)
    b = rng.normal(0, 1, (200_000, 2)) * (2, 3) + (1, 0)
    assert metrics.frechet_distance(a, b) == pytest.approx(1 + (2 - 1) ** 2, abs=0.05)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_sliced_wasserstein_sees_texture_at_the_fine_level_and_shape_at_the_coarse():
    rng = np.random.default_rng(0)
    shapes = ndimage.gaussian_filter(rng.random((2, 24, 64, 64)), (0, 0, 8, 8)) * 20
    noise = 0.05 * rng.standard_normal((2, 24, 64, 64))
    a, b = shapes + noise
    same = metrics.sliced_wasserstein(a, b)
    smooth = metrics.sliced_wasserstein(a, ndimage.uniform_filter(b, (0, 3, 3)))
    assert len(same) == 3  # 64, 32 and 16 pixels
    assert smooth[0] > 1.5 * same[0]
    assert smooth[-1] < 1.2 * same[-1]
    assert metrics.sliced_wasserstein(a, a)[0] < same[0]  # other patches of the same slices


def test_precision_and_recall_of_points_on_a_line():
    real = np.arange(20.0)[:, None]
    assert metrics.precision_recall(real, real + 0.1) == (1, 1)
    assert metrics.precision_recall(real, real + 1000) == (0, 0)
    precision, recall = metrics.precision_recall(real, 5 + 0.1 * np.arange(20.0)[:, None])
    assert precision == 1  # all within the real ones
    assert recall < 0.3  # but from a corner of them


class Slices:
    """What `nearest` needs of a split."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return torch.from_numpy(self.images[indices].astype(np.float32))[:, None]


def test_nearest_finds_the_most_similar_slice():
    rng = np.random.default_rng(0)
    images = ndimage.gaussian_filter(rng.random((50, 32, 24)), (0, 2, 2)) * 4 - 1.5
    noisy = images[[7, 31]] + 0.02 * rng.standard_normal((2, 32, 24))
    found, ssim = metrics.nearest(noisy, Slices(images))
    assert found.tolist() == [7, 31]
    for i, k in enumerate((7, 31)):
        expected = structural_similarity(noisy[i], images[k], data_range=1.0)
        assert ssim[i] == pytest.approx(expected, abs=1e-4)


def test_pairwise_ssim_is_one_of_copies_and_less_of_others():
    rng = np.random.default_rng(0)
    image = rng.random((1, 32, 32))
    assert metrics.pairwise_ssim(image.repeat(5, 0), n_pairs=20) == pytest.approx(1)
    assert metrics.pairwise_ssim(rng.random((5, 32, 32)), n_pairs=20) < 0.2


def test_a_judge_tells_smooth_from_noisy_and_not_alike_from_alike(monkeypatch):
    monkeypatch.setattr(metrics, "JUDGE_UPDATES", 30)
    rng = np.random.default_rng(0)
    sharp = rng.random((3, 32, 32, 32))
    smooth = ndimage.uniform_filter(sharp[0], (0, 3, 3))
    patients = np.repeat(np.arange(8), 4)
    told, _ = metrics.two_sample_accuracy(smooth, sharp[1], patients)
    assert told > 0.9
    chance, (low, high) = metrics.two_sample_accuracy(sharp[2], sharp[1], patients)
    assert low < 0.5 < high
    assert low < chance < high


def test_a_judge_sees_fine_texture_beside_shapes():
    """Slices of shapes, some of them blurred by three pixels: what tells samples from slices."""
    rng = np.random.default_rng(0)
    shapes = ndimage.gaussian_filter(rng.random((2, 32, 72, 72)), (0, 0, 8, 8)) * 20 - 9.5
    sharp = shapes.clip(0, 1) + 0.03 * rng.standard_normal(shapes.shape)
    blurred = ndimage.uniform_filter(sharp[0], (0, 3, 3))
    told, _ = metrics.two_sample_accuracy(blurred, sharp[1], np.repeat(np.arange(8), 4))
    assert told > 0.95


def test_interval_of_a_judge_is_that_of_patients_where_these_differ(monkeypatch):
    """Right about each sample and about all slices of every second patient: 3 of 4, but of few."""
    made = np.ones((32, 32, 32))
    which = np.repeat(np.arange(8), 4)
    real = np.ones((32, 32, 32)) * (which % 2)[:, None, None]
    by_mean = lambda *_: lambda crops: crops[:, :1].mean((2, 3)) - 0.5  # noqa: E731
    monkeypatch.setattr(metrics, "_judge", by_mean)
    told, (low, high) = metrics.two_sample_accuracy(made, real, which)
    assert told == 0.75
    names = [f"made {i}" for i in range(32)] + [f"real {i}" for i in which]
    right = np.concatenate([np.ones(32), 1 - which % 2])
    assert [low, high] == metrics.patient_interval(right, names)
    wilson = metrics._wilson(48, 64)[1]
    assert low < wilson[0] < wilson[1] < high
    told, (low, high) = metrics.two_sample_accuracy(made, 0 * real, which)  # no patient differs
    assert (told, high) == (1, 1)
    assert low == metrics._wilson(64, 64)[1][0] < 1


def test_wilson_interval_against_its_defining_equation():
    p, (low, high) = metrics._wilson(70, 100)
    for bound in (low, high):  # where p is 1.96 standard errors away
        assert abs(p - bound) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / 100))

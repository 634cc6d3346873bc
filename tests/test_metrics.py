"""Figures against closed forms."""

import numpy as np
import pytest
import torch

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
    bits = metrics.bits_per_code(model, codes, torch.full((5,), -1), torch.rand(5), "cpu")
    assert bits == pytest.approx(np.full(5, 4.0), abs=1e-5)


def test_psnr_and_mean_absolute_error():
    x = np.full((16, 16), 0.5, np.float32)
    scores = metrics.slice_scores(x, x + np.float32(0.1))
    assert scores["psnr"] == pytest.approx(20, abs=1e-3)
    assert scores["mae"] == pytest.approx(0.1, abs=1e-6)
    assert metrics.slice_scores(x, x)["psnr"] == 100


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

"""SSIM against scikit-image; files that are written whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.metrics import structural_similarity

import phantom
import utils

SLICES = Path(os.environ.get("MRCODES_SLICES", Path(__file__).parents[2] / "shared" / "data"))


@pytest.mark.skipif(not SLICES.is_dir(), reason=f"no real slices in {SLICES}")
def test_ssim_is_skimages_on_real_slices():
    paths = sorted(SLICES.rglob("*.jpg"))[:: 1000]
    assert paths
    for path in paths:
        with Image.open(path) as image:
            x = np.asarray(image.convert("L"), np.float32) / 255
        y = ndimage.gaussian_filter(x, 1.5)
        expected = structural_similarity(x.astype(float), y.astype(float), data_range=1.0)
        ours = utils.ssim(torch.from_numpy(x)[None, None], torch.from_numpy(y)[None, None])
        assert ours.item() == pytest.approx(expected, abs=1e-5), path.name


def pairs():
    rng = np.random.default_rng(0)
    noise = rng.random((2, 40, 33), dtype=np.float32)
    pelvis = phantom.volume(0, 4, 0, 2)[:, :, :].astype(np.float32)
    pelvis /= pelvis.max()
    blurred = pelvis + 0.05 * rng.standard_normal(pelvis.shape).astype(np.float32)
    flat = np.full((40, 33), 0.7, np.float32)
    yield "noise", noise[0], noise[1]
    yield "pelvis", pelvis[0], np.clip(blurred[0], 0, 1)
    yield "constant", flat, flat
    yield "constant and noise", flat, noise[0]
    yield "black and white", np.zeros_like(flat), np.ones_like(flat)


@pytest.mark.parametrize(("name", "x", "y"), list(pairs()))
def test_ssim_is_skimages(name, x, y):
    expected = structural_similarity(x.astype(float), y.astype(float), data_range=1.0)
    x, y = (torch.from_numpy(a)[None, None] for a in (x, y))
    assert utils.ssim(x.double(), y.double()).item() == pytest.approx(expected, abs=1e-9)
    assert utils.ssim(x, y).item() == pytest.approx(expected, abs=1e-5)
    scaled = structural_similarity(
        255 * x[0, 0].double().numpy(), 255 * y[0, 0].double().numpy(), data_range=255
    )
    assert utils.ssim(255 * x, 255 * y, data_range=255).item() == pytest.approx(scaled, abs=1e-5)


def test_ssim_of_a_batch_is_of_each_slice():
    x, y = torch.rand(3, 1, 20, 24), torch.rand(3, 1, 20, 24)
    alone = torch.cat([utils.ssim(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(utils.ssim(x, y), alone)


def test_ssim_trains_on_flat_slices():
    x = torch.full((1, 1, 16, 16), 0.5)
    y = x.clone().requires_grad_()
    utils.ssim(x, y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_ssim_does_not_depend_on_autocast():
    x, y = torch.rand(1, 1, 20, 24), torch.rand(1, 1, 20, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(utils.ssim(x, y), utils.ssim(x, y).float())
        cast = utils.ssim(x, y)
    assert torch.equal(cast, utils.ssim(x, y))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    utils.write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(utils.UserError, match=r"file.json.*No space"):
        utils.write_atomically(path, fail)
    assert utils.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_newer_format_is_refused(tmp_path):
    stage = tmp_path / "vq_vae"
    utils.write_json(stage / "config.json", {"format_version": utils.FORMAT_VERSION + 1})
    (stage / "model.safetensors").write_bytes(b"")
    with pytest.raises(utils.UserError, match="format version"):
        utils.load_model(tmp_path, "vq_vae")


def test_generators_of_other_seeds_and_numbers_draw_others():
    draws = [
        torch.rand(4, generator=utils.generator(seed, i)) for seed in (0, 1, 2) for i in range(50)
    ]
    assert len(set(map(tuple, torch.stack(draws).tolist()))) == 150
    assert torch.equal(torch.rand(4, generator=utils.generator(1, 7)), draws[57])


def test_the_oldest_format_is_still_read():
    """A tiny run of format 1, kept in the repository with what it gave then."""
    folder = Path(__file__).parent / "format_1"
    vq_vae, prior = (utils.load_model(folder, stage) for stage in ("vq_vae", "pixelcnn"))
    codes = (torch.arange(32) % 16).view(1, 8, 4)
    with torch.inference_mode(), np.load(folder / "expected.npz") as expected:
        np.testing.assert_allclose(vq_vae.decode(codes), expected["image"], atol=1e-4)
        np.testing.assert_allclose(prior(codes), expected["logits"], atol=1e-3)

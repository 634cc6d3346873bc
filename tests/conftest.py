"""A small phantom, a run trained on it, and the commands called as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL_VQ_VAE = "--n_updates 6 --log_interval 3 --batch_size 4 --n_hiddens 8 --n_residual_hiddens 8"
SMALL_VQ_VAE += " --embedding_dim 4 --n_embeddings 16"
SMALL_PRIOR = "--n_updates 4 --log_interval 2 --batch_size 4 --n_channels 8 --n_layers 2"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """No test touches the user's own cache."""
    os.environ["MRCODES_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder in HipMRI's layout: 8 cases, 3 slices of each of their scans."""
    import phantom

    root = tmp_path_factory.mktemp("data") / "pelvis"
    phantom.make_phantom(root, n_cases=8, weeks=1, slices_per_volume=3, progress=False)
    return root


def call(command, *, cwd=ROOT, code=0, processes=None):
    """Run `python COMMAND`, or `torchrun COMMAND`, in a shell's way; returns (stdout, stderr)."""
    words = command if isinstance(command, list) else command.split()
    if processes:
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        words = [*launcher, f"--nproc_per_node={processes}", *words]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


@pytest.fixture(scope="session")
def run_dir(data, tmp_path_factory):
    """A run with both stages trained for a few updates."""
    path = tmp_path_factory.mktemp("runs") / "small"
    call(f"train.py --mode vq_vae --data {data} --run_dir {path} {SMALL_VQ_VAE}")
    call(f"train.py --mode pixelcnn --run_dir {path} {SMALL_PRIOR}")
    return path

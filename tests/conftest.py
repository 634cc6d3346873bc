"""A small phantom, a run trained on it, and the commands called as a user would.

A command runs in a process of its own, which is forked from one that has imported the libraries
(none of our modules): to import torch takes longer than most of what is tested.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

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


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pytest", "torch", "torch._dynamo", "torch.nn.parallel", "matplotlib.pyplot", "nibabel"]
    + ["safetensors.torch", "scipy.ndimage", "skimage.metrics"]
)


def start(words, cwd=ROOT):
    """`python WORDS`, running: (process, what can be read of its stdout, of its stderr)."""
    (out, to_out), (err, to_err) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
    arguments = [str(word) for word in words], str(cwd), dict(os.environ), to_out, to_err
    process = FORKS.Process(target=_command, args=arguments)
    process.start()
    to_out.close()
    to_err.close()
    return process, out, err


def _command(words, cwd, environment, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    os.chdir(cwd)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    sys.path.insert(0, cwd)
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def torchrun(processes, words):
    """The words of `torchrun --nproc_per_node=PROCESSES WORDS`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={processes}", *map(str, words)]


def call(command, *, cwd=ROOT, code=0, processes=None):
    """Run `python COMMAND`, or `torchrun COMMAND`, in a shell's way; returns (stdout, stderr)."""
    words = command if isinstance(command, list) else command.split()
    if processes:
        words = torchrun(processes, words)
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
        out, err, status = done.stdout, done.stderr, done.returncode
    else:
        process, *pipes = start(words, cwd)
        said = {}

        def read(i):
            with open(pipes[i].fileno(), encoding="utf8", closefd=False) as file:
                said[i] = file.read()

        readers = [Thread(target=read, args=(i,)) for i in range(2)]
        for reader in readers:
            reader.start()
        process.join(300)
        process.kill()
        for reader in readers:
            reader.join()
        out, err, status = said[0], said[1], process.exitcode
    assert status == code, f"{words}: {status}\n{out}\n{err}"
    return out, err


@pytest.fixture(scope="session")
def run_dir(data, tmp_path_factory):
    """A run with both stages trained for a few updates."""
    path = tmp_path_factory.mktemp("runs") / "small"
    call(f"train.py --mode vq_vae --data {data} --run_dir {path} {SMALL_VQ_VAE}")
    call(f"train.py --mode pixelcnn --run_dir {path} {SMALL_PRIOR}")
    return path

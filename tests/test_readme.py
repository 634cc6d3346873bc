"""The README: links that lead somewhere, commands that parse."""

import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL_PRIOR, SMALL_VQ_VAE, call
from PIL import Image

import predict
import train

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:sh|bash)\n(.*?)```", TEXT, re.S)
WHOLE = [block.replace("\\\n", " ") for block in BLOCKS]  # lines that end in a backslash go on
LINES = [line.split("  #")[0].strip() for block in WHOLE for line in block.splitlines()]
COMMANDS = sorted({line for line in LINES if re.match("(srun )?torchrun |python ", line)})


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()


def test_the_three_commands_are_there():
    assert {
        "python train.py --mode vq_vae", "python train.py --mode pixelcnn", "python predict.py",
    } <= set(COMMANDS)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    words = words[words.index(script) + 1 :]
    parsers = {"train.py": train.parser, "predict.py": predict.parser}
    if script in parsers:
        parsers[script]().parse_args(words)
    else:
        assert (ROOT / script).exists()


INLINE = sorted(set(re.findall(r"`python (benchmarks/[^`]*)`", TEXT)))


@pytest.mark.parametrize("command", INLINE)
def test_commands_of_benchmarks_parse(command, monkeypatch, capsys):
    script, *words = shlex.split(command)
    assert (ROOT / script).exists()
    if not words:
        return
    monkeypatch.setattr("sys.argv", [script, *words, "--help"])  # read after the others
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    known = re.findall(r"--\w+", capsys.readouterr().out)
    assert {word for word in words if word.startswith("--")} <= set(known)


def test_the_commands_run_as_written(data, tmp_path, monkeypatch):
    """In the README's order, in a home folder that has what they name, but for small networks."""
    home, code = tmp_path / "home", tmp_path / "code"
    slices = home / "HipMRI_study_keras_slices_data"
    shutil.copytree(data, slices)
    rng = np.random.default_rng(0)
    for i in range(24):
        folder = home / "AD_NC" / ("train", "test")[i % 2] / ("AD", "NC")[i % 4 // 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8))
        picture.save(folder / f"{100 + i // 2}_{70 + i}.jpeg")
    shutil.copy(home / "AD_NC/test/AD/100_71.jpeg", home / "slice.jpeg")
    code.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, code)
    monkeypatch.setenv("HOME", str(home))
    ran = []
    for line in LINES:
        if not re.match(r"python (train|predict|dataset)\.py", line):
            continue
        words = [os.path.expanduser(word) for word in shlex.split(line)[1:]]
        if "vq_vae" in words:
            words += SMALL_VQ_VAE.split()
            words += [] if "--data" in words else ["--data", slices]
        elif "pixelcnn" in words:
            words += SMALL_PRIOR.split()
        elif words[0] == "predict.py":
            words += ["--n_samples", 2, "--n_maps", 2]
        call([str(word) for word in words], cwd=code)
        ran.append(words[0])
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        call(["-c", block.replace('load("phantom")', f"load({str(slices)!r})")], cwd=code)
        ran.append("python")
    assert "python" in ran
    assert ran.count("train.py") >= 6
    assert ran.count("predict.py") >= 4


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert wanted <= set(targets)
    assert {"demo", "test"} <= wanted


def test_tables_are_what_was_measured():
    assert tables.filled(TEXT) == TEXT

"""The README: links that lead somewhere, commands that parse."""

import re
import shlex
import sys
from pathlib import Path

import pytest

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


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert wanted <= set(targets)
    assert {"demo", "test"} <= wanted


def test_tables_are_what_was_measured():
    assert tables.filled(TEXT) == TEXT

"""What a command does first: it answers --help, --version and a mistyped flag before it imports what takes seconds."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from MILS import list_mils, mil_options
from utils.core.model_help import keyword_defaults
from utils.learning.settings import Model

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    "train.py", "predict.py", "extractFeatures.py", "-m utils.audit", "-m utils.compare", "-m utils.convert",
    "-m utils.doctor", "-m datasets.download", "-m datasets.demo",
]  # fmt: skip
SLOW = {"torch", "numpy", "scipy", "pandas", "sklearn", "matplotlib", "timm", "h5py", "openslide", "PIL", "tqdm"}


def started(command: str, flag: str) -> subprocess.CompletedProcess[str]:
    """The command run with a flag, and on stderr a line for each module that it imports."""
    words = [sys.executable, "-X", "importtime", *command.split(), flag]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--version", 0), ("--hlep", 2)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_answers_before_it_imports_what_takes_seconds(command, flag, code):
    answer = started(command, flag)
    assert answer.returncode == code, answer.stderr
    lines = answer.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "argparse" in imported, "the measure does not see what is imported"
    assert not imported & SLOW
    said = [line for line in lines if not line.startswith("import time:")]
    assert said == (["error: unrecognized arguments: --hlep; did you mean --help? (see --help)"] if code else [])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_how_the_command_is_called(command):
    program = command.replace("-m", "python -m")
    assert re.match(rf"usage: {re.escape(program)}( .*)? \[options\]\n", started(command, "--help").stdout)


def test_the_models_flags_in_the_help_are_the_models_own():
    found = keyword_defaults(ROOT / "MILS", "register_mil")
    assert found == {name: mil_options(name) for name in list_mils()}
    assert list(found) == list_mils()


def test_every_hyperparameter_of_a_model_is_a_flag():
    flags = {field.name for field in fields(Model)}
    options = {name for model in list_mils() for name in mil_options(model)}
    assert options == flags - {"mil", "mil_args", "input_dim"}


def test_gated_attention_can_be_given_and_left():
    assert Model(mil="ABMIL", gated=False, attention_dim=64).hyperparameters() == {"gated": False, "attention_dim": 64}
    assert Model(mil="ABMIL").hyperparameters() == {}


@pytest.mark.parametrize(
    ("command", "flags"),
    [("train.py", ["--input_dim", "--no_amp"]), ("predict.py", ["--dataset", "--input_dim"])],
)
def test_flags_of_the_first_version_that_only_check_are_no_part_of_the_help(command, flags):
    listed = re.findall(r"^  (--\w+)", started(command, "--help").stdout, re.MULTILINE)
    assert len(listed) > 20
    assert not set(listed) & set(flags)

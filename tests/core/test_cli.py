"""Parsers made from configs, and errors made into exit codes."""

import logging
import re
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

from utils.audit import Audit
from utils.bags.settings import Cohort
from utils.compare import Comparison
from utils.convert import Conversion
from utils.core import cli, runtime
from utils.core.errors import ConfigError, LiteMILError, SlideError
from utils.core.settings import REQUIRED, flag_of, option
from utils.features.settings import Extraction
from utils.learning.settings import DryRun, Model, Preset, Protocol, Running, Training
from utils.pictures.settings import Pictures
from utils.prediction.settings import Prediction, PredictionRecipe
from utils.slides.settings import ExtractionFiles

SCRIPTS = {
    "extractFeatures": {"files": ExtractionFiles, "recipe": Extraction},
    "train": {
        "cohort": Cohort,
        "model": Model,
        "training": Training,
        "preset": Preset,
        "protocol": Protocol,
        "running": Running,
        "dry run": DryRun,
    },
    "predict": {"prediction": Prediction, "recipe": PredictionRecipe, "pictures": Pictures},
    "convert": {"conversion": Conversion},
    "audit": {"cohort": Audit},
    "compare": {"comparison": Comparison},
}
NEEDED = {
    "extractFeatures": ["--input", "a.svs"],
    "train": ["--dataset", "mine", "--mil", "LiteMIL"],
    "predict": ["--checkpoint", "a.pth", "--input", "a.h5"],
    "convert": ["a.h5", "b.h5"],
    "audit": ["--dataset", "mine"],
    "compare": ["a", "b"],
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One flag of each kind."""

    name: str = option(REQUIRED, "what it is called")
    folder: Path | None = option(None, "a folder")
    count: int = option(0, "how many")
    rate: float = option(0.0, "how fast: 100 %% is the most")
    ends: tuple[str, ...] = option((), "endings", metavar="EXT")
    marks: tuple[Literal["red", "blue"], ...] | None = option(None, "marks")
    shape: Literal["round", "square"] = option("round", "shape")
    maybe: Literal["yes", "no"] | None = option(None, "an answer")
    size: Literal["size_small", "size_large"] = option("size_small", "size", also={"large": "size_large"})
    loud: bool = option(False, "say more")
    fast: bool = option(True, "be slow", flag="--no_fast", alias="-s")
    workers: int | Literal["auto"] = option("auto", "how many, or auto", least=1)
    internal: int = 7


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Two values given by their place, and a flag."""

    source: Path = option(REQUIRED, "where from", metavar="IN", positional=True)
    times: int = option(REQUIRED, "how often", positional=True)
    folder: Path | None = option(None, "a folder")


@pytest.fixture
def kept_logging():
    """The logger as it was, so that other tests still catch its records."""
    before = runtime.log.handlers[:], runtime.log.level, runtime.log.propagate
    yield
    runtime.log.handlers[:], runtime.log.level, runtime.log.propagate = before


def parse(*argv: str) -> Example:
    return cli.parse("An example.", {"example": Example}, argv)[0]


def parse_script(script: str, *argv: str) -> list:
    return cli.parse(script, SCRIPTS[script], [*NEEDED[script], *argv])


def refused(capsys, call, *argv) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*argv)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def test_what_is_not_given_is_the_default():
    assert parse("--name", "x") == Example(name="x")


def test_every_kind_of_flag():
    argv = "--name x --folder a/b --count -3 --rate 1e-4 --ends .svs .tif --marks red blue --shape square --maybe no"
    assert parse(*argv.split(), "--loud", "--no_fast") == Example(
        name="x", folder=Path("a/b"), count=-3, rate=1e-4, ends=(".svs", ".tif"), marks=("red", "blue"),
        shape="square", maybe="no", loud=True, fast=False,
    )  # fmt: skip
    assert parse("--name", "x", "-s").fast is False
    assert [parse("--name", "x", "--workers", given).workers for given in ("auto", "3")] == ["auto", 3]


@pytest.mark.parametrize(
    "argv",
    [
        ["--count", "1.5"],
        ["--count", "many"],
        ["--rate", "fast"],
        ["--shape", "oval"],
        ["--maybe", "perhaps"],
        ["--workers", "all"],
        ["--marks", "red", "green"],
        ["--marks"],
        ["--loud", "yes"],
        ["--no_such_flag"],
        ["--internal", "8"],
        ["--fast"],
        ["--fold", "a"],
        ["--no_fas"],
        ["stray"],
    ],
)
def test_what_cannot_be_used_is_refused_with_argparses_code(capsys, argv):
    message = refused(capsys, parse, "--name", "x", *argv)
    assert re.fullmatch(r"error: .+ \(see --help\)\n", message), "one line that says what, and where the rest is"


def test_a_required_flag_is_required_and_one_that_is_mistyped_is_told_first(capsys):
    assert refused(capsys, parse) == "error: the following arguments are required: --name (see --help)\n"
    assert "unrecognized arguments: --nmae; did you mean --name?" in refused(capsys, parse, "--nmae", "x")


def test_what_is_given_by_its_place(capsys):
    wanted = Placed(source=Path("a"), times=3, folder=Path("f"))
    for argv in (["a", "3", "--folder", "f"], ["--folder", "f", "a", "3"], ["a", "--folder", "f", "3"]):
        assert cli.parse("", {"placed": Placed}, argv) == [wanted]
    for argv in (["a"], [], ["a", "often"], ["a", "3", "4"], ["--source", "a", "3"]):
        refused(capsys, cli.parse, "", {"placed": Placed}, argv)
    assert "IN" in refused(capsys, cli.parse, "", {"placed": Placed}, [])
    assert [flag_of(field) for field in cli.options(Placed)] == ["IN", "times", "--folder"]


def test_several_values_are_given_by_their_place(capsys):
    def runs(*argv: str) -> tuple[Path, ...]:
        return cli.parse("", {"comparison": Comparison}, argv)[0].runs

    assert runs("a", "b") == runs("a", "b", "--metrics", "auc") == (Path("a"), Path("b"))
    assert runs("--output_dir", "f", "a", "b", "c") == (Path("a"), Path("b"), Path("c"))
    assert "RUN" in refused(capsys, runs)
    with pytest.raises(ConfigError, match="RUN: 1 given; give the folders of two"):
        runs("a")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_defaults_are_the_configs(script):
    given = {"dataset": "mine", "mil": "LiteMIL", "checkpoint": (Path("a.pth"),)}
    given["input"] = Path("a.svs") if script == "extractFeatures" else Path("a.h5")
    given |= {"output": Path("b.h5")} if script == "convert" else {}
    given |= {"runs": (Path("a"), Path("b"))} if script == "compare" else {}
    for made, cls in zip(parse_script(script), SCRIPTS[script].values(), strict=True):
        names = given.keys() & cls.__dataclass_fields__.keys()
        needed = names if cls is not Prediction else names - {"dataset", "mil"}
        assert made == cls(**{name: given[name] for name in needed})


def test_the_flags_that_are_spelled_in_their_own_way():
    assert parse_script("train")[2].use_amp is True
    assert parse_script("train", "--no_amp")[2].use_amp is False
    assert parse_script("predict", "--output", "out")[0].output_dir == Path("out")
    assert parse_script("predict", "--output_dir", "out")[0].output_dir == Path("out")
    assert parse_script("train", "--class_names", "a", "b")[0].class_names == ("a", "b")
    assert parse_script("train", "--allow", "missing", "duplicate")[0].allow == ("missing", "duplicate")


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("train", ["--use_amp"]),
        ("train", ["--warmup", "3"]),
        ("train", ["--allow", "everything"]),
        ("train", ["--mode", "half"]),
        ("train", ["--batch", "3"]),
        ("predict", ["--visual"]),
        ("extractFeatures", ["--dtype", "float64"]),
        ("extractFeatures", ["--format", "csv"]),
    ],
)
def test_the_scripts_refuse_what_they_do_not_know(capsys, script, argv):
    refused(capsys, parse_script, script, *argv)


def test_a_number_out_of_range_is_told_by_its_flag():
    for argv in (["--chunk_size", "0"], ["--lr", "nan"], ["--lr", "inf"], ["--dropout", "1.01"], ["--n_outer", "1"]):
        with pytest.raises(ConfigError, match=f"{argv[0]} {argv[1]}: out of range"):
            parse_script("train", *argv)


def help_of(capsys, script: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_script(script, "--help")
    assert caught.value.code == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_and_every_default(capsys, script):
    text = help_of(capsys, script)
    for title, cls in SCRIPTS[script].items():
        assert f"{title}:" in text
        for field in cli.options(cls):
            if field.metadata["hidden"]:
                assert field.metadata["help"] not in text
                continue
            assert cli.flag_of(field) in text
            is_plain = not isinstance(field.default, bool | tuple | type(None)) and field.default is not REQUIRED
            if is_plain and "(default" not in field.metadata["help"]:
                assert f"{field.metadata['help']} (default: {field.default})" in text
    assert "default: None" not in text
    assert "default: True" not in text
    assert "default: ()" not in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_what_is_required(capsys, script):
    text = help_of(capsys, script)
    fields = [field for cls in SCRIPTS[script].values() for field in cli.options(cls)]
    required = [field for field in fields if field.default is REQUIRED or field.metadata["one_of"]]
    first = text.partition("required:")[2].partition(f"{next(iter(SCRIPTS[script]))}:")[0] if required else ""
    for field in required:
        assert (field.name if field.metadata["positional"] else flag_of(field)) in first or flag_of(field) in first
        assert flag_of(field) in text.partition(" [options]")[0], "the usage line names it"
    assert (required != []) == ("required:" in text)


def test_the_usage_line_shows_of_which_flags_one_is_required(capsys):
    assert " (--input FILE | --input_dir DIR) [options]" in help_of(capsys, "extractFeatures")
    assert "(--checkpoint FILE|RUN ... | --out_of_fold RUN) (--input FILE" in help_of(capsys, "predict")


def test_help_says_what_a_flag_takes(capsys):
    text = help_of(capsys, "train") + help_of(capsys, "extractFeatures") + help_of(capsys, "predict")
    takes = {
        "labels_csv": "FILE", "features_dir": "DIR", "splits": "FILE|DIR", "mil": "MODEL", "group_column": "COLUMN",
        "mpp": "UM", "patch_size": "PX", "device": "DEVICE", "slides_csv": "FILE", "weights": "FILE", "n_outer": "N",
        "batch_size": "N|auto", "tissue_threshold": "X", "wsi": "FILE|DIR", "extensions": "EXT [EXT ...]",
    }  # fmt: skip
    assert not [flag for flag, value in takes.items() if f"--{flag} {value} " not in text]


def test_a_default_of_zero_is_told(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "how many (default: 0)" in text
    assert "100 % is the most (default: 0.0)" in text
    assert "learning rate at the end of the cosine (default: 1e-06)" in help_of(capsys, "train")


def test_a_preset_sets_what_no_flag_gives():
    groups, presets = {"preset": Preset, "training": Training}, {"paper": {"lr": 0.5, "patience": 3}}
    _, plain = cli.parse("", groups, [], presets=presets)
    assert plain == Training()
    preset, training = cli.parse("", groups, ["--preset", "paper", "--patience", "10"], presets=presets)
    assert preset.preset == "paper"
    assert training == Training(lr=0.5, patience=10)


def test_help_keeps_the_descriptions_lines(capsys):
    with pytest.raises(SystemExit):
        cli.parse("First line.\n\n  uv run x.py 100%\n", {"example": Example}, ["--help"], epilog="a  b\n  c 50%")
    text = capsys.readouterr().out
    assert "First line.\n\n  uv run x.py 100%\n" in text
    assert "a  b\n  c 50%" in text


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--version")
    assert caught.value.code == 0
    assert re.fullmatch(r"LiteMIL \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_two_configs_with_one_flag_are_a_bug_that_shows_at_once():
    with pytest.raises(Exception, match="conflicting option"):
        cli.parse("", {"one": Extraction, "other": PredictionRecipe}, [])


def test_run_lets_a_script_end_well(kept_logging, capsys):
    cli.run(lambda: runtime.log.info("fine"))
    assert capsys.readouterr().err == "fine\n"


@pytest.mark.parametrize("error", [LiteMILError, SlideError])
def test_a_litemil_error_is_one_line_and_exit_code_1(kept_logging, capsys, error):
    def main():
        raise error("a.svs: cannot be\n   opened;\ntry 100% harder")

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "error: a.svs: cannot be opened; try 100% harder\n"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyError, RuntimeError, SystemExit])
def test_any_other_exception_keeps_its_traceback(kept_logging, capsys, error):
    def main():
        raise error("a bug")

    with pytest.raises(error):
        cli.run(main)
    assert capsys.readouterr().err == ""


def test_ctrl_c_is_130(kept_logging, capsys, request):
    # A shell's background job is started with SIGINT ignored, and so would the test be there.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def main():
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == 130
    assert capsys.readouterr().err.startswith("error: interrupted; ")


def test_log_lines_go_to_stderr_with_their_level_and_once(kept_logging, capsys):
    runtime.start_logging()
    runtime.start_logging()
    runtime.log.debug("hidden")
    runtime.log.info("said")
    runtime.log.warning("take care")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "said\nwarning: take care\n"
    assert runtime.log.level == logging.INFO


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--name", "a", "--cuont", "3"), "unrecognized arguments: --cuont; did you mean --count?"),
        (("--name", "a", "--cuont=3"), "unrecognized arguments: --cuont; did you mean --count?"),
        (("--name", "a", "--zzz"), "unrecognized arguments: --zzz (see --help)\n"),
        (("--name", "a", "stray"), "unrecognized arguments: stray"),
        (("--name", "a", "--shape", "squar"), "(choose from 'round', 'square'); did you mean square?"),
        (
            ("--name", "a", "--marks", "red", "bleu"),
            "invalid choice: 'bleu' (choose from 'red', 'blue'); did you mean blue?",
        ),
        (("--name", "a", "--shape", "SQAURE"), "did you mean square?"),
        (("--name", "a", "--size", "LAREG"), "(choose from 'size_small', 'size_large'); did you mean large?"),
        (("--name", "a", "--maybe", "perhaps"), "(choose from 'yes', 'no') (see --help)\n"),
    ],
)
def test_what_is_unknown_is_answered_with_the_nearest_that_is_known(capsys, argv, message):
    assert message in refused(capsys, parse, *argv)


def test_quiet_leaves_warnings_and_results(kept_logging, capsys):
    runtime.start_logging()
    parse("--name", "a", "-q")
    runtime.log.info("a remark")
    runtime.log.warning("take care")
    assert list(runtime.progress([1, 2], "Working")) == [1, 2]
    with runtime.progress_bar("Working", 2) as bar:
        bar.update()
    assert capsys.readouterr().err == "warning: take care\n"
    runtime.start_logging()
    assert list(runtime.progress([1, 2], "Working")) == [1, 2]
    assert "Working" in capsys.readouterr().err


def test_nothing_is_coloured(kept_logging, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    runtime.start_logging()
    runtime.log.warning("take care")
    list(runtime.progress([1, 2], "Working"))
    refused(capsys, parse, "--nmae", "a")
    runtime.log.error("gone")
    assert "\x1b[3" not in capsys.readouterr().err

"""Figures as files: the format that the name says, the same bytes for the same figure, and text that stays text."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from utils.core.errors import ConfigError
from utils.core.plots import figure_paths, legend_below, save_figure, write_figures


def figure() -> Figure:
    drawn = Figure(figsize=(4, 3), layout="constrained")
    axes = drawn.subplots()
    axes.plot([0, 1], [1, 0], label="µm of a £ sign")
    axes.imshow(np.eye(3))
    axes.fill_between([0, 1], [0, 0], [1, 1], alpha=0.2)
    legend_below(drawn)
    return drawn


DRAW = """
import sys
from pathlib import Path
from tests.core.test_plots import figure
from utils.core.plots import write_figures
write_figures(Path(sys.argv[1]), {"one": figure()}, ("png", "pdf", "svg"))
"""


def test_equal_figures_are_equal_files_whenever_and_wherever_they_are_drawn(tmp_path):
    """In another process, whose sets have another order, and at another time: a date in them would differ."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = os.environ | {"PYTHONHASHSEED": seed}
    subprocess.run([sys.executable, "-c", DRAW, str(tmp_path / "there")], check=True, env=environment)
    time.sleep(1.1)
    write_figures(tmp_path / "here", {"one": figure()}, ("png", "pdf", "svg"))
    for kind in ("png", "pdf", "svg"):
        assert (tmp_path / "there" / f"one.{kind}").read_bytes() == (tmp_path / "here" / f"one.{kind}").read_bytes()
    write_figures(tmp_path / "alone", {"one": figure()}, ["svg"])
    assert (tmp_path / "alone" / "one.svg").read_bytes() == (tmp_path / "here" / "one.svg").read_bytes()


def test_text_stays_text_and_no_settings_are_left_behind(tmp_path):
    before = {name: rcParams[name] for name in ("pdf.fonttype", "svg.fonttype", "svg.hashsalt")}
    save_figure(figure(), tmp_path / "a.svg")
    assert ">µm of a £ sign</text>" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    save_figure(figure(), tmp_path / "a.PDF")
    pdf = (tmp_path / "a.PDF").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf or b"/Type42" in pdf or b"/CIDFontType2" in pdf
    assert b"CreationDate" not in pdf
    assert {name: rcParams[name] for name in before} == before


def test_another_ending_is_refused(tmp_path):
    for name in ("figure.jpg", "figure"):
        with pytest.raises(ConfigError, match=r"written as \.png, \.pdf or \.svg"):
            save_figure(figure(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_only_what_is_missing_is_written_where_that_is_asked(tmp_path):
    (tmp_path / "one.png").write_text("kept")
    written = write_figures(tmp_path, {"one": figure()}, ("png", "pdf", "pdf"), missing_only=True)
    assert written == [tmp_path / "one.pdf"] == figure_paths(tmp_path / "one", ("pdf", "pdf"))
    assert (tmp_path / "one.png").read_text() == "kept"


def test_a_picture_of_a_large_figure_has_fewer_dots(tmp_path):
    for name, size in (("small", (2, 1)), ("large", (11, 110))):
        save_figure(Figure(figsize=size), tmp_path / f"{name}.png", tight=False)
    assert Image.open(tmp_path / "small.png").size == (600, 300)
    width, height = Image.open(tmp_path / "large.png").size
    assert 38e6 < width * height <= 40e6
    assert height == pytest.approx(10 * width, rel=0.01)

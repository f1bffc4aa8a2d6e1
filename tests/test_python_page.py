"""The pages of Python code run as they stand and print what they say, but for figures, here of shorter trainings."""

import re
import sys
from pathlib import Path

import pytest

from MILS import registry

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def masked(text: str) -> str:
    """The text without figures, and without the class that is predicted, which depends on the training."""
    text = re.sub(r"\(\d, 85\)", "SHAPE", text)
    return re.sub(r"\d\.\d+", "#", re.sub(r"^(glandular|solid) ", "CLASS ", text, flags=re.MULTILINE))


@pytest.mark.parametrize("demo_home", ["small_demo", pytest.param("whole_demo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["python", "own_model"])
def test_the_page_prints_what_it_says(name, demo_home, request, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    (tmp_path / "datasets").symlink_to(request.getfixturevalue(demo_home)[0] / "datasets")
    (tmp_path / "testSlides").symlink_to(ROOT / "testSlides")
    monkeypatch.chdir(tmp_path)
    codes = blocks(page, "python")
    if name == "own_model":
        (tmp_path / "my_model.py").write_text(codes.pop(0))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_model", raising=False)
    scope: dict[str, object] = {"__name__": name}
    for code in codes:
        exec(code.replace("epochs=40", "epochs=1"), scope)  # noqa: S102 - our own page
    printed = capsys.readouterr().out
    if demo_home == "small_demo":
        printed = printed.replace("12 slides", "48 slides")
    assert masked(printed) == masked("".join(blocks(page, "text")))

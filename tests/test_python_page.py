"""docs/python.md runs as it stands and prints what it says, but for the figures, here of shorter trainings."""

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def masked(text: str) -> str:
    """The text without figures, and without the class that is predicted, which depends on the training."""
    return re.sub(r"\d\.\d+", "#", re.sub(r"^(glandular|solid) ", "CLASS ", text, flags=re.MULTILINE))


def test_the_page_prints_what_it_says(demo_home, tmp_path, monkeypatch, capsys):
    (tmp_path / "datasets").symlink_to(demo_home[0] / "datasets")
    (tmp_path / "testSlides").symlink_to(Path(__file__).resolve().parents[1] / "testSlides")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    assert len(blocks("python")) == len(blocks("text"))
    for code, said in zip(blocks("python"), blocks("text"), strict=True):
        exec(code.replace("epochs=40", "epochs=1"), scope)  # noqa: S102 - our own page
        assert masked(capsys.readouterr().out) == masked(said)

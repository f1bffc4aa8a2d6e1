"""What the project says of itself in several places is the same in all of them."""

import tomllib
from pathlib import Path

import yaml

from utils.core.runtime import versions

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_one_version_and_one_licence():
    assert PROJECT["version"] == CITATION["version"] == versions()["litemil"]
    assert PROJECT["license"] == CITATION["license"]


def test_the_readme_cites_what_the_citation_file_does():
    readme, paper = (ROOT / "README.md").read_text(), CITATION["preferred-citation"]
    for said in (
        paper["title"],
        paper["journal"],
        paper["start"],
        f"volume  = {{{paper['volume']}}}",
        str(paper["year"]),
    ):
        assert said in readme


def test_the_workflow_tries_every_python_that_is_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    tried = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    promised = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert tried == promised
    assert PROJECT["requires-python"] == f">={tried[0]}"

"""Self-contained HTML pages: a template beside the code that fills it, and values that are HTML already."""

from collections.abc import Mapping
from pathlib import Path
from string import Template

from utils.core.files import write_text


class _Template(Template):
    """Its own mark, since a page's script is full of dollar signs."""

    delimiter = "@@"


def write_page(path: Path, template: Path, values: Mapping[str, str]) -> None:
    """Write the page `template` to `path`, each `@@name` replaced by its value; a name without one is a KeyError."""
    write_text(path, _Template(template.read_text(encoding="utf-8")).substitute(values))

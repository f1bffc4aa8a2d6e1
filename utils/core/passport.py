"""The feature passport: how a bag's patches were cut and encoded. A feature file and every model trained on it hold it.

`recipe` is what the user chose, the same for every slide of an extraction; `slide` describes one slide and its patches;
`software` holds package versions. Two bags fit together if their recipes agree in everything that both know.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from utils.core.recipe import Recipe

SCHEMA = 1


@dataclass(frozen=True)
class Passport:
    """`slide`: name, width, height, mpp, mpp_delivered, patch_size_level0, quick_hash."""

    recipe: Recipe
    slide: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def slide_hash(self) -> str | None:
        """Return the hash of the slide's content, of a MIRAX slide also that of its data files; None if unknown."""
        hashes = [self.slide.get(name) for name in ("quick_hash", "data_hash")]
        return None if hashes[0] is None else " ".join(filter(None, hashes))

    def to_json(self) -> str:
        content = {
            "schema": self.schema,
            "recipe": self.recipe.as_dict(),
            "slide": self.slide,
            "software": self.software,
        }
        return json.dumps(content, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Passport":
        """Read a passport; raise ValueError, KeyError or TypeError for a text that is none."""
        content = json.loads(text, parse_constant=_no_number)
        recipe, slide, software = (content[name] for name in ("recipe", "slide", "software"))
        if not all(isinstance(fields, dict) for fields in (recipe, slide, software)):
            raise ValueError("recipe, slide or software is not a set of fields")
        return cls(Recipe.from_dict(recipe), slide, software, content["schema"])


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")

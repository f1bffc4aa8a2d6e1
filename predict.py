"""Predict a slide with a trained model, and show what the model attended to.

uv run predict.py --checkpoint outputs/LiteMIL/mine/all_folds_best.pth --input slide.h5
uv run predict.py --checkpoint outputs/LiteMIL/mine/all_folds_best.pth --input slide.svs --visualize
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils.attention_visualizer import AttentionVisualizer, Caption, check_drawable
from utils.bags.store import is_feature_file
from utils.core import cli
from utils.core.config import Pictures, Prediction, PredictionRecipe
from utils.core.errors import ConfigError
from utils.core.files import write_json
from utils.core.runtime import resolve_device
from utils.inference import SlidePrediction, check_input, make_predictor
from utils.learning.aggregation import SlideFeed


def main() -> None:
    groups = {"prediction": Prediction, "raw slides": PredictionRecipe, "pictures": Pictures}
    asked, recipe, pictures = cli.parse(str(__doc__), groups)
    check_input(asked.input)
    wsi = slide_to_draw_on(asked, pictures)
    visualizer = AttentionVisualizer(pictures.cmap, pictures.alpha, pictures.scale, resolve_device(asked.device))
    predictor = make_predictor(asked, recipe)
    source = predictor.keep_features(asked.input, asked.output_dir) if recipe.save_features else asked.input
    bag = predictor.bag(source, asked.feat_type, wsi if is_feature_file(asked.input) else None)
    patch_size = check_drawable(wsi, source, bag, recipe.patch_size, recipe.level) if wsi else None
    prediction = predictor.predict_bag(bag, source, asked.mode, asked.chunk_size)

    provenance = predictor.provenance(prediction)
    written = [source] if recipe.save_features else []
    if wsi and patch_size:
        written += draw(visualizer, wsi, prediction, provenance, asked.output_dir, patch_size, pictures.top_k)
    written.append(asked.output_dir / f"{prediction.slide}_prediction.json")
    write_json(written[-1], prediction.as_dict() | provenance)
    print(f"{prediction.slide}: {prediction.predicted_class} ({prediction.confidence:.1%})")
    print("\n".join(f"  {path}" for path in written))


def slide_to_draw_on(asked: Prediction, pictures: Pictures) -> Path | None:
    """The slide to draw on, None without --visualize; wrong combinations fail before any work."""
    raw = not is_feature_file(asked.input)
    if raw and pictures.wsi not in (None, asked.input):
        raise ConfigError(f"--wsi {pictures.wsi}: --input is a raw slide itself; leave --wsi out")
    if not pictures.visualize:
        return None
    if raw:
        return asked.input
    if pictures.wsi is None:
        raise ConfigError("--visualize needs the slide of the feature file: give it with --wsi")
    if is_feature_file(pictures.wsi):
        raise ConfigError(f"--wsi {pictures.wsi}: a feature file; give the slide it was made from")
    return pictures.wsi


def draw(
    visualizer: AttentionVisualizer,
    wsi: Path,
    prediction: SlidePrediction,
    provenance: Mapping[str, Any],
    output_dir: Path,
    patch_size_level0: int,
    top_k: int,
) -> list[Path]:
    bag, passport = prediction.bag, prediction.bag.passport
    assert bag.coords is not None and prediction.attention is not None  # noqa: S101, PT018 - checked, all models attend
    return visualizer.save_set(
        wsi,
        output_dir,
        bag.coords,
        prediction.attention,
        patch_size_level0,
        name=prediction.slide,
        caption=caption_of(prediction, provenance),
        top_k=top_k,
        record={
            "class_names": prediction.class_names,
            "probabilities": prediction.probabilities,
            "prediction": prediction.predicted_class,
            "mpp": (passport.slide.get("mpp_delivered") if passport else None) or np.nan,
        },
    )


def caption_of(prediction: SlidePrediction, provenance: Mapping[str, Any]) -> Caption:
    """What the pictures say of the prediction and how it was made."""
    model = provenance["model"]
    settings = ", ".join(f"{name} {value}" for name, value in model.items() if name != "name")
    facts = [
        ("model", f"{model['name']} ({settings})"),
        ("checkpoint", provenance["checkpoint"]),
        ("fed", _said_of(prediction.feed)),
    ]
    recipe = provenance["recipe"] or {}
    told = ("backbone", "weights_digest", "patch_size", "stride", "level", "mpp", "tissue_threshold", "precision")
    facts += [(name, _short(str(recipe[name]))) for name in told if recipe.get(name) is not None]
    delivered = (provenance["slide_record"] or {}).get("mpp_delivered")
    if delivered is not None:
        facts.append(("um/px of the patches", f"{delivered:.4g}"))
    seen = "The model was trained on this slide: its prediction proves nothing."
    return Caption(
        f"{prediction.predicted_class} ({prediction.confidence:.1%})",
        dict(zip(prediction.class_names, prediction.probabilities.tolist(), strict=True)),
        facts,
        [seen] if prediction.seen_in_training else [],
    )


def _said_of(feed: SlideFeed) -> str:
    return "whole" if feed.chunk_size is None else f"in chunks of {feed.chunk_size}, their probabilities averaged"


def _short(text: str) -> str:
    """A digest's beginning tells it from others."""
    return text[:16] if len(text) == 64 else text


if __name__ == "__main__":
    cli.run(main)

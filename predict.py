"""Predict a slide with a trained model, and show what the model attended to.

uv run predict.py --checkpoint outputs/LiteMIL/mine/all_folds_best.pth --input slide.h5
uv run predict.py --checkpoint outputs/LiteMIL/mine/all_folds_best.pth --input slide.svs --visualize
"""

from pathlib import Path

from utils.attention_visualizer import AttentionVisualizer, check_drawable
from utils.bags.store import is_feature_file
from utils.core import cli
from utils.core.config import Pictures, Prediction, PredictionRecipe
from utils.core.errors import ConfigError
from utils.core.files import write_json
from utils.core.runtime import resolve_device
from utils.inference import check_input, make_predictor


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

    record = prediction.as_dict() | predictor.provenance(prediction)
    written = [source] if recipe.save_features else []
    if wsi and patch_size:
        assert bag.coords is not None and prediction.attention is not None  # noqa: S101, PT018 - checked, all attend
        written += visualizer.save_set(
            wsi, asked.output_dir, bag.coords, prediction.attention, patch_size,
            name=prediction.slide, record=record, top_k=pictures.top_k,
        )  # fmt: skip
    written.append(asked.output_dir / f"{prediction.slide}_prediction.json")
    write_json(written[-1], record)
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


if __name__ == "__main__":
    cli.run(main)

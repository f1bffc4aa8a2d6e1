"""Predict slides with trained models, and show what the models attended to.

uv run predict.py --checkpoint outputs/LiteMIL/mine/all_folds_best.pth --input slide.h5
uv run predict.py --checkpoint outputs/LiteMIL/mine/all_folds_best.pth --input slide.svs --visualize
uv run predict.py --checkpoint outputs/LiteMIL/mine/fold_*_best.pth --input_dir features/ --labels_csv labels.csv
uv run predict.py --out_of_fold outputs/LiteMIL/mine --visualize --wsi slides/
"""

import sys

from utils.core import cli
from utils.core.errors import ConfigError
from utils.core.ray_settings import Cluster
from utils.pictures.settings import Pictures
from utils.prediction.settings import Prediction, PredictionRecipe


def main() -> None:
    groups = {
        "prediction": Prediction,
        "raw slides": PredictionRecipe,
        "pictures": Pictures,
        "beyond one machine": Cluster,
    }
    settings, recipe, pictures, cluster = cli.parse(str(__doc__), groups)
    draws = pictures.visualize or settings.faithfulness or settings.labels_csv is not None
    if settings.figure_format != Prediction.figure_format and not draws:
        raise ConfigError(
            f"--figure_format {' '.join(settings.figure_format)}: no figure is drawn; give --visualize, --faithfulness "
            "or --labels_csv with it"
        )
    # These imports take seconds; a wrong command line is refused before them.
    from utils.core.device import resolve_device
    from utils.prediction.inputs import PredictionFiles
    from utils.prediction.run import make_predictors, predict_files

    files = PredictionFiles(settings)
    device = resolve_device(settings.device)
    drawing = None
    if pictures.visualize:
        from utils.prediction.prediction_pictures import PredictionPictures

        drawing = PredictionPictures(pictures, files, recipe, device)
    predictors = make_predictors(files, recipe)
    statuses, words = predict_files(predictors, files, recipe, drawing, cluster)
    print(words)
    if any(status.status == "failed" for status in statuses):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)

"""Turn whole-slide images into patch features.

uv run extractFeatures.py --input slide.svs --backbone resnet50 --mpp 0.5
uv run extractFeatures.py --input_dir slides/ --output_dir features/ --backbone uni --mpp 0.5
"""

import sys

from utils.core import cli
from utils.core.ray_settings import Cluster
from utils.features.settings import Extraction
from utils.slides.settings import ExtractionFiles


def main() -> None:
    groups = {"files": ExtractionFiles, "recipe": Extraction, "beyond one machine": Cluster}
    files, recipe, cluster = cli.parse(str(__doc__), groups)
    # These imports take seconds; a wrong command line is refused before them.
    from utils.core.errors import ConfigError
    from utils.features.extraction import closing_text, dry_run, extract_slides
    from utils.features.extractor import WSIFeatureExtractor
    from utils.slides.batch import SlideFiles
    from utils.slides.slide_mpps import write_slides_csv

    if files.write_slides_csv is not None:
        print(write_slides_csv(files.write_slides_csv, SlideFiles(files).slides()))
        return
    extractor = WSIFeatureExtractor.of_config(recipe)
    if files.dry_run and cluster.is_asked_for:
        raise ConfigError("--dry_run looks from this machine alone; leave --ray out")
    if files.dry_run:
        statuses, text = dry_run(extractor, files)
    else:
        statuses = extract_slides(extractor, files, cluster)
        text = closing_text(files, statuses, cli.took())
    print(text)
    if any(status.status == "failed" for status in statuses):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)

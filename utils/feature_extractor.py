"""WSIFeatureExtractor: a slide's patches through a backbone. It lives in `utils.features.extractor`."""

from utils.features.extractor import WSIFeatureExtractor

__all__ = ["WSIFeatureExtractor"]

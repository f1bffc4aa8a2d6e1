"""SlidePredictor and extractPredict: what trained models say of slides. They live in `utils.prediction.predictor`."""

from utils.prediction.predictor import SlidePrediction, SlidePredictor, extractPredict

__all__ = ["SlidePrediction", "SlidePredictor", "extractPredict"]

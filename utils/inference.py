"""SlidePredictor and extractPredict: what trained models say of slides. They live in `utils.prediction.predictor`."""

from utils.prediction.predictor import SlidePredictor, extractPredict
from utils.prediction.slide_prediction import SlidePrediction

__all__ = ["SlidePrediction", "SlidePredictor", "extractPredict"]

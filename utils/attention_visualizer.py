"""AttentionVisualizer: pictures of attention on a slide. It lives in `utils.pictures.visualizer`."""

from utils.pictures.visualizer import AttentionVisualizer

__all__ = ["AttentionVisualizer"]

"""Resize, crop and normalise patches for a backbone; a `Transform` can be written into a feature file."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Transform:
    """How a patch is changed before the network sees it.

    Attributes:
        resize: px of the shorter side after resizing, None to keep the size.
        crop: px of the square cut from the middle, None to keep everything.
        interpolation: "bilinear" or "bicubic", antialiased.
        mean, std: per channel, of values scaled to 0..1.
    """

    resize: int | None
    crop: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, with lists for tuples."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __call__(self, patches: Tensor) -> Tensor:
        """Turn (B, P, P, 3) uint8 into (B, 3, S, S) float32, on the device of `patches`.

        It resizes as PIL does: with the same filters, widened when shrinking, first across and then down, clipped and
        rounded to whole grey levels after each. PIL computes in fixed point, so a value can differ by a level of 255.
        """
        images = patches.float().permute(0, 3, 1, 2)
        if self.resize is not None:
            images = _resized(images, self.resize, self.interpolation)
        if self.crop is not None:
            top, left = (images.shape[-2] - self.crop) // 2, (images.shape[-1] - self.crop) // 2
            images = images[..., top : top + self.crop, left : left + self.crop]
        # (images / 255 - mean) / std in one pass, row by row: pixel by pixel takes three times as long.
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        shift, scale = (values.repeat(images.shape[-1]) for values in (-mean / std, 1 / (255 * std)))
        pixels = images.permute(0, 2, 3, 1)
        return torch.addcmul(shift, pixels.flatten(2), scale).view(pixels.shape).permute(0, 3, 1, 2)


def _resized(images: Tensor, shorter: int, interpolation: str) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) == shorter:
        return images
    scale = shorter / min(height, width)
    new_height, new_width = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    for size in ((height, new_width), (new_height, new_width)):
        images = nn.functional.interpolate(images, size, mode=interpolation, antialias=True, align_corners=False)
        # Halves go up, as PIL's do; the thousandth keeps float noise from settling them differently on each device.
        images = images.add_(0.501).floor_().clamp_(0, 255)
    return images

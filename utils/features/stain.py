"""Descriptors of a patch that need no weights: its colour alone, or colour with texture and nuclear density.

Colour is measured in optical densities, which add up, separated into haematoxylin, eosin and a residual (Ruifrok and
Johnston 2001, Anal Quant Cytol Histol 23:291-299). `stain` holds nothing spatial, so a model trained on it shows how
much of a label colour explains; `stain-texture` adds shape at a few scales.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.core.errors import BackboneError

# Part of every weights_digest: raise it with any change that changes a feature.
VERSION = 1
DENSITIES = ("haematoxylin", "eosin", "residual", "absorbance")
SCALES = (2, 4, 8, 16)  # px of the patch: sides of the squares averaged

# Optical densities of red, green and blue of the pure stains, after Ruifrok and Johnston.
_HAEMATOXYLIN, _EOSIN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105)
_PERCENTILES = (5, 25, 50, 75, 95)
_COLOURS = ("red", "green", "blue")
_COLOUR_PAIRS = ((0, 1), (0, 2), (1, 2))
_BINS = 2048  # of each density, over all that 8-bit colours can give: 0.004 (absorbance 0.001) wide
_STAINED_CHROMA = 0.03  # density between the least and the most absorbed colour, as the tissue detector's
_DARK = 0.55  # mean density of ink, folds and the densest nuclei
_NUCLEAR_DENSITIES = (0.2, 0.35, 0.5)  # of haematoxylin: pale, usual and dense chromatin
_NUCLEAR_SCALE = 2  # px
_PEAK_SCALE = 4  # px; a nucleus is about four of them wide at 20x
_PEAK_WIDTH, _PEAK_SURROUND = 5, 9  # px of the peak scale: where a peak is the highest, and what it stands out of
_MIN_PROMINENCE = 0.05  # density
_BLOCK_SCALE = 8  # px
_BLOCKS = 4  # by four parts of the patch are compared
_GRAIN = 32  # px: a whole number of squares of every scale, and of blocks
_LEAST = 64  # px of a patch: gradients need three squares of the widest scale
_AT_ONCE = 4  # patches: what is computed of them stays in the processor's cache
_FAINT = 0.01  # density; nothing is divided by smaller spreads, which are noise


class StainDescriptor(nn.Module):
    """Turns images (B, 3, P, P) of 0..1 into descriptors (B, D) float32; `stain_names` names the D values.

    `stain` does not depend on the positions of pixels. `stain-texture` needs patches of 64 px or more, uses the largest
    central square whose side is a multiple of 32, and is the same for a patch turned by 90 degrees if P is even. Both
    are finite for every image.
    """

    weight: Tensor
    bias: Tensor
    least: Tensor
    width: Tensor

    def __init__(self, texture: bool) -> None:
        super().__init__()
        self.texture = texture
        for name, value in _bins()._asdict().items():
            self.register_buffer(name, value.float())

    def forward(self, images: Tensor) -> Tensor:
        """Raise BackboneError for patches that are too small for texture."""
        if self.texture and images.shape[-1] < _LEAST:
            raise BackboneError(f"stain-texture: patches of {images.shape[-1]} px; {_LEAST} px and more are expected")
        # Autocast would separate the stains in half precision.
        with torch.autocast(images.device.type, enabled=False):
            bins = _Bins(self.weight, self.bias, self.least, self.width)
            return torch.cat([_describe(batch, bins, self.texture) for batch in images.float().split(_AT_ONCE)])


def stain_names(texture: bool) -> list[str]:
    """Return the names of the D values of `stain`, or with `texture` of `stain-texture`, in order.

    Densities are optical densities to base 10; absorbance is their mean over the three colours. `stain`:

    - haematoxylin, eosin, residual, absorbance: mean, std, skew, and the percentiles q05 to q95; dark_share: of pixels
      with absorbance over 0.55;
    - red, green, blue: mean and std of 0..1, and the correlation between two of them;
    - chroma: mean and std of the largest minus the smallest density of a pixel; stained_share: of pixels with chroma
      over 0.03.

    `stain-texture` also has, of haematoxylin and absorbance averaged over squares of 2, 4, 8 and 16 px:

    - std; gradient_mean and gradient_std; anisotropy: 0 if gradients point everywhere, 1 if along one line;
      curvature: the mean absolute Laplacian;
    - haematoxylin_eosin_correlation at each of the scales;
    - nuclear_share and nuclear_edge at three densities of haematoxylin: share of the area above it, and share of the
      neighboring squares of 2 px that lie on two sides of it;
    - peaks of haematoxylin, per 100 squares of 4 px; mean and std of their height, mean of their prominence;
    - block_std: between sixteen parts of the patch, of haematoxylin, absorbance, nuclear share and peaks.
    """
    names = [f"{density}_{measure}" for density in DENSITIES for measure in ("mean", "std", "skew", *_percentiles())]
    names.append("dark_share")
    names += [f"{colour}_{measure}" for measure in ("mean", "std") for colour in _COLOURS]
    names += [f"{_COLOURS[first]}_{_COLOURS[second]}_correlation" for first, second in _COLOUR_PAIRS]
    names += ["chroma_mean", "chroma_std", "stained_share"]
    return names + _texture_names() if texture else names


def _percentiles() -> list[str]:
    return [f"q{percent:02d}" for percent in _PERCENTILES]


def _texture_names() -> list[str]:
    measures = ("std", "gradient_mean", "gradient_std", "anisotropy", "curvature")
    return [
        *(
            f"{density}_{scale}px_{measure}"
            for scale in SCALES
            for measure in measures
            for density in ("haematoxylin", "absorbance")
        ),
        *(f"haematoxylin_eosin_{scale}px_correlation" for scale in SCALES),
        *(f"nuclear_{measure}_{level}" for level in _NUCLEAR_DENSITIES for measure in ("share", "edge")),
        *("peaks", "peak_height_mean", "peak_height_std", "peak_prominence"),
        *(f"{measure}_block_std" for measure in ("haematoxylin", "absorbance", "nuclear_share", "peaks")),
    ]


class _Bins(NamedTuple):
    """The bins of the density histograms. A density, in bins above the least possible one, is `weight` (4, 3) times the
    logarithms of the transmitted light, plus `bias` (4, 1); the `least` density and the `width` (4, 1) of a bin turn it
    back.
    """

    weight: Tensor
    bias: Tensor
    least: Tensor
    width: Tensor


def _bins() -> _Bins:
    separation = _separation()
    densest = math.log10(256)
    least = densest * separation.clamp(max=0).sum(dim=1, keepdim=True)
    width = densest * separation.abs().sum(dim=1, keepdim=True) / (_BINS - 1)
    weight = -separation / width
    # White has density 0; its transmitted light is taken as 256/255.
    bias = -(least / width) - weight.sum(dim=1, keepdim=True) * math.log10(256 / 255)
    return _Bins(weight, bias, least, width)


def _separation() -> Tensor:
    """Return the (4, 3) float64 matrix from the colours' densities to `DENSITIES`; no stain makes the residual."""
    stains = nn.functional.normalize(torch.tensor([_HAEMATOXYLIN, _EOSIN], dtype=torch.float64))
    residual = nn.functional.normalize(torch.linalg.cross(stains[0], stains[1]), dim=0)
    separation = torch.linalg.inv(torch.stack([*stains, residual])).T
    return torch.cat([separation, torch.full((1, 3), 1 / 3, dtype=torch.float64)])


def _describe(images: Tensor, bins: _Bins, texture: bool) -> Tensor:
    images = images.contiguous()  # what follows reads colour by colour, with gaps if images were channels-last
    transmitted = (images + 1 / 255).log10_()
    weight = bins.weight.expand(len(images), -1, -1)
    bin_units = torch.baddbmm(bins.bias, weight, transmitted.flatten(2)).unflatten(2, images.shape[2:])
    features = [*_density_statistics(bin_units, bins), *_colour_statistics(images, transmitted)]
    if texture:
        features += _texture_statistics(bin_units, bins)
    return torch.cat(features, dim=1)


def _density_statistics(bin_units: Tensor, bins: _Bins) -> list[Tensor]:
    """Measure each density on its histogram, which needs no sorting and ignores the positions of pixels."""
    batch, channels, number = *bin_units.shape[:2], bin_units[0, 0].numel()
    first = torch.arange(batch * channels, dtype=torch.int32, device=bin_units.device).mul_(_BINS)
    indices = bin_units.flatten(2).int().add_(first.view(batch, channels, 1))
    counts = torch.bincount(indices.flatten(), minlength=batch * channels * _BINS).view(batch, channels, _BINS)
    share = counts / number
    values = (torch.arange(_BINS, device=bin_units.device) + 0.5) * bins.width + bins.least
    mean = (share * values).sum(dim=2, keepdim=True)
    deviation = values - mean
    std = (share * deviation.square()).sum(dim=2, keepdim=True).sqrt()
    skew = (share * deviation**3).sum(dim=2, keepdim=True) / (std + _FAINT) ** 3
    ranks = torch.tensor([math.ceil(percent / 100 * number) for percent in _PERCENTILES], device=bin_units.device)
    reached = torch.searchsorted(counts.cumsum(dim=2), ranks.expand(batch, channels, -1).contiguous())
    percentiles = (reached + 0.5) * bins.width + bins.least
    dark = (share[:, -1] * (values[-1] > _DARK)).sum(dim=1, keepdim=True)
    return [torch.cat([mean, std, skew, percentiles], dim=2).flatten(1), dark]


def _colour_statistics(images: Tensor, transmitted: Tensor) -> list[Tensor]:
    flat = images.flatten(2)
    mean = flat.mean(dim=2, keepdim=True)
    centred = flat - mean
    covariance = centred @ centred.mT / flat.shape[2]
    variance = covariance.diagonal(dim1=1, dim2=2)
    spread = (variance.unsqueeze(1) * variance.unsqueeze(2)).sqrt() + _FAINT**2
    correlation = torch.stack([(covariance / spread)[:, first, second] for first, second in _COLOUR_PAIRS], dim=1)
    red, green, blue = transmitted.flatten(2).unbind(dim=1)
    low, high = torch.minimum(red, green), torch.maximum(red, green)
    chroma = torch.maximum(high, blue) - torch.minimum(low, blue)
    stained = (chroma > _STAINED_CHROMA).float().mean(dim=1, keepdim=True)
    return [mean.flatten(1), variance.sqrt(), correlation, *_mean_std(chroma), stained]


def _texture_statistics(bin_units: Tensor, bins: _Bins) -> list[Tensor]:
    side = bin_units.shape[-1] // _GRAIN * _GRAIN
    start = (bin_units.shape[-1] - side) // 2
    maps = _halved(bin_units[..., start : start + side, start : start + side])
    maps = maps * bins.width.unsqueeze(2) + bins.least.unsqueeze(2)
    haematoxylin, eosin, absorbance = maps[:, :1], maps[:, 1:2], maps[:, 3:]
    maps = torch.cat([haematoxylin, absorbance, eosin], dim=1)
    scaled, features, correlations = {}, [], []
    for scale in SCALES:
        scaled[scale] = maps
        features += _edges(maps[:, :2])
        correlations.append(_correlation(maps[:, 0], maps[:, 2]))
        maps = _halved(maps)
    nuclei = scaled[_NUCLEAR_SCALE][:, :1]
    peaks, peak_statistics = _peaks(scaled[_PEAK_SCALE][:, :1])
    compared = (scaled[_BLOCK_SCALE][:, :2], (nuclei > _NUCLEAR_DENSITIES[1]).float(), 100 * peaks)
    return [*features, *correlations, *_nuclear_areas(nuclei), *peak_statistics, *map(_between_blocks, compared)]


def _edges(maps: Tensor) -> list[Tensor]:
    """Return five (B, C) statistics of maps (B, C, h, w)."""
    right, left, below, above = maps[..., 1:-1, 2:], maps[..., 1:-1, :-2], maps[..., 2:, 1:-1], maps[..., :-2, 1:-1]
    across, down = (right - left).div_(2), (below - above).div_(2)
    curvature = (right + left).add_(below).add_(above).sub_(maps[..., 1:-1, 1:-1], alpha=4).abs_()
    xx, yy, xy = across.square(), down.square(), across * down
    gradient = (xx + yy).sqrt_()
    xx, yy, xy = (product.mean(dim=(2, 3)) for product in (xx, yy, xy))
    anisotropy = ((xx - yy) ** 2 + 4 * xy**2).sqrt() / (xx + yy + _FAINT**2)
    std = _mean_std(maps.flatten(2))[1]
    gradient_mean, gradient_std = _mean_std(gradient.flatten(2))
    return [std.flatten(1), gradient_mean.flatten(1), gradient_std.flatten(1), anisotropy, curvature.mean(dim=(2, 3))]


def _nuclear_areas(nuclei: Tensor) -> list[Tensor]:
    features = []
    for level in _NUCLEAR_DENSITIES:
        above = nuclei > level
        edges = (above[..., 1:, :] ^ above[..., :-1, :], above[..., 1:] ^ above[..., :-1])
        share, down, across = (mask.float().mean(dim=(2, 3)) for mask in (above, *edges))
        features += [share, (down + across) / 2]
    return features


def _peaks(nuclei: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return (B, 1, h, w), 1 at peaks and 0 elsewhere, and four (B, 1) statistics of the peaks."""
    smooth = _box(nuclei, 3)
    reach = _PEAK_WIDTH // 2
    highest = nn.functional.max_pool2d(smooth, (1, _PEAK_WIDTH), stride=1, padding=(0, reach))
    highest = nn.functional.max_pool2d(highest, (_PEAK_WIDTH, 1), stride=1, padding=(reach, 0))
    prominence = smooth - _box(smooth, _PEAK_SURROUND)
    peaks = ((smooth == highest) & (prominence > _MIN_PROMINENCE)).float()
    number = peaks.sum(dim=(2, 3)).clamp_(min=1)
    height = (peaks * smooth).sum(dim=(2, 3)) / number
    spread = ((peaks * (smooth - height[..., None, None]).square()).sum(dim=(2, 3)) / number).sqrt()
    mean_prominence = (peaks * prominence).sum(dim=(2, 3)) / number
    return peaks, [100 * peaks.mean(dim=(2, 3)), height, spread, mean_prominence]


def _box(maps: Tensor, width: int) -> Tensor:
    """Return means over squares of `width`; at the rim, over the part of them that lies inside."""
    reach = width // 2
    maps = nn.functional.avg_pool2d(maps, (1, width), stride=1, padding=(0, reach), count_include_pad=False)
    return nn.functional.avg_pool2d(maps, (width, 1), stride=1, padding=(reach, 0), count_include_pad=False)


def _between_blocks(maps: Tensor) -> Tensor:
    """Return the (B, C) standard deviation between the means of sixteen blocks."""
    blocks = nn.functional.avg_pool2d(maps, maps.shape[-1] // _BLOCKS)
    return _mean_std(blocks.flatten(2))[1].flatten(1)


def _halved(maps: Tensor) -> Tensor:
    """Return means over squares of two px; sums of rows and columns are several times as fast as pooling."""
    rows = maps[..., ::2, :] + maps[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).div_(4)


def _mean_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the last axis, which stays with length 1."""
    mean = values.mean(dim=-1, keepdim=True)
    return mean, (values - mean).square_().mean(dim=-1, keepdim=True).sqrt_()


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return (B, 1) correlations of two maps (B, h, w), 0 where one of them is constant."""
    x, y = (values.flatten(1) - values.flatten(1).mean(dim=1, keepdim=True) for values in (x, y))
    product, *variances = ((a * b).mean(dim=1, keepdim=True) for a, b in ((x, y), (x, x), (y, y)))
    return product / ((variances[0] * variances[1]).sqrt() + _FAINT**2)

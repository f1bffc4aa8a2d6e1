"""Stain descriptors: named values, colour alone in the one, orientation in neither, and nothing that is not finite."""

import numpy as np
import pytest
import torch

from utils.core.errors import BackboneError
from utils.features.backbones import load_backbone
from utils.features.stain import StainDescriptor, stain_names

# What 8-bit colours of a single stain are, by its optical densities.
STAINS = {"haematoxylin": (0.650, 0.704, 0.286), "eosin": (0.072, 0.990, 0.105)}


def described(patches, *, texture=True):
    features = load_backbone("stain-texture" if texture else "stain").embed(np.asarray(patches, dtype=np.uint8))
    return [dict(zip(stain_names(texture), row, strict=True)) for row in features.tolist()]


def stained(density, stain="haematoxylin"):
    """A patch of one stain, of the densities (P, P)."""
    return np.rint(255 * 10 ** -(np.asarray(density)[..., None] * STAINS[stain]))


def tissue(seed=0, side=64):
    """A patch with structure: bright background, stripes of eosin, dark round nuclei."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    density = np.zeros((side, side, 3)) + 0.3 * (np.sin(x / 3 + y / 7) > 0)[..., None] * np.array(STAINS["eosin"])
    for row, column in rng.integers(6, side - 6, (8, 2)):
        density += 0.8 * ((y - row) ** 2 + (x - column) ** 2 < 16)[..., None] * np.array(STAINS["haematoxylin"])
    return np.clip(np.rint(245 * 10**-density + rng.normal(0, 3, (side, side, 3))), 0, 255).astype(np.uint8)


def test_every_value_has_one_name():
    for texture in (False, True):
        names = stain_names(texture)
        assert len(set(names)) == len(names) == load_backbone("stain-texture" if texture else "stain").dim
    assert stain_names(True)[: len(stain_names(False))] == stain_names(False)
    assert 64 <= len(stain_names(True)) <= 128


@pytest.mark.parametrize("stain", STAINS)
def test_a_pure_stain_is_measured_as_itself(stain):
    values = described([stained(np.full((32, 32), 0.5), stain)], texture=False)[0]
    other = next(name for name in STAINS if name != stain)
    assert values[f"{stain}_mean"] == pytest.approx(0.5, abs=0.02)
    assert values[f"{stain}_q50"] == pytest.approx(0.5, abs=0.02)
    for absent in (other, "residual"):
        assert values[f"{absent}_mean"] == pytest.approx(0, abs=0.02)
    assert values[f"{stain}_std"] < 0.01
    assert values["stained_share"] == 1


def test_statistics_are_those_of_the_pixels():
    rng = np.random.default_rng(3)
    patch = rng.integers(0, 256, (48, 48, 3))
    values = described([patch], texture=False)[0]
    absorbance = -np.log10((patch + 1) / 256).mean(axis=2)
    assert values["absorbance_mean"] == pytest.approx(absorbance.mean(), abs=0.002)
    assert values["absorbance_std"] == pytest.approx(absorbance.std(), abs=0.002)
    assert values["absorbance_q95"] == pytest.approx(np.quantile(absorbance, 0.95), abs=0.01)
    assert values["dark_share"] == pytest.approx((absorbance > 0.55).mean(), abs=0.01)
    assert values["red_mean"] == pytest.approx(patch[..., 0].mean() / 255, abs=1e-4)
    assert values["blue_std"] == pytest.approx(patch[..., 2].std() / 255, abs=1e-4)
    assert values["red_blue_correlation"] == pytest.approx(np.corrcoef(patch.reshape(-1, 3).T)[0, 2], abs=1e-3)


def test_stain_sees_colour_alone():
    patch = tissue()
    shuffled = np.random.default_rng(1).permutation(patch.reshape(-1, 3)).reshape(patch.shape)
    backbone = load_backbone("stain")
    one, other = backbone.embed(np.stack([patch, shuffled]))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    textures = load_backbone("stain-texture").embed(np.stack([patch, shuffled]))
    assert (textures[0] - textures[1]).abs().max() > 0.1


def test_stain_texture_begins_with_stain():
    patches = np.stack([tissue(seed) for seed in range(3)])
    colour = load_backbone("stain").embed(patches)
    torch.testing.assert_close(load_backbone("stain-texture").embed(patches)[:, : colour.shape[1]], colour)


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("side", [64, 78])
def test_a_turned_patch_is_the_same(turns, side):
    patch = tissue(side=side)
    one, other = load_backbone("stain-texture").embed(np.stack([patch, np.rot90(patch, turns)]))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_texture_measures_what_its_names_say():
    y, x = np.mgrid[:64, :64]
    stripes, checks = (x // 8) % 2, (x // 8 + y // 8) % 2
    flat, striped, checked, nuclei = described(
        [stained(np.full((64, 64), 0.3)), stained(0.6 * stripes), stained(0.6 * checks), tissue()]
    )
    assert flat["haematoxylin_4px_gradient_mean"] == pytest.approx(0, abs=1e-3)
    assert striped["haematoxylin_4px_gradient_mean"] > 0.05
    assert striped["haematoxylin_2px_anisotropy"] > 0.9 > 0.3 > checked["haematoxylin_2px_anisotropy"]
    assert flat["nuclear_share_0.2"] == 1
    assert striped["nuclear_share_0.35"] == pytest.approx(0.5, abs=0.01)
    assert checked["nuclear_edge_0.35"] > 1.5 * striped["nuclear_edge_0.35"] > 0
    assert flat["peaks"] == 0 < nuclei["peaks"]


@pytest.mark.parametrize("texture", [False, True])
@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
def test_blank_patches_are_finite(texture, value):
    patches = np.full((2, 64, 64, 3), value, dtype=np.uint8)
    patches[1, ..., 1:] = 0
    features = load_backbone("stain-texture" if texture else "stain").embed(patches)
    assert torch.isfinite(features).all()
    assert features.abs().max() < 110  # peaks are per 100 squares: float16 holds all of them


@pytest.mark.parametrize("side", [64, 65, 100, 224])
def test_any_side_from_64_px(side):
    features = load_backbone("stain-texture").embed(np.stack([tissue(side=side)] * 5))
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features, features[:1].expand_as(features), atol=1e-5, rtol=1e-4)


def test_too_small_for_a_texture():
    with pytest.raises(BackboneError, match="stain-texture: patches of 63 px; 64 px and more are expected"):
        load_backbone("stain-texture").embed(np.zeros((1, 63, 63, 3), dtype=np.uint8))
    assert load_backbone("stain").embed(np.zeros((1, 3, 3, 3), dtype=np.uint8)).isfinite().all()


def test_autocast_changes_nothing():
    images = torch.from_numpy(tissue()).permute(2, 0, 1)[None] / 255
    descriptor = StainDescriptor(texture=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = descriptor(images)
    assert torch.equal(reduced, descriptor(images))

"""The networks of the backbones, built with timm; their weights come from `weights.py`."""

import difflib
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.core.errors import BackboneError
from utils.features.transform import Transform
from utils.features.weights import HUB_FAILURES, load_strictly, read_weights, unavailable

_HUB = "hf-hub:"


def load_timm() -> Any:
    """Return timm. Its import takes seconds (torchvision), so that only building a network waits for it."""
    import timm

    return timm


class ResNetToLayer3(nn.Module):
    """A ResNet cut after its third stage and averaged over positions; its weights keep the ResNet's names."""

    def __init__(self) -> None:
        super().__init__()
        resnet: Any = load_timm().create_model("resnet50.tv_in1k", pretrained=False, num_classes=0)
        self.conv1, self.bn1, self.act1, self.maxpool = resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


class ClassAndMeanToken(nn.Module):
    """A vision transformer's CLS token beside the mean of its patch tokens; registers are left out."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(images)
        return torch.cat([tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)], dim=1)


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it: the same features to float rounding, in half the time.

    It works for a ResNet, whose layers are registered in the order in which they compute.
    """
    for block in network.modules():
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(block.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, name, fuse_conv_bn_eval(conv, norm))
                setattr(block, norm_name, nn.Identity())
    return network


def vit(model: str, **settings: Any) -> nn.Module:
    """Return a vision transformer with layer scale, whose feature is its CLS token."""
    return load_timm().create_model(
        model, pretrained=False, num_classes=0, init_values=1e-5, dynamic_img_size=True, **settings
    )


def swiglu_vit(model: str, **settings: Any) -> nn.Module:
    return vit(model, mlp_layer=load_timm().layers.SwiGLUPacked, act_layer=nn.SiLU, **settings)


def timm_network(name: str, model: str, path: Path | None) -> tuple[nn.Module, Transform]:
    """Return a model of timm with its weights, from the file `path` or published, and its transform.

    `model` is one of timm's own, or `hf-hub:<owner>/<repo>`, one that its repository on the Hugging Face hub describes,
    at `@<revision>` or the newest. Raises BackboneError, which calls the backbone `name`.
    """
    timm = load_timm()
    if model.startswith(_HUB):
        _check_repo(name, model.removeprefix(_HUB))
    elif not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise BackboneError(
            f"backbone {name!r}: timm {timm.__version__} has no such model; {hint}see timm.list_models()"
        )
    try:
        network: Any = timm.create_model(model, pretrained=path is None, num_classes=0)
    except HUB_FAILURES as error:
        file = f"config.json or weights of huggingface.co/{model.removeprefix(_HUB)}"
        raise unavailable(name, file if model.startswith(_HUB) else f"timm's weights of {model}", error) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a config.json of another kind
        if not model.startswith(_HUB):
            raise
        raise BackboneError(
            f"backbone {name!r}: its config.json describes no model that timm {timm.__version__} can build "
            f"({type(error).__name__}: {error}); choose a repository whose page shows timm.create_model"
        ) from error
    except RuntimeError as error:  # no such tag, or a model nobody published weights for
        reason = " ".join(str(error).split())[:160]
        raise BackboneError(f"backbone {name!r}: timm has no weights for it ({reason}); give --weights FILE") from error
    if path is not None:
        load_strictly(network, read_weights(path), path, _classifier_prefixes(network))
    return network, _timm_transform(name, network.pretrained_cfg)


def _check_repo(name: str, repo: str) -> None:
    """Raise BackboneError unless `repo` is owner/name, with or without @revision."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", repo):
        raise BackboneError(
            f"backbone {name!r}: {repo!r} names no repository of the hub; give timm:hf-hub:OWNER/NAME, or "
            "timm:hf-hub:OWNER/NAME@REVISION"
        )


def _classifier_prefixes(network: Any) -> tuple[str, ...]:
    names = network.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _timm_transform(name: str, config: Mapping[str, Any]) -> Transform:
    """Return the transform to the model's own input size, of the whole patch: a centre crop would lose tissue."""
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise BackboneError(
            f"backbone {name!r}: takes input of {config['input_size']}; a square of 3 channels is expected"
        )
    interpolation = config.get("interpolation", "bicubic")
    return Transform(
        resize=height,
        interpolation=interpolation if interpolation in {"bilinear", "bicubic"} else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def measured_dim(name: str, network: nn.Module, transform: Transform) -> int:
    """Return D, measured on one black patch: the widths that timm states are not always those that models return."""
    side = transform.resize or 224
    with torch.inference_mode():
        features = network.eval()(torch.zeros(1, 3, side, side))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise BackboneError(
            f"backbone {name!r}: does not give one vector per patch; choose a model with pooled features"
        )
    return features.shape[1]

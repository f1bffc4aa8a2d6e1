"""Feature backbones: which there are, how their weights are found, and how patches become features.

Weights come from a local file or from a hub, and are only ever read as tensors: no pickle is executed, no remote code
is trusted. What a backbone does to a patch is a `Transform` that can be written into a feature file.
"""

import difflib
import hashlib
import itertools
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import get_token, hf_hub_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.core.errors import BackboneError
from utils.core.recipe import BACKBONE_ALIASES, backbone_name
from utils.core.tensors import load_tensors
from utils.features.stain import VERSION as STAIN_VERSION
from utils.features.stain import StainDescriptor, stain_names

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_TIMM = "timm:"
# HfHubHTTPError's own bases name the HTTP library at work (requests or httpx), whose failures can come through as well.
_HUB_FAILURES: tuple[type[Exception], ...] = (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)
_MAX_NAMED_KEYS = 4
# What is computed of so few patches stays in a processor's cache: a ResNet is 1.5 times as fast as with 16.
_PATCHES_ON_CPU = 4

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Transform:
    """What is done to a patch before the network sees it.

    Attributes:
        resize: px of the shorter side after resizing, None to leave the size alone.
        crop: px of the square cut from the middle, None to cut nothing.
        interpolation: "bilinear" or "bicubic", antialiased.
        mean, std: per channel, of values scaled to 0..1.
    """

    resize: int | None
    crop: int | None = None
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the tuples as lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __call__(self, patches: Tensor) -> Tensor:
        """(B, P, P, 3) uint8 to (B, 3, S, S) float32, on the device of `patches`.

        Resizing is PIL's: the same filters, widened when shrinking, first across and then down, clipped and rounded to
        whole grey levels after each. PIL does it in fixed point, so that a value can differ by a level of 255.
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


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone of the registry.

    Attributes:
        dim: length of a feature.
        token: what the feature is: "pooled" (over positions), "cls", or "cls+mean" (CLS, then the mean of the patch
            tokens; registers take no part).
        precision: what it computes in on a CUDA device, as its card does: fp16, bf16 or fp32.
        build: makes the network, without weights.
        repo, filename: where its weights are on the Hugging Face hub; None where it needs none.
        revision: the commit of `repo`; None means the newest.
        gated: whether access has to be asked for.
        rename: turns the published state dict into the network's own.
        finish: makes the network that computes the features from the one with the published weights.
        spare: prefixes of weights the network does not use; a file may hold them.
    """

    name: str
    dim: int
    transform: Transform
    token: str
    precision: str
    licence: str
    build: Callable[[], nn.Module]
    repo: str | None = None
    filename: str = "pytorch_model.bin"
    revision: str | None = None
    gated: bool = False
    rename: Callable[[StateDict], StateDict] | None = None
    finish: Callable[[nn.Module], nn.Module] | None = None
    spare: tuple[str, ...] = ()

    @property
    def aliases(self) -> tuple[str, ...]:
        """Its other names."""
        return BACKBONE_ALIASES.get(self.name, ())

    @property
    def access(self) -> str | None:
        """How to get the weights, where they are gated."""
        if not self.gated:
            return None
        return f"gated: ask for access at https://huggingface.co/{self.repo}, then log in with `hf auth login`"


@dataclass(eq=False)
class Backbone:
    """A network with its weights, and the transform that goes with it.

    Attributes:
        name: canonical name.
        dim: D, the length of a feature.
        transform: what is done to a patch first.
        module: (B, 3, S, S) float to (B, D), in eval mode.
        weights_digest: sha256 of the published weights that make the features; of a descriptor, of its version.
        precision: what it computes in on a CUDA device: fp16, bf16 or fp32.
        device: where it is; `to` moves it.
    """

    name: str
    dim: int
    transform: Transform
    module: nn.Module
    weights_digest: str
    precision: str = "fp32"
    device: torch.device = field(init=False, default=torch.device("cpu"))

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)
        # Twice as fast for convolutions, and no other network minds.
        self.module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - its stub lacks it

    def to(self, device: torch.device | str) -> "Backbone":
        """Move the network; returns itself."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    @torch.inference_mode()
    def embed(self, patches: NDArray[np.uint8] | Tensor) -> Tensor:
        """(B, P, P, 3) uint8 RGB to (B, D) float32 features, on the device of the network.

        Each feature depends on its own patch only, to float rounding. Autocast, where the caller has switched it on,
        applies to the network and not to the transform. A CPU takes a few patches at a time, which costs no speed.

        Raises:
            BackboneError: not uint8, or of another shape.
        """
        batch = torch.as_tensor(patches)
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
            raise BackboneError(
                f"{self.name}: patches of {batch.dtype} and shape {tuple(batch.shape)}; (B, P, P, 3) uint8 is expected"
            )
        if not len(batch):
            return torch.empty((0, self.dim), device=self.device)
        return torch.cat([self.module(images).float() for images in self.prepare(batch)])

    def prepare(self, patches: Tensor) -> Iterator[Tensor]:
        """(B, P, P, 3) uint8, part by part, to what the network takes: (b, 3, S, S) on its device, channels last."""
        parts = patches.split(_PATCHES_ON_CPU) if self.device.type == "cpu" else (patches,)
        for part in parts:
            with torch.autocast(self.device.type, enabled=False):
                images = self.transform(part.to(self.device, non_blocking=True))
            yield images.contiguous(memory_format=torch.channels_last)


def list_backbones() -> list[str]:
    """The names of the registry, sorted; besides them `timm:<model>` is any model of timm."""
    return sorted(_REGISTRY)


def backbone_spec(name: str) -> BackboneSpec:
    """The registry's entry for a name or alias; not for `timm:` names, which have none."""
    return _REGISTRY[canonical_backbone(name)]


def canonical_backbone(name: str) -> str:
    """The one name of a backbone, whatever alias and case it is asked for by; `timm:<model>` stays as it is.

    Raises:
        BackboneError: unknown; the message lists the known ones and the nearest.
    """
    known = backbone_name(name)
    if known in _REGISTRY or known.startswith(_TIMM):
        return known
    aliases = [alias for spec in _REGISTRY.values() for alias in (spec.name, *spec.aliases)]
    near = difflib.get_close_matches(known, aliases, n=1)
    hint = f"did you mean {backbone_name(near[0])}? " if near else ""
    if _timm().is_model(name.strip()):
        hint = f"did you mean {_TIMM}{name.strip()}? "
    raise BackboneError(f"backbone {name!r} is unknown; {hint}known are {', '.join(list_backbones())}, timm:<model>")


def load_backbone(name: str, weights: Path | str | None = None) -> Backbone:
    """A backbone with its weights, on the CPU.

    Args:
        name: a name of the registry, one of its aliases, or `timm:<model>`.
        weights: a local .pth, .pt, .bin or .safetensors file; None downloads the published weights, or takes them from
            the hub's cache.

    Raises:
        BackboneError: unknown name; weights that cannot be had, be read safely, or do not fit.
    """
    name = canonical_backbone(name)
    path = None if weights is None else Path(weights)
    if name.startswith(_TIMM):
        return _load_timm(name, path)
    spec = _REGISTRY[name]
    if spec.repo is None and path is not None:
        raise BackboneError(f"--weights {path}: backbone {name!r} has no weights; leave --weights out")
    if spec.repo is None:
        module = spec.build()
        digest = hashlib.sha256(f"{name} {STAIN_VERSION}".encode()).hexdigest()
    else:
        file = path or _download(spec)
        state = read_weights(file)
        # Drawing up to a thousand million random weights first would take half a minute.
        with torch.device("meta"):
            module = spec.build()
        module.to_empty(device="cpu")
        _load_strictly(module, spec.rename(state) if spec.rename else state, file, spec.spare)
        digest = digest_weights(module.state_dict())
    # The digest stays that of the published weights, whatever is made of them for speed.
    module = spec.finish(module.eval()) if spec.finish else module
    return Backbone(spec.name, spec.dim, spec.transform, module, digest, spec.precision)


def digest_weights(state: Mapping[str, Tensor]) -> str:
    """sha256 over the names (sorted), shapes, dtypes and bytes of a state dict, in hexadecimal.

    Equal for the same weights whatever file format they came in. BatchNorm's step counters take no part: they do not
    touch the features, and some files lack them.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if _is_counter(name):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_weights(path: Path) -> StateDict:
    """The tensors of a weights file, by name; a dict nested as `state_dict` or `model` is unwrapped.

    Raises:
        BackboneError: missing, unreadable, or holding anything else than tensors.
    """
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors(path)
    expected = "weights (tensors alone: .safetensors, or a .pth of torch.save(model.state_dict(), FILE))"
    content = load_tensors(path, BackboneError, expected)
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise BackboneError(f"{path}: holds no state dict; a dict from weight names to tensors is expected")
    return dict(content)


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise BackboneError(f"{path}: no such weights file; check the path") from None
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path}: cannot be read as safetensors ({error}); download it again") from error


def rename_dinov2(state: StateDict) -> StateDict:
    """Weights of a Hugging Face Dinov2Model (any depth and width) as those of timm's vision transformer.

    The query, key and value projections become one; the mask token, used in pretraining only, is dropped. Names that
    are not a Dinov2Model's pass unchanged, so that a strict load reports them.
    """
    renamed: StateDict = {}
    split: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name == "embeddings.mask_token":
            continue
        for pattern, replacement in _DINOV2_NAMES:
            name = re.sub(pattern, replacement, name)
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", name)
        if match:
            split.setdefault(f"{match[1]}qkv.{match[3]}", {})[match[2]] = tensor
        else:
            renamed[name] = tensor
    for name, parts in split.items():
        if parts.keys() == {"q", "k", "v"}:
            renamed[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
        else:
            renamed |= {name.replace("qkv", part): tensor for part, tensor in parts.items()}
    return renamed


# The second name of each projection is the one transformers 5 uses in memory; files have the first.
_DINOV2_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def _timm() -> Any:
    """timm, imported when a network is built: it brings torchvision along and takes seconds, which predicting from a
    feature file need not wait for.
    """
    import timm

    return timm


class _ResNetToLayer3(nn.Module):
    """A ResNet cut after its third stage, averaged over positions; its weights keep the ResNet's names."""

    def __init__(self) -> None:
        super().__init__()
        resnet: Any = _timm().create_model("resnet50.tv_in1k", pretrained=False, num_classes=0)
        self.conv1, self.bn1, self.act1, self.maxpool = resnet.conv1, resnet.bn1, resnet.act1, resnet.maxpool
        self.layer1, self.layer2, self.layer3 = resnet.layer1, resnet.layer2, resnet.layer3

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))


class _ClassAndMeanToken(nn.Module):
    """A vision transformer's CLS token beside the mean of its patch tokens; registers are left out."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vit.forward_features(images)
        return torch.cat([tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :].mean(dim=1)], dim=1)


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """Put every BatchNorm into the convolution before it: the same features to float rounding, in half the time.

    For a ResNet, whose layers are registered in the order in which they compute.
    """
    for block in network.modules():
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(block.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(block, name, fuse_conv_bn_eval(conv, norm))
                setattr(block, norm_name, nn.Identity())
    return network


def _vit(model: str, **settings: Any) -> nn.Module:
    """A vision transformer whose feature is its CLS token, with layer scale."""
    return _timm().create_model(
        model, pretrained=False, num_classes=0, init_values=1e-5, dynamic_img_size=True, **settings
    )


def _swiglu_vit(model: str, **settings: Any) -> nn.Module:
    return _vit(model, mlp_layer=_timm().layers.SwiGLUPacked, act_layer=nn.SiLU, **settings)


def _h_optimus(name: str, repo: str, licence: str, revision: str | None) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        dim=1536,
        # The card takes patches of 224 px at 0.5 um/px and resizes none; bicubic is timm's for such a network.
        transform=Transform(
            resize=224,
            interpolation="bicubic",
            mean=(0.707223, 0.578729, 0.703617),
            std=(0.211883, 0.230117, 0.177517),
        ),
        token="cls",  # noqa: S106 - not a secret
        precision="fp16",
        licence=licence,
        build=partial(_vit, "vit_giant_patch14_reg4_dinov2", img_size=224),
        repo=repo,
        revision=revision,
        gated=True,
    )


def _stain(name: str, *, texture: bool) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        dim=len(stain_names(texture)),
        transform=Transform(resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        token="pooled",  # noqa: S106 - not a secret
        precision="fp32",
        licence="LiteMIL's own",
        build=partial(StainDescriptor, texture),
    )


# Sizes, transforms, token rules and precisions follow the cards at https://huggingface.co/<repo>. Where one names no
# precision, it is for UNI and UNI2-h that of their laboratory's toolkit, https://github.com/mahmoodlab/TRIDENT, and for
# the others fp32. The gated ones were not run by us with their real weights: tested of them are the architecture, the
# token rule and the transform.
_REGISTRY: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name="resnet50",
            dim=1024,
            transform=Transform(resize=None),
            token="pooled",  # noqa: S106 - not a secret
            precision="fp32",
            licence="BSD-3-Clause",
            build=_ResNetToLayer3,
            repo="timm/resnet50.tv_in1k",
            filename="model.safetensors",
            finish=_fold_batch_norms,
            spare=("layer4.", "fc."),
        ),
        BackboneSpec(
            name="phikon-v2",
            dim=1024,
            transform=Transform(resize=224, interpolation="bicubic"),
            token="cls",  # noqa: S106
            precision="fp32",
            licence="Owkin non-commercial licence",
            build=partial(_vit, "vit_large_patch16_224"),
            repo="owkin/phikon-v2",
            filename="model.safetensors",
            rename=rename_dinov2,
        ),
        BackboneSpec(
            name="uni",
            dim=1024,
            transform=Transform(resize=224),
            token="cls",  # noqa: S106
            precision="fp16",
            licence="CC-BY-NC-ND-4.0",
            build=partial(_vit, "vit_large_patch16_224"),
            repo="MahmoodLab/UNI",
            gated=True,
        ),
        BackboneSpec(
            name="uni2-h",
            dim=1536,
            transform=Transform(resize=224),
            token="cls",  # noqa: S106
            precision="bf16",
            licence="CC-BY-NC-ND-4.0",
            build=partial(
                _swiglu_vit,
                "vit_giant_patch14_224",
                embed_dim=1536,
                depth=24,
                num_heads=24,
                mlp_ratio=2 * 2.66667,
                reg_tokens=8,
                no_embed_class=True,
            ),
            repo="MahmoodLab/UNI2-h",
            revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
            gated=True,
        ),
        BackboneSpec(
            name="virchow2",
            dim=2560,
            transform=Transform(resize=224, interpolation="bicubic"),
            token="cls+mean",  # noqa: S106
            precision="fp16",
            licence="CC-BY-NC-ND-4.0",
            build=partial(_swiglu_vit, "vit_huge_patch14_224", mlp_ratio=5.3375, reg_tokens=4),
            repo="paige-ai/Virchow2",
            filename="model.safetensors",
            revision="3158645804b69e3f3bc4439d4116edddf0840a72",
            gated=True,
            finish=_ClassAndMeanToken,
        ),
        _h_optimus("h-optimus-0", "bioptimus/H-optimus-0", "Apache-2.0", "b145cc1e6c6b30d3251aa8b1f844e6974188a743"),
        _h_optimus("h-optimus-1", "bioptimus/H-optimus-1", "CC-BY-NC-ND-4.0", None),
        BackboneSpec(
            name="gigapath",
            dim=1536,
            # The card's own: the rim of the patch, an eighth of its width in all, is not seen.
            transform=Transform(resize=256, crop=224, interpolation="bicubic"),
            token="cls",  # noqa: S106
            precision="fp16",
            licence="Apache-2.0",
            build=partial(_vit, "vit_giant_patch14_dinov2", img_size=224, patch_size=16, mlp_ratio=5.33334),
            repo="prov-gigapath/prov-gigapath",
            revision="64f9e26c15019f2d4f6d9113c6822f88bb16b01b",
            gated=True,
        ),
        _stain("stain", texture=False),
        _stain("stain-texture", texture=True),
    )
}


def _load_timm(name: str, path: Path | None) -> Backbone:
    model_name = name[len(_TIMM) :]
    if not _timm().is_model(model_name):
        near = difflib.get_close_matches(model_name, _timm().list_models(), n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise BackboneError(
            f"backbone {name!r}: timm {_timm().__version__} has no such model; {hint}see timm.list_models()"
        )
    try:
        module: Any = _timm().create_model(model_name, pretrained=path is None, num_classes=0)
    except _HUB_FAILURES as error:
        raise BackboneError(_unavailable(name, f"timm's weights of {model_name}", error, None)) from error
    except RuntimeError as error:  # no such tag, or a model nobody published weights for
        reason = " ".join(str(error).split())[:160]
        raise BackboneError(f"backbone {name!r}: timm has no weights for it ({reason}); give --weights FILE") from error
    if path is not None:
        _load_strictly(module, read_weights(path), path, _classifier_prefixes(module))
    transform = _timm_transform(name, module.pretrained_cfg)
    return Backbone(
        name, _measured_dim(name, module, transform), transform, module, digest_weights(module.state_dict())
    )


def _classifier_prefixes(module: Any) -> tuple[str, ...]:
    classifier = module.pretrained_cfg.get("classifier") or ()
    return tuple(f"{part}." for part in ((classifier,) if isinstance(classifier, str) else classifier))


def _timm_transform(name: str, config: Mapping[str, Any]) -> Transform:
    """The whole patch at the model's own input size: its centre crop would lose tissue at the rim."""
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


def _measured_dim(name: str, module: nn.Module, transform: Transform) -> int:
    """D, by embedding one black patch: what timm says of its models' widths is not always what they return."""
    side = transform.resize or 224
    with torch.inference_mode():
        features = module.eval()(torch.zeros(1, 3, side, side))
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise BackboneError(
            f"backbone {name!r}: does not give one vector per patch; choose a model with pooled features"
        )
    return features.shape[1]


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


def _load_strictly(module: nn.Module, state: StateDict, source: Path, spare: tuple[str, ...]) -> None:
    """Copy the weights in, or say which of them do not fit."""
    wanted = module.state_dict()
    given = {name: tensor for name, tensor in state.items() if name in wanted or not name.startswith(spare)}
    misfits = {
        "missing": [name for name in wanted if name not in given and not _is_counter(name)],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}"
            for name, tensor in given.items()
            if name in wanted and tensor.shape != wanted[name].shape
        ],
    }
    if any(misfits.values()):
        said = "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in misfits.items() if names)
        raise BackboneError(
            f"{source}: not the weights of this backbone, {len(wanted)} are expected: {said}; give the matching file"
        )
    module.load_state_dict(given, strict=False)


def _few(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMED_KEYS]) + (", ..." if len(names) > _MAX_NAMED_KEYS else "")


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _download(spec: BackboneSpec) -> Path:
    try:
        return Path(hf_hub_download(str(spec.repo), spec.filename, revision=spec.revision))
    except _HUB_FAILURES as error:
        what = f"{spec.filename} of huggingface.co/{spec.repo}"
        raise BackboneError(_unavailable(spec.name, what, error, spec.access)) from error


def hub_access(timeout: float) -> tuple[bool, str]:
    """Whether weights can be fetched from the hub, and how that is known; whether a token is there, never which."""
    token = "logged in" if get_token() else "not logged in, as gated models need (`hf auth login`)"
    if HF_HUB_OFFLINE:
        return False, f"offline, as HF_HUB_OFFLINE says; {token}"
    request = urllib.request.Request(ENDPOINT, method="HEAD")  # noqa: S310 - the hub's own address
    try:
        with urllib.request.urlopen(request, timeout=timeout):  # noqa: S310
            return True, f"{ENDPOINT} answers; {token}"
    except OSError as failure:
        return False, f"{ENDPOINT} cannot be reached ({failure}); {token}"


def _unavailable(name: str, what: str, error: Exception, access: str | None) -> str:
    """Why weights did not come, and what to do about it, in one line."""
    if isinstance(error, GatedRepoError) or getattr(getattr(error, "response", None), "status_code", 0) in {401, 403}:
        remedy = access or "access is restricted: ask for it on the model's page, then log in with `hf auth login`"
    else:
        remedy = "check the network and HF_HUB_OFFLINE" + (f" ({access})" if access else "")
    reason = " ".join(str(error).split())[:120]
    return (
        f"backbone {name!r}: {what} cannot be had ({type(error).__name__}: {reason}); {remedy}, or download the file "
        "elsewhere and give it with --weights FILE"
    )

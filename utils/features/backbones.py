"""The registry of feature backbones, and a backbone that turns patches into features."""

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from utils.core.errors import BackboneError
from utils.core.recipe import BACKBONE_ALIASES, backbone_name
from utils.features.networks import (
    ClassAndMeanToken,
    ResNetToLayer3,
    fold_batch_norms,
    load_timm,
    measured_dim,
    swiglu_vit,
    timm_network,
    vit,
)  # fmt: skip
from utils.features.stain import VERSION as STAIN_VERSION
from utils.features.stain import StainDescriptor, stain_names
from utils.features.transform import Transform
from utils.features.weights import StateDict, digest_weights, download, load_strictly, read_weights, rename_dinov2

_TIMM = "timm:"
# Activations of so few patches stay in a processor's cache: a ResNet is 1.5 times as fast as with 16.
_PATCHES_ON_CPU = 4


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone of the registry.

    Attributes:
        dim: length of a feature.
        token: which output is the feature: "pooled" (over positions), "cls", or "cls+mean" (CLS, then the mean of the
            patch tokens, without registers).
        precision: fp16, bf16 or fp32 on a CUDA device, as its model card says.
        build: makes the network, without weights.
        repo, filename: its weights on the Hugging Face hub; None if it needs none.
        revision: the commit of `repo`; None means the newest.
        gated: whether access has to be requested.
        rename: turns the published state dict into the network's own.
        finish: makes the network that computes the features from the one with the published weights.
        spare: prefixes of weights that a file may hold and the network does not use.
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
        """How to get the weights; None if they are not gated."""
        if not self.gated:
            return None
        return f"gated: ask for access at https://huggingface.co/{self.repo}, then log in with `hf auth login`"


@dataclass(eq=False)
class Backbone:
    """A network with its weights, and its transform.

    Attributes:
        name: canonical name.
        dim: D, the length of a feature.
        transform: how a patch is changed first.
        module: (B, 3, S, S) float to (B, D), in eval mode.
        weights_digest: SHA-256 of the published weights; for a descriptor, of its version.
        precision: fp16, bf16 or fp32 on a CUDA device.
        device: `to` moves the network to another.
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

    @property
    def is_exact(self) -> bool:
        """Whether it computes in float32 whatever is asked for: a descriptor's densities need every digit."""
        return isinstance(self.module, StainDescriptor)

    def to(self, device: torch.device | str) -> "Backbone":
        """Move the network; returns itself."""
        self.device = torch.device(device)
        self.module.to(self.device)
        return self

    @torch.inference_mode()
    def embed(self, patches: NDArray[np.uint8] | Tensor) -> Tensor:
        """Turn (B, P, P, 3) uint8 RGB patches into (B, D) float32 features, on the device of the network.

        Each feature depends on its own patch only, to float rounding. The caller's autocast applies to the network, not
        to the transform. A CPU takes a few patches at a time, which costs no speed.

        Raises:
            BackboneError: the patches are not uint8, or of another shape.
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
        """Yield (B, P, P, 3) uint8 patches, a few at a time, as the network takes them: (b, 3, S, S), channels last."""
        batches = patches.split(_PATCHES_ON_CPU) if self.device.type == "cpu" else (patches,)
        for batch in batches:
            with torch.autocast(self.device.type, enabled=False):
                images = self.transform(batch.to(self.device, non_blocking=True))
            yield images.contiguous(memory_format=torch.channels_last)


def list_backbones() -> list[str]:
    """Return the names of the registry, sorted; any other model of timm is called `timm:<model>`."""
    return sorted(REGISTRY)


def backbone_spec(name: str) -> BackboneSpec:
    """Return the registry's entry for a name or alias; `timm:` names have none."""
    return REGISTRY[canonical_backbone(name)]


def canonical_backbone(name: str) -> str:
    """Return the one name of a backbone for any of its aliases, in any case; `timm:<model>` stays as it is.

    Raises:
        BackboneError: the name is unknown; the message lists those that are known, and the nearest.
    """
    canonical = backbone_name(name)
    if canonical in REGISTRY or canonical.startswith(_TIMM):
        return canonical
    aliases = [alias for spec in REGISTRY.values() for alias in (spec.name, *spec.aliases)]
    near = difflib.get_close_matches(canonical, aliases, n=1)
    hint = f"did you mean {backbone_name(near[0])}? " if near else ""
    if load_timm().is_model(name.strip()):
        hint = f"did you mean {_TIMM}{name.strip()}? "
    raise BackboneError(f"backbone {name!r} is unknown; {hint}known are {', '.join(list_backbones())}, timm:<model>")


def load_backbone(name: str, weights: Path | str | None = None) -> Backbone:
    """Load a backbone with its weights, on the CPU.

    Args:
        name: a name of the registry, one of its aliases, or `timm:<model>`.
        weights: a local .pth, .pt, .bin or .safetensors file; None downloads the published weights, unless they are in
            the hub's cache.

    Raises:
        BackboneError: the name is unknown, or the weights cannot be fetched, cannot be read safely or do not fit.
    """
    name = canonical_backbone(name)
    path = None if weights is None else Path(weights)
    if name.startswith(_TIMM):
        module, transform = timm_network(name, name[len(_TIMM) :], path)
        digest = digest_weights(module.state_dict())
        return Backbone(name, measured_dim(name, module, transform), transform, module, digest)
    spec = REGISTRY[name]
    if spec.repo is None and path is not None:
        raise BackboneError(f"--weights {path}: backbone {name!r} has no weights; leave --weights out")
    if spec.repo is None:
        module = spec.build()
        digest = hashlib.sha256(f"{name} {STAIN_VERSION}".encode()).hexdigest()
    else:
        file = path or download(name, spec.repo, spec.filename, spec.revision, spec.access)
        state = read_weights(file)
        # Initialising up to a thousand million weights at random first would take half a minute.
        with torch.device("meta"):
            module = spec.build()
        module.to_empty(device="cpu")
        load_strictly(module, spec.rename(state) if spec.rename else state, file, spec.spare)
        digest = digest_weights(module.state_dict())
    # The digest is that of the published weights, before `finish` changes them for speed.
    module = spec.finish(module.eval()) if spec.finish else module
    return Backbone(spec.name, spec.dim, spec.transform, module, digest, spec.precision)


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
        build=partial(vit, "vit_giant_patch14_reg4_dinov2", img_size=224),
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


# Sizes, transforms, token rules and precisions follow the model cards at https://huggingface.co/<repo>. If a card names
# no precision, UNI and UNI2-h take that of their laboratory's toolkit, https://github.com/mahmoodlab/TRIDENT, and the
# others fp32. We have not run the gated ones with their real weights: tests cover their architecture, token rule and
# transform.
REGISTRY: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name="resnet50",
            dim=1024,
            transform=Transform(resize=None),
            token="pooled",  # noqa: S106 - not a secret
            precision="fp32",
            licence="BSD-3-Clause",
            build=ResNetToLayer3,
            repo="timm/resnet50.tv_in1k",
            filename="model.safetensors",
            finish=fold_batch_norms,
            spare=("layer4.", "fc."),
        ),
        BackboneSpec(
            name="phikon-v2",
            dim=1024,
            transform=Transform(resize=224, interpolation="bicubic"),
            token="cls",  # noqa: S106
            precision="fp32",
            licence="Owkin non-commercial licence",
            build=partial(vit, "vit_large_patch16_224"),
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
            build=partial(vit, "vit_large_patch16_224"),
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
                swiglu_vit,
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
            build=partial(swiglu_vit, "vit_huge_patch14_224", mlp_ratio=5.3375, reg_tokens=4),
            repo="paige-ai/Virchow2",
            filename="model.safetensors",
            revision="3158645804b69e3f3bc4439d4116edddf0840a72",
            gated=True,
            finish=ClassAndMeanToken,
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
            build=partial(vit, "vit_giant_patch14_dinov2", img_size=224, patch_size=16, mlp_ratio=5.33334),
            repo="prov-gigapath/prov-gigapath",
            revision="64f9e26c15019f2d4f6d9113c6822f88bb16b01b",
            gated=True,
        ),
        _stain("stain", texture=False),
        _stain("stain-texture", texture=True),
    )
}

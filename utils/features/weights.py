"""A backbone's weights: downloaded or read from a local file, renamed, checked and digested.

They are only ever read as tensors: no pickle is executed, and no remote code is trusted.
"""

import hashlib
import re
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import get_token, hf_hub_download
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.core.errors import BackboneError
from utils.core.tensor_files import load_tensors

# HfHubHTTPError's bases are the errors of its HTTP library (requests or httpx), which can come through as well.
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)
_MAX_NAMED_KEYS = 4

StateDict = dict[str, Tensor]


def digest_weights(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over the names (sorted), shapes, dtypes and bytes of a state dict, in hexadecimal.

    The file format of the weights does not matter. BatchNorm's step counters are left out: they do not affect the
    features, and some files lack them.
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
    """Return the tensors of a weights file, by name; a dict nested as `state_dict` or `model` is unwrapped.

    Raises:
        BackboneError: the file is missing, unreadable, or holds anything but tensors.
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
    """Rename the weights of a Hugging Face Dinov2Model (any depth and width) to those of timm's vision transformer.

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
    for name, projections in split.items():
        if projections.keys() == {"q", "k", "v"}:
            renamed[name] = torch.cat([projections["q"], projections["k"], projections["v"]])
        else:
            renamed |= {name.replace("qkv", letter): tensor for letter, tensor in projections.items()}
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


def load_strictly(module: nn.Module, state: StateDict, source: Path, spare: tuple[str, ...]) -> None:
    """Copy the weights into the module; those that begin with a prefix in `spare` may be left over.

    Raises BackboneError, which says which of them do not fit.
    """
    expected = module.state_dict()
    weights = {name: tensor for name, tensor in state.items() if name in expected or not name.startswith(spare)}
    misfits = {
        "missing": [name for name in expected if name not in weights and not _is_counter(name)],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in weights.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
    }
    if any(misfits.values()):
        text = "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in misfits.items() if names)
        raise BackboneError(
            f"{source}: not the weights of this backbone, {len(expected)} are expected: {text}; give the matching file"
        )
    module.load_state_dict(weights, strict=False)


def _few(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMED_KEYS]) + (", ..." if len(names) > _MAX_NAMED_KEYS else "")


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def download(name: str, repo: str, filename: str, revision: str | None, access: str | None) -> Path:
    """Fetch a backbone's published weights from the hub, or find them in its cache; `access` says how to get them.

    Raises BackboneError.
    """
    try:
        return Path(hf_hub_download(repo, filename, revision=revision))
    except HUB_FAILURES as error:
        raise unavailable(name, f"{filename} of huggingface.co/{repo}", error, access) from error


def hub_access(timeout: float) -> tuple[bool, str]:
    """Return whether weights can be fetched from the hub, and a text that says why, and whether there is a token."""
    token = "logged in" if get_token() else "not logged in, as gated models need (`hf auth login`)"
    if HF_HUB_OFFLINE:
        return False, f"offline, as HF_HUB_OFFLINE says; {token}"
    request = urllib.request.Request(ENDPOINT, method="HEAD")  # noqa: S310 - the hub's own address
    try:
        with urllib.request.urlopen(request, timeout=timeout):  # noqa: S310
            return True, f"{ENDPOINT} answers; {token}"
    except OSError as failure:
        return False, f"{ENDPOINT} cannot be reached ({failure}); {token}"


def unavailable(name: str, file: str, error: Exception, access: str | None = None) -> BackboneError:
    """Return the error that says why weights did not come, and what to do about it, in one line."""
    if isinstance(error, GatedRepoError) or getattr(getattr(error, "response", None), "status_code", 0) in {401, 403}:
        remedy = access or "access is restricted: ask for it on the model's page, then log in with `hf auth login`"
    else:
        remedy = "check the network and HF_HUB_OFFLINE" + (f" ({access})" if access else "")
    reason = " ".join(str(error).split())[:120]
    return BackboneError(
        f"backbone {name!r}: {file} cannot be had ({type(error).__name__}: {reason}); {remedy}, or download the file "
        "elsewhere and give it with --weights FILE"
    )

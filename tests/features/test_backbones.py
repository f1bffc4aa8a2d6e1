"""Backbones: names, transforms against PIL, weights that fit or are refused, features that stand on their own."""

import json
import pickle
import re
from dataclasses import replace
from functools import partial

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from safetensors.torch import save_file

from utils.core.errors import BackboneError
from utils.features import backbones, networks, weights
from utils.features.backbones import backbone_spec, canonical_backbone, list_backbones, load_backbone
from utils.features.stain import stain_names
from utils.features.transform import Transform
from utils.features.weights import digest_weights, read_weights, rename_dinov2

SMALL = "timm:test_vit"  # timm's own model for tests: 0.4 M weights
# By their cards: width, depth, heads, side of a token, prefix tokens, positions, width of the feed-forward layer.
BUILT = {
    "phikon-v2": (1024, 24, 16, 16, 1, 197, 4096),
    "uni": (1024, 24, 16, 16, 1, 197, 4096),
    "uni2-h": (1536, 24, 24, 14, 9, 256, 4096),
    "virchow2": (1280, 32, 16, 14, 5, 261, 3416),
    "h-optimus-0": (1536, 40, 24, 14, 5, 256, 4096),
    "h-optimus-1": (1536, 40, 24, 14, 5, 256, 4096),
    "gigapath": (1536, 40, 24, 16, 1, 197, 4096),
}


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def small_state():
    torch.manual_seed(0)
    return timm.create_model("test_vit", pretrained=False, num_classes=0).state_dict()


def saved(path, content):
    torch.save(content, path)
    return path


# Names


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("uni", "uni"),
        ("UNI", "uni"),
        ("uni_v1", "uni"),
        ("MahmoodLab/uni", "uni"),
        ("mahmoodlab/UNI", "uni"),
        ("phikon-v2", "phikon-v2"),
        ("phikon_v2", "phikon-v2"),
        ("Owkin/Phikon-v2", "phikon-v2"),
        (" resnet50 ", "resnet50"),
        ("MahmoodLab/UNI2-h", "uni2-h"),
        ("paige-ai/Virchow2", "virchow2"),
        ("h_optimus_0", "h-optimus-0"),
        ("bioptimus/H-optimus-1", "h-optimus-1"),
        ("prov-gigapath", "gigapath"),
        ("stain_texture", "stain-texture"),
        ("timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite0"),
        ("TIMM:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
    ],
)
def test_aliases_are_one_name(alias, name):
    assert canonical_backbone(alias) == name


def test_unknown_names_list_the_known_and_the_nearest():
    with pytest.raises(
        BackboneError, match=r"'phikonv3'.*did you mean phikon-v2.*known are gigapath, .*virchow2, timm:<model>"
    ):
        canonical_backbone("phikonv3")
    with pytest.raises(BackboneError, match=r"did you mean timm:resnet18\?"):
        canonical_backbone("resnet18")
    with pytest.raises(BackboneError, match=r"no such model; did you mean .*resnet50"):
        load_backbone("timm:resnet5O")


def test_no_two_backbones_share_an_alias():
    assert list_backbones() == sorted(BUILT | {"resnet50": (), "stain": (), "stain-texture": ()})
    specs = [backbone_spec(name) for name in list_backbones()]
    aliases = [alias.lower() for spec in specs for alias in (spec.name, *spec.aliases)]
    assert len(aliases) == len(set(aliases))


# Transform


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize"), [(256, 224), (100, 224), (512, 224)])
def test_resizing_is_pils_to_a_grey_level(interpolation, size, resize):
    patch = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    mine = Transform(resize=resize, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1))(
        torch.tensor(patch[None])
    )
    pil = Image.fromarray(patch).resize((resize, resize), Image.Resampling[interpolation.upper()])
    difference = np.abs(mine[0].permute(1, 2, 0).numpy() * 255 - np.asarray(pil))
    assert difference.max() < 2.01
    assert (difference > 1.01).mean() < 1e-4
    assert difference.mean() < 0.1


def test_normalisation_and_no_resize():
    transform = Transform(resize=None, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    out = transform(torch.full((2, 7, 7, 3), 51, dtype=torch.uint8))
    assert out.shape == (2, 3, 7, 7)
    torch.testing.assert_close(out[1, :, 3, 3], torch.tensor([0.2, 0.0, -0.05]), atol=1e-6, rtol=0)


def test_cropping_takes_the_middle():
    patch = torch.zeros((1, 10, 10, 3), dtype=torch.uint8)
    patch[0, 3:7, 3:7] = 255
    out = Transform(resize=None, crop=4, mean=(0, 0, 0), std=(1, 1, 1))(patch)
    assert out.shape == (1, 3, 4, 4)
    assert (out == 1).all()


def test_a_transform_is_json_able():
    transform = backbone_spec("resnet50").transform
    as_dict = transform.as_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict == {
        "resize": None,
        "crop": None,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


# Registry


def test_resnet50_is_layer3_averaged_and_takes_a_full_checkpoint(tmp_path, patches):
    torch.manual_seed(0)
    patches = patches[:2]
    full = timm.create_model("resnet50.tv_in1k", pretrained=False).eval()
    for module in full.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # folded into the convolutions: as made they change nothing
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr] - it has one
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    backbone = load_backbone("resnet50", saved(tmp_path / "r.pth", full.state_dict()))
    features = backbone.embed(patches)
    images = backbone.transform(torch.tensor(patches))
    assert images.shape[-1] == 64  # not resized
    with torch.no_grad():
        expected = full.forward_intermediates(images, indices=[3], intermediates_only=True)[0].mean((2, 3))
    assert features.shape == (2, backbone.dim) == (2, 1024)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-5)
    trunk = {name: tensor for name, tensor in full.state_dict().items() if not name.startswith(("layer4.", "fc."))}
    assert load_backbone("resnet50", saved(tmp_path / "t.pth", trunk)).weights_digest == backbone.weights_digest


@pytest.mark.parametrize(("width", "depth", "heads"), [(32, 2, 4), (48, 3, 3)])
@pytest.mark.parametrize("names", ["file", "memory"])
def test_dinov2_weights_give_the_same_cls_token_in_timm(tmp_path, width, depth, heads, names):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=64, patch_size=16
    )
    reference = transformers.Dinov2Model(config).eval()
    with torch.no_grad():  # the layer scales start at 1 and the biases at 0, which would hide a mix-up
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path)
    state = read_weights(tmp_path / "model.safetensors") if names == "file" else reference.state_dict()

    vit = timm.create_model(
        "vit_large_patch16_224",
        num_classes=0,
        init_values=1e-5,
        img_size=64,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
    ).eval()
    vit.load_state_dict(rename_dinov2(dict(state)), strict=True)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = reference(images).last_hidden_state[:, 0]
        torch.testing.assert_close(vit(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BUILT)
def test_the_vision_transformers_are_built_as_published(name):
    width, depth, heads, side, prefix, positions, hidden = BUILT[name]
    with torch.device("meta"):  # shapes only: gigabytes stay unallocated
        module = backbone_spec(name).build()
    assert (len(module.blocks), module.blocks[0].attn.num_heads, module.num_prefix_tokens) == (depth, heads, prefix)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes["pos_embed"] == (1, positions, width)
    assert shapes["patch_embed.proj.weight"] == (width, 3, side, side)
    assert shapes[f"blocks.{depth - 1}.ls2.gamma"] == (width,)
    assert shapes["blocks.0.mlp.fc2.weight"] == (width, hidden)
    assert module.global_pool == "token"  # timm's word for the CLS token


@pytest.mark.parametrize(
    ("name", "dim", "resize", "crop", "interpolation", "precision"),
    [
        ("resnet50", 1024, None, None, "bilinear", "fp32"),
        ("phikon-v2", 1024, 224, None, "bicubic", "fp32"),
        ("uni", 1024, 224, None, "bilinear", "fp16"),
        ("uni2-h", 1536, 224, None, "bilinear", "bf16"),
        ("virchow2", 2560, 224, None, "bicubic", "fp16"),
        ("h-optimus-0", 1536, 224, None, "bicubic", "fp16"),
        ("h-optimus-1", 1536, 224, None, "bicubic", "fp16"),
        ("gigapath", 1536, 256, 224, "bicubic", "fp16"),
    ],
)
def test_what_the_cards_say(name, dim, resize, crop, interpolation, precision):
    spec = backbone_spec(name)
    transform = spec.transform
    assert (spec.dim, spec.precision) == (dim, precision)
    assert (transform.resize, transform.crop, transform.interpolation) == (resize, crop, interpolation)
    assert (transform.mean == (0.707223, 0.578729, 0.703617)) == name.startswith("h-optimus")


@pytest.mark.parametrize("name", BUILT)
def test_a_shallow_one_loads_strictly_and_gives_its_token(name, tmp_path, monkeypatch, patches):
    spec = backbone_spec(name)
    shallow = replace(spec, build=partial(spec.build, depth=1, weight_init="skip"), rename=None)
    monkeypatch.setitem(backbones.REGISTRY, name, shallow)
    torch.manual_seed(0)
    network = shallow.build().eval()
    for parameter in network.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    backbone = load_backbone(name, saved(tmp_path / "weights.pth", network.state_dict()))
    assert backbone.weights_digest == digest_weights(network.state_dict())
    features = backbone.embed(patches[:2])
    assert features.shape == (2, spec.dim)
    with torch.no_grad():
        tokens = network.forward_features(spec.transform(torch.tensor(patches[:2])))
    prefix = BUILT[name][4]
    expected = tokens[:, 0]
    if name == "virchow2":
        assert tokens.shape == (2, 5 + 256, 1280)
        expected = torch.cat([expected, tokens[:, prefix:].mean(1)], dim=1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    short = {key: tensor for key, tensor in network.state_dict().items() if key != "cls_token"}
    with pytest.raises(BackboneError, match=r"short\.pth.*1 missing \(cls_token\)"):
        load_backbone(name, saved(tmp_path / "short.pth", short))


def test_many_patches_on_a_cpu_are_the_same_as_few(tmp_path, small_state):
    patches = np.random.default_rng(2).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    backbone = load_backbone(SMALL, saved(tmp_path / "a.pth", small_state))
    with torch.no_grad():
        at_once = backbone.module(backbone.transform(torch.tensor(patches)))
    torch.testing.assert_close(backbone.embed(patches), at_once, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["stain", "stain-texture"])
def test_descriptors_need_no_weights_and_take_none(name, tmp_path, patches):
    backbone = load_backbone(name)
    assert backbone.embed(patches).shape == (5, backbone.dim)
    assert backbone.dim == len(stain_names(name == "stain-texture"))
    assert backbone.weights_digest == load_backbone(name).weights_digest
    with pytest.raises(BackboneError, match=rf"w\.pth: backbone '{name}' has no weights; leave --weights out"):
        load_backbone(name, tmp_path / "w.pth")


def test_the_descriptors_digests_differ_and_follow_the_version(monkeypatch):
    before = {load_backbone(name).weights_digest for name in ("stain", "stain-texture")}
    monkeypatch.setattr(backbones, "STAIN_VERSION", backbones.STAIN_VERSION + 1)
    assert len(before | {load_backbone(name).weights_digest for name in ("stain", "stain-texture")}) == 4


def test_timm_features_and_transform(tmp_path, small_state, patches):
    backbone = load_backbone(SMALL, saved(tmp_path / "a.pth", small_state))
    config = timm.get_pretrained_cfg("test_vit")
    assert backbone.name == SMALL
    assert backbone.transform.resize == config.input_size[1]
    assert backbone.transform.crop is None
    assert backbone.transform.interpolation == config.interpolation
    assert backbone.transform.mean == config.mean
    features = backbone.embed(patches)
    assert features.shape == (5, backbone.dim)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not backbone.module.training


def test_real_weights_deterministic_and_independent_of_the_batch(shared_data, patches):
    backbone = load_backbone("timm:tf_efficientnet_lite0", shared_data / "weights" / "tf_efficientnet_lite0.pth")
    assert backbone.dim == 1280
    assert backbone.transform.as_dict()["mean"] == [0.5, 0.5, 0.5]
    patches = patches[:3]
    together = backbone.embed(patches)
    assert torch.equal(together, backbone.embed(torch.tensor(patches)))
    one_by_one = torch.cat([backbone.embed(patches[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-4)
    assert together.std() > 0.1
    assert not torch.allclose(together[0], together[1], atol=0.01)


def test_what_embed_takes(tmp_path, small_state, patches):
    backbone = load_backbone(SMALL, saved(tmp_path / "a.pth", small_state)).to("cpu")
    assert backbone.embed(patches[:0]).shape == (0, backbone.dim)
    for wrong in (patches.astype(np.float32), patches[0], patches.transpose(0, 3, 1, 2)):
        with pytest.raises(BackboneError, match=r"\(B, P, P, 3\) uint8 is expected"):
            backbone.embed(wrong)


# Weights files


def test_the_digest_depends_on_the_weights_not_on_the_file(tmp_path, small_state):
    head = {"head.weight": torch.zeros(3, small_state["norm.weight"].numel()), "head.bias": torch.zeros(3)}
    files = [
        saved(tmp_path / "plain.pth", small_state),
        saved(tmp_path / "head.bin", {**small_state, **head}),
        saved(tmp_path / "nested.pt", {"state_dict": small_state, "epoch": 3}),
        saved(tmp_path / "model.pth", {"model": dict(reversed(small_state.items()))}),
        tmp_path / "same.safetensors",
    ]
    save_file(small_state, files[-1])
    digests = {load_backbone(SMALL, file).weights_digest for file in files}
    assert len(digests) == 1
    changed = {**small_state, "norm.bias": small_state["norm.bias"] + 1e-6}
    assert load_backbone(SMALL, saved(tmp_path / "changed.pth", changed)).weights_digest not in digests


def test_the_digest_sees_names_shapes_and_dtypes():
    weight = torch.arange(4.0)
    base = digest_weights({"a": weight})
    assert digest_weights({"b": weight}) != base
    assert digest_weights({"a": weight.view(2, 2)}) != base
    assert digest_weights({"a": weight.view(torch.int32)}) != base
    assert digest_weights({"a": weight, "bn.num_batches_tracked": torch.tensor(7)}) == base
    assert digest_weights({"a": torch.tensor(1.0)}) != base
    assert digest_weights({"a": weight, "b": weight + 1}) == digest_weights({"b": weight + 1, "a": weight})


def test_weights_that_do_not_fit_are_named(tmp_path, small_state):
    missing = dict(small_state)
    for name in list(missing)[:6]:
        del missing[name]
    with pytest.raises(BackboneError, match=r"m\.pth.*6 missing \(cls_token, .*\.\.\.\)") as error:
        load_backbone(SMALL, saved(tmp_path / "m.pth", missing))
    assert "\n" not in str(error.value)
    with pytest.raises(BackboneError, match=r"1 unexpected \(teacher\.head\)"):
        load_backbone(SMALL, saved(tmp_path / "u.pth", {**small_state, "teacher.head": torch.zeros(1)}))
    misshapen = {**small_state, "norm.bias": torch.zeros(3)}
    with pytest.raises(BackboneError, match=r"1 of another shape \(norm\.bias \(3,\) instead of \(64,\)\)"):
        load_backbone(SMALL, saved(tmp_path / "s.pth", misshapen))
    with pytest.raises(BackboneError, match=r"m\.pth: not the weights"):
        load_backbone("resnet50", tmp_path / "m.pth")


class _Executed:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('executed').touch()",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, small_state):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "evil.pth", {**small_state, "x": _Executed()})
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Executed(), protocol=2))
    for name in ("evil.pth", "evil.pt"):
        with pytest.raises(BackboneError, match=f"{name}: not loadable as weights"):
            load_backbone(SMALL, tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "empty.pth", "empty.safetensors", "absent.pth"])
def test_files_that_are_no_weights(tmp_path, name):
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"not weights at all" * 9)
    with pytest.raises(BackboneError, match=name) as error:
        load_backbone(SMALL, tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {}, {"state_dict": {}}, {"a": 1}, torch.zeros(3)])
def test_a_file_without_a_state_dict(tmp_path, content):
    with pytest.raises(BackboneError, match="no state dict"):
        read_weights(saved(tmp_path / "a.pth", content))


def test_the_remedy_for_a_whole_model_is_to_save_its_state_dict(tmp_path):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(BackboneError, match=r"a \.pth of torch\.save\(model\.state_dict\(\), FILE\)\): it holds torch"):
        read_weights(saved(tmp_path / "a.pth", model))
    assert read_weights(saved(tmp_path / "a.pth", model.state_dict())).keys() == {"weight", "bias"}


# Hubs


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["resnet50", "phikon-v2", "uni", "virchow2", "timm:tf_efficientnet_lite0"])
def test_without_a_network_the_message_says_what_to_do(name):
    with pytest.raises(BackboneError, match=f"'{name}'.*cannot be had.*HF_HUB_OFFLINE.*--weights FILE") as error:
        load_backbone(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(BUILT.keys() - {"phikon-v2"}))
def test_a_gated_model_says_where_to_ask(name, monkeypatch):
    class Response:
        status_code, headers, request, text = 403, {}, None, ""

    def refuse(*args, **kwargs):
        raise GatedRepoError("403 Client Error.\n\nAccess is restricted", response=Response())  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "hf_hub_download", refuse)
    page = f"https://huggingface.co/{backbone_spec(name).repo}"
    with pytest.raises(BackboneError, match=rf"{re.escape(page)},.*hf auth login.*--weights") as error:
        load_backbone(name)
    assert "\n" not in str(error.value)


def test_a_download_goes_through_the_same_strict_load(monkeypatch, tmp_path):
    save_file(networks.ResNetToLayer3().state_dict(), tmp_path / "model.safetensors")
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(weights, "hf_hub_download", download)
    backbone = load_backbone("resnet50.tv_in1k")
    assert asked == [("timm/resnet50.tv_in1k", "model.safetensors", None)]
    assert backbone.weights_digest == load_backbone("resnet50", tmp_path / "model.safetensors").weights_digest


def test_a_pinned_revision_is_asked_for(monkeypatch):
    asked = []

    def download(repo, filename, revision=None):
        asked.append((repo, filename, revision))
        raise OSError("no network")

    monkeypatch.setattr(weights, "hf_hub_download", download)
    with pytest.raises(BackboneError, match="no network"):
        load_backbone("virchow2")
    assert asked == [("paige-ai/Virchow2", "model.safetensors", "3158645804b69e3f3bc4439d4116edddf0840a72")]

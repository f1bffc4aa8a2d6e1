"""Models of timm from repositories of the Hugging Face hub, of which a local server stands in."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from utils.core.errors import BackboneError
from utils.features.backbones import load_backbone

OLD, NEW = "a" * 40, "b" * 40
REPO = "lab/vit"
SCRIPT = """
import sys
from utils.features.backbones import load_backbone
from utils.core.errors import BackboneError
for name in sys.argv[1:]:
    try:
        backbone = load_backbone(name)
        print(backbone.dim, backbone.weights_digest, backbone.transform.resize, *backbone.transform.mean)
    except BackboneError as error:
        print(error)
"""


@dataclass
class Hub:
    """The address of the stand-in, where its clients cache, and what they asked for."""

    endpoint: str
    cache: Path
    asked: list[str]

    def load(self, *names: str, **environment: str) -> list[str]:
        """Load backbones in a process of their own, because the hub's address is read at import; return what is said of
        each.
        """
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(self.cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment = {**os.environ, **own, **environment}
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, *names], env=environment, capture_output=True, text=True, check=False
        )
        lines = ended.stdout.splitlines()
        assert len(lines) == len(names), ended.stderr
        return lines


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The files of the repository, by revision and name: two revisions of other weights, and one of no timm model."""
    folder, files = tmp_path_factory.mktemp("hub"), {}
    config = {
        "architecture": "test_vit",
        "num_classes": 0,
        "pretrained_cfg": {
            "input_size": [3, 160, 160], "interpolation": "bicubic", "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2],
            "classifier": "head", "first_conv": "patch_embed.proj", "num_classes": 0,
        },
    }  # fmt: skip
    for number, revision in enumerate((OLD, NEW)):
        torch.manual_seed(number)
        model = timm.create_model("test_vit", pretrained=False, num_classes=0)
        save_file(model.state_dict(), folder / "model.safetensors")
        files[f"{REPO}/{revision}/model.safetensors"] = (folder / "model.safetensors").read_bytes()
        files[f"{REPO}/{revision}/config.json"] = json.dumps(config).encode()
    files[f"lab/other/{NEW}/config.json"] = json.dumps({"model_type": "bert"}).encode()
    return files


@pytest.fixture
def hub(files, tmp_path) -> Iterator[Hub]:
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            owner, repo, _, revision, name = self.path.lstrip("/").split("?")[0].split("/", 4)
            commit = {"main": NEW}.get(revision, revision)
            content = files.get(f"{owner}/{repo}/{commit}/{name}")
            asked.append(f"{revision}/{name}")
            self.send_response(404 if content is None else 200)
            if content is None:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{sha256(content or b"").hexdigest()}"')
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET" and content is not None:
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815 - the server's own name

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache", asked)
    server.shutdown()


def test_repositories_say_what_their_model_is_and_are_read_from_the_cache_offline(hub):
    name = f"timm:hf-hub:{REPO}"
    newest, pinned, other = hub.load(name, f"{name}@{OLD}", "timm:hf-hub:lab/other")
    dim, digest, resize, *mean = newest.split()
    assert (dim, resize, mean) == ("64", "160", ["0.7", "0.6", "0.7"])
    assert pinned.split()[0] == dim
    assert pinned.split()[1] != digest, "other weights"
    assert {"main/config.json", f"{OLD}/model.safetensors"} <= set(hub.asked)
    assert "its config.json describes no model that timm" in other

    hub.asked.clear()
    again, absent = hub.load(name, "timm:hf-hub:lab/absent", HF_HUB_OFFLINE="1")
    assert again == newest
    assert hub.asked == []
    assert "config.json or weights of huggingface.co/lab/absent cannot be had" in absent


@pytest.mark.parametrize("repo", ["uni", "lab/uni/x", "lab/uni@a@b", "", "../x", "lab/u ni"])
def test_what_names_no_repository_is_refused(repo):
    with pytest.raises(BackboneError, match=r"names no repository of the hub; give timm:hf-hub:OWNER/NAME"):
        load_backbone(f"timm:hf-hub:{repo}")

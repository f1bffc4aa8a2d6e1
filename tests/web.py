"""A server on this machine that serves what the public cohorts' servers do, small, and fails as servers do.

Import with `from tests.web import ...`.
"""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from datasets import download


class Server(ThreadingHTTPServer):
    """Serves `files` by path; of the answers that follow, `faults` says what goes wrong: "drop" half-way, an HTTP
    error, "corrupt", "truncate" (no length is told, and half of it comes), "endless" (more comes than there is),
    "elsewhere" (a range that was not asked for), or "no ranges". `ranges` is what was asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[object] = []
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def publish(self, monkeypatch: pytest.MonkeyPatch, name: str, table: str, packed: bytes) -> None:
        """Let a cohort's table and archive, and the record that lists it, be these."""
        source = download.SOURCES[name]
        changed = download.Source(source.archive, source.table, hashlib.sha256(table.encode()).hexdigest())
        monkeypatch.setitem(download.SOURCES, name, changed)
        md5 = hashlib.md5(packed).hexdigest()  # noqa: S324 - what the record tells
        link = f"{self.url}/record/files/{source.archive}/content"
        listed = {"key": source.archive, "size": len(packed), "checksum": f"md5:{md5}", "links": {"self": link}}
        self.files |= {
            f"/tables/{source.table}": table.encode(),
            "/record": json.dumps({"files": [{"key": "OTHER.zip", "checksum": "md5:0"}, listed]}).encode(),
            f"/record/files/{source.archive}/content": packed,
        }
        monkeypatch.setattr(download, "RECORD", f"{self.url}/record")
        monkeypatch.setattr(download, "TABLES", f"{self.url}/tables/")

    def publish_slide(self, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
        """Let the test slide be this."""
        self.files["/CMU-1-Small-Region.svs"] = content
        monkeypatch.setattr(download, "TEST_SLIDE", f"{self.url}/CMU-1-Small-Region.svs")
        monkeypatch.setattr(download, "TEST_SLIDE_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(download, "TEST_SLIDE_BYTES", len(content))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        fault = self.server.faults.pop(0) if self.server.faults else None
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if content is None or isinstance(fault, int):
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "no ranges" else 0
        if start >= len(content) > 0:
            self.send_error(416)
            return
        start = 0 if fault == "elsewhere" else start
        body = bytearray(content[start:])
        self.send_response(206 if start or fault == "elsewhere" else 200)
        if start or fault == "elsewhere":
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if fault not in ("truncate", "endless"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "corrupt":
            body[len(body) // 2] ^= 1
        if fault == "endless":
            with contextlib.suppress(ConnectionError):  # whoever asked has had enough
                for _ in range(100):
                    self.wfile.write(bytes(2**20))
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: len(body) // 2] if fault in ("drop", "truncate") else body)

    def log_message(self, *_: object) -> None:
        pass


def zipped(features: Mapping[str, torch.Tensor], cohort: str) -> bytes:
    """An archive as the study's: `<cohort>/pt_files/<slide>.pt`, and what must not be taken out of it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr(f"{cohort}/readme.txt", "not features")
        packed.writestr(f"{cohort}/pt_files/../../../evil.pt", b"outside")
        for name, tensor in features.items():
            content = io.BytesIO()
            torch.save(tensor, content)
            packed.writestr(f"{cohort}/pt_files/{name}.pt", content.getvalue())
    return file.getvalue()

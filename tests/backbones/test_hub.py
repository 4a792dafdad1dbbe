"""Models from the hub: what is fetched, and what is said where that cannot be done."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trace_sdk.backbones import hub
from trace_sdk.backbones.registry import open_backbone
from trace_sdk.errors import DownloadError


class Hub(BaseHTTPRequestHandler):
    """What the hub answers for a gated, an unknown and an empty repository, and for a tiny model."""

    root: Path
    asked: list[str]

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "/gated/" in self.path:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        if "/nobody/" in self.path:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
        if self.path.startswith("/api/models/"):
            files = [str(f.relative_to(self.root)) for f in self.root.rglob("*") if f.is_file()]
            about: Any = {"id": "owner/tiny", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
            if "/tree/" in self.path:
                about = [{"type": "file", "path": name, "size": 1, "oid": "b" * 40} for name in files]
            return self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        file = self.root / self.path.partition("/resolve/")[2].partition("/")[2]
        if "/owner/tiny/" in self.path and file.is_file():
            return self.answer(200, file.read_bytes(), {"ETag": f'"{abs(hash(file))}"', "X-Repo-Commit": "a" * 40})
        return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str | None, Path], list[str]]]:
    """`hub_at(address or None, root)`: point the hub's client at an address, or at a server of the files in root."""
    servers = []

    def point(address: str | None, root: Path) -> list[str]:
        handler = type("Handler", (Hub,), {"root": root, "asked": []})
        if address is None:
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            servers.append(server)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}"
        for module in ("constants", "file_download", "hf_api"):
            space = getattr(__import__(f"huggingface_hub.{module}"), module)
            for name, value in {
                "ENDPOINT": address,
                "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_CACHE": str(tmp_path / "hub"),
            }.items():
                if hasattr(space, name):
                    monkeypatch.setattr(space, name, value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
        return handler.asked

    yield point
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("gated/model", r"gated/model is gated\. Accept its licence at https://huggingface\.co/gated/model"),
        ("nobody/model", "no model nobody/model, or it is private"),
        ("owner/empty", "no diffusers pipeline: it has no model_index.json"),
    ],
)
def test_what_the_hub_refuses_is_said(hub_at: Any, tmp_path: Path, source: str, fragment: str) -> None:
    hub_at(None, tmp_path)
    with pytest.raises(DownloadError, match=fragment):
        open_backbone(source)


def test_no_network_is_said(hub_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub_at("http://127.0.0.1:9", tmp_path)
    with pytest.raises(DownloadError, match=r"owner/model is not on this machine, and the hub cannot be reached"):
        open_backbone("owner/model")


def test_what_was_downloaded_is_opened_without_the_hub(
    open_tiny: Any, hub_at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_at(None, open_tiny("sd").folder)
    online = open_backbone("owner/tiny")
    hub_at("http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_backbone("owner/tiny").identity == online.identity


def test_only_what_is_read_is_downloaded(open_tiny: Any, hub_at: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("sd")
    for extra in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/x.json"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"{}")
    asked = hub_at(None, folder)
    opened = open_backbone("owner/tiny")
    assert opened.identity == open_tiny("sd").backbone.identity
    assert not [path for path in asked if "pruned" in path or "fp16" in path or "safety" in path]


def test_wanted_files_take_a_variant_where_there_is_no_other() -> None:
    files = [
        "unet/a.fp16.safetensors",
        "unet/config.json",
        "unet/a.safetensors.index.fp16.json",
        "vae/a.safetensors",
        "vae/a.fp16.safetensors",
        "vae/a.bin",
    ]
    assert hub.wanted_files(files, "unet") == [
        "model_index.json",
        "unet/config.json",
        "unet/a.fp16.safetensors",
        "unet/a.safetensors.index.fp16.json",
        "vae/a.safetensors",
    ]

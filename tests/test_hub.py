"""Names to folders, against a small Hub on loopback that the real client library talks to."""

import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import random_checkpoints as rc

from gptoss_jax import hub
from gptoss_jax.errors import GptOssError

COMMIT, OLDER = "a" * 40, "b" * 40


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Enough of the Hub's protocol for snapshot_download: repository, tree, HEAD and GET."""

    protocol_version = "HTTP/1.1"

    def __init__(self, root, log, *arguments):
        self.root, self.log = root, log
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        parts = self.path.split("?")[0].strip("/").split("/")
        self.log.append(f"{self.command} {self.path}")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo != "openai/gpt-oss-20b":
            return self.answer(404, b"{}", head, {"X-Error-Code": "RepoNotFound"})
        revision = parts[5] if api and len(parts) > 5 else "main" if api else parts[3]
        if revision not in ("main", "old", COMMIT, OLDER):
            return self.answer(404, b"{}", head, {"X-Error-Code": "RevisionNotFound"})
        commit = OLDER if revision in ("old", OLDER) else COMMIT
        folder = self.root / commit
        if api:
            names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
            if parts[4:5] == ["tree"]:
                body = [
                    {
                        "type": "file",
                        "path": n,
                        "size": (folder / n).stat().st_size,
                        "oid": "0" * 40,
                    }
                    for n in names
                ]
            else:
                siblings = [{"rfilename": name} for name in names]
                body = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
            return self.answer(200, json.dumps(body).encode(), head)
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return self.answer(404, b"", head, {"X-Error-Code": "EntryNotFound"})
        data = file.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.answer(200, data, head, {"ETag": etag, "X-Repo-Commit": commit})

    def answer(self, status, body, head, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if not head:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for commit, case in ((COMMIT, rc.CASES[0]), (OLDER, rc.CASES[1])):
        rc.write(root / commit, case, "mxfp4")
        rc.write(root / commit / "original", case, "original")
        (root / commit / "metal").mkdir()
        (root / commit / "metal" / "model.bin").write_bytes(b"large")
        (root / commit / "README.md").write_text("a card")
    log = []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(FakeHub, root, log)
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", log
    server.shutdown()
    thread.join()
    server.server_close()


def _resolve(endpoint, cache, source, **arguments):
    """Runs hub.resolve in a process of its own: the client reads HF_ENDPOINT at import."""
    code = (
        "import sys, json\n"
        "from gptoss_jax import hub\n"
        "from gptoss_jax.errors import GptOssError\n"
        "source, arguments = json.loads(sys.argv[1])\n"
        "try:\n"
        "    folder = hub.resolve(source, **arguments)\n"
        "    names = sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if f.is_file())\n"
        "    print(json.dumps([str(folder), names, hub.provenance(source, folder)]))\n"
        "except GptOssError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([source, arguments])],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_download_then_offline_then_revision(served, tmp_path):
    endpoint, log = served
    folder, names, provenance = _resolve(endpoint, tmp_path, "openai/gpt-oss-20b")
    assert names == ["config.json", "model.safetensors"]  # neither the other layouts nor the card
    assert provenance == ["openai/gpt-oss-20b", COMMIT]
    before = len(log)
    again = _resolve(endpoint, tmp_path, "openai/gpt-oss-20b", offline=True)
    assert (again[0], len(log)) == (folder, before)
    older, _, provenance = _resolve(endpoint, tmp_path, "openai/gpt-oss-20b", revision="old")
    assert older != folder
    assert provenance[1] == OLDER
    config = json.loads(Path(older, "config.json").read_text())
    assert config["num_hidden_layers"] == rc.CASES[1].layers
    original, names, _ = _resolve(endpoint, tmp_path, "openai/gpt-oss-20b/original")
    assert original.endswith("/original")
    assert names == ["config.json", "model.safetensors"]


def test_unknown_repository_and_revision(served, tmp_path):
    endpoint, _ = served
    assert _resolve(endpoint, tmp_path, "openai/gpt-oss-21b") == (
        f"openai/gpt-oss-21b: no such folder here and no such repository on {endpoint} "
        "(a private one needs HF_TOKEN)"
    )
    assert _resolve(endpoint, tmp_path, "openai/gpt-oss-20b", revision="v9") == (
        "openai/gpt-oss-20b: the Hub has no revision 'v9' of it"
    )


def test_no_network(tmp_path):
    endpoint = "http://127.0.0.1:9"  # discard: nothing listens
    assert _resolve(endpoint, tmp_path, "openai/gpt-oss-20b") == (
        f"openai/gpt-oss-20b: {endpoint} does not answer and the cache {tmp_path} does not hold "
        "it: "
        "check the network, or give a local folder"
    )
    assert _resolve(endpoint, tmp_path, "openai/gpt-oss-20b", offline=True) == (
        f"openai/gpt-oss-20b: not in the Hub's cache {tmp_path}, and offline: "
        "download it once with the network"
    )


def test_folders_and_other_names(tmp_path):
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.provenance("x/y", tmp_path) == ("x/y", None)
    with pytest.raises(GptOssError) as error:
        hub.resolve("./missing")
    assert str(error.value) == (
        "./missing: no such folder, and not a Hub id of the form owner/name: "
        "try openai/gpt-oss-20b or gpt-oss-tiny"
    )
    with pytest.raises(GptOssError) as error:
        hub.resolve(tmp_path, revision="main")
    assert str(error.value) == (
        f"revision 'main' of the local folder {tmp_path}: only the Hub has revisions"
    )

"""A Hugging Face hub of one repository, on this machine, and its cache folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_cache(cache: Path, repository: str, files: dict[str, bytes]) -> None:
    """What huggingface_hub leaves behind: blobs, a reference, a snapshot of links to the blobs."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "blobs").mkdir()
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = root / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)


@contextmanager
def serving(repository: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the names of the files it has sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            api = f"/api/models/{repository}"
            for revision in ("main", COMMIT):
                if path == f"{api}/revision/{revision}" or path == api:
                    siblings = [{"rfilename": name} for name in files]
                    info = {"sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                    return self._send({"id": repository, "downloads": 0, "likes": 0, **info}, body)
                if path.rstrip("/") == f"{api}/tree/{revision}":
                    tree = [
                        {"type": "file", "path": n, "size": len(c), "oid": _etag(c)}
                        for n, c in files.items()
                    ]
                    return self._send(tree, body)
                prefix = f"/{repository}/resolve/{revision}/"
                if path.startswith(prefix) and path[len(prefix) :] in files:
                    name = path[len(prefix) :]
                    if body:
                        sent.append(name)
                    return self._send(files[name], body)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def _send(self, content: object, body: bool) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{_etag(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()

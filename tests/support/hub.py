"""A model hub on loopback with one repository, as huggingface_hub expects one: `main` is at one commit."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repository: str, directory: Path) -> Iterator[str]:
    """Serve the directory's files as `repository`; its URL, for HF_ENDPOINT."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            files = [file for file in sorted(directory.iterdir()) if file.is_file()]
            wanted = directory / path.split("/", 5)[-1]
            etag = "x"
            if path.startswith(f"/api/models/{repository}/tree/"):
                entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                body = json.dumps(entries).encode()
            elif path.startswith(f"/api/models/{repository}"):
                siblings = [{"rfilename": file.name} for file in files]
                names = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
                body = json.dumps({**names, "tags": [], "private": False, "downloads": 0, "likes": 0}).encode()
            elif path.startswith(f"/{repository}/resolve/") and wanted.is_file():
                body = wanted.read_bytes()
                etag = hashlib.sha256(body).hexdigest()
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()

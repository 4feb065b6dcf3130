"""A hub of models on this machine: as much of the Hugging Face Hub's interface as a download wants."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class SmallHub:
    """Serves the files of a folder as the model `org/m`, whatever the revision; notes what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                files = sorted(file for file in folder.iterdir() if file.is_file())
                if path.startswith("/api/models/org/m/tree/"):
                    self.answer(json.dumps([_about(file) for file in files]).encode())
                elif path.startswith("/api/models/org/m"):
                    siblings = [{"rfilename": file.name} for file in files]
                    self.answer(json.dumps({"id": "org/m", "sha": COMMIT, "siblings": siblings}).encode())
                elif path.startswith("/org/m/resolve/") and (folder / Path(path).name).is_file():
                    data = (folder / Path(path).name).read_bytes()
                    etag = f'"{hashlib.sha1(data).hexdigest()}"'
                    self.answer(data, {"ETag": etag, "X-Repo-Commit": COMMIT})
                else:
                    self.answer(b"{}", {"X-Error-Code": "EntryNotFound"}, 404)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                hub.requests.append(f"POST {self.path}")
                wanted = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
                self.answer(
                    json.dumps([_about(folder / name) for name in wanted if (folder / name).is_file()]).encode()
                )

            def answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _about(file: Path) -> dict[str, object]:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}

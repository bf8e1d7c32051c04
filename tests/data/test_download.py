"""CIFAR's archive, from a server on this machine that also misbehaves."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bnjax.data import cifar, datasets
from bnjax.errors import UnavailableError

CONTENT = bytes(range(256)) * 8192  # 2 MiB


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT at /whole; the other paths misbehave as their names say."""

    def do_GET(self):
        name = self.path.strip("/").partition("/")[0]
        if name == "silent":
            self.server.released.wait(20)
            return
        self.send_response(404 if name == "missing" else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        half = CONTENT[: len(CONTENT) // 2]
        self.wfile.write({"whole": CONTENT, "wrong": CONTENT[::-1]}.get(name, half))
        self.wfile.flush()
        if name == "stalled":
            self.server.released.wait(20)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@pytest.fixture(scope="module")
def server():
    with Server(("127.0.0.1", 0), Handler) as made:
        made.released = threading.Event()
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.released.set()
        made.shutdown()


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    """Returns what downloads from a path of the server into an empty cache folder."""
    monkeypatch.setenv("BNJAX_CACHE", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr(datasets, "STALL_SECONDS", 0.5)
    sha256 = hashlib.sha256(CONTENT).hexdigest()

    def call(behaviour):
        archive = cifar.Archive(f"{server}/{behaviour}/file.bin", sha256)
        return datasets._download("cifar10", archive, "")

    return call


def test_a_file_arrives_whole_and_alone(fetch):
    path = fetch("whole")
    assert path.read_bytes() == CONTENT
    assert [*path.parent.iterdir()] == [path]


def test_two_may_download_at_once(fetch):
    with ThreadPoolExecutor(2) as pool:
        paths = [*pool.map(fetch, ["whole", "whole"])]
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert [*paths[0].parent.iterdir()] == [paths[0]]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("wrong", "its checksum is not the official one"),
        ("missing", "HTTPError"),
        ("cut", ""),
        ("stalled", "could not be downloaded"),
        ("silent", "could not be downloaded"),
    ],
)
def test_what_goes_wrong_is_said_and_leaves_no_file(fetch, behaviour, reason):
    with pytest.raises(UnavailableError, match=rf"{reason}.*--config\.data\.dir=FOLDER"):
        fetch(behaviour)
    assert [*datasets.cache_dir().glob("*")] == []


def test_a_server_that_is_not_there_and_a_cache_that_cannot_be_written(
    fetch, tmp_path, monkeypatch
):
    archive = cifar.Archive("http://127.0.0.1:9/file.bin", "0")
    with pytest.raises(UnavailableError, match="ConnectionError"):
        datasets._download("cifar10", archive, "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("BNJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UnavailableError, match="cannot be written"):
        fetch("whole")

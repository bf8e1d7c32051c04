import hashlib
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bnjax.data import download
from bnjax.errors import DataError

CONTENT = bytes(range(256)) * 8192  # 2 MiB


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT at /whole; the other paths misbehave as their names say."""

    def do_GET(self):
        name = self.path.strip("/").partition("/")[0]
        if name == "silent":
            self.server.released.wait(20)
            return
        self.send_response(404 if name == "missing" else 503 if name == "busy" else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(
            {"whole": CONTENT, "wrong": CONTENT[::-1]}.get(name, CONTENT[: len(CONTENT) // 2])
        )
        self.wfile.flush()
        if name == "stalled":
            self.server.released.wait(20)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        pass  # of a client that was killed


@pytest.fixture(scope="module")
def server():
    with Server(("127.0.0.1", 0), Handler) as made:
        made.released = threading.Event()
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.released.set()
        made.shutdown()


def remote(server, behaviour):
    return download.Remote(
        f"{server}/{behaviour}/file.bin", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    )


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "not" / "there" / "yet"


@pytest.fixture
def _no_tensorflow(tmp_path, monkeypatch):
    """Importing TensorFlow ends the process."""
    (tmp_path / "path" / "tensorflow").mkdir(parents=True)
    (tmp_path / "path" / "tensorflow" / "__init__.py").write_text(
        "import os; os.write(2, b'TensorFlow'); os._exit(77)"
    )
    monkeypatch.syspath_prepend(tmp_path / "path")


@pytest.mark.usefixtures("_no_tensorflow")
def test_a_file_arrives_whole_and_alone(server, cache):
    path = download.download(remote(server, "whole"), cache)
    assert path == cache / "file.bin"
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path]


def test_two_may_download_at_once(server, cache):
    with ThreadPoolExecutor() as pool:
        one, two = (
            pool.submit(download.download, remote(server, "whole"), cache) for _ in range(2)
        )
    assert one.result() == two.result() == cache / "file.bin"
    assert (cache / "file.bin").read_bytes() == CONTENT
    assert len(list(cache.iterdir())) == 1


FAILURES = {
    "missing": "404",
    "busy": "no answer",  # the manager goes on trying
    "silent": r"there was no answer \(is there a network\?\), for 0.5 s",
    "stalled": r"no more came after 1,\d\d\d,\d\d\d of 2,097,152 bytes",
    "short": "could not be downloaded",
    "wrong": "not the official file",
}


@pytest.mark.parametrize("behaviour", FAILURES)
def test_a_failed_download_gives_up_and_leaves_nothing(behaviour, server, cache, capfd):
    began = time.monotonic()
    with pytest.raises(DataError, match=FAILURES[behaviour]) as error:
        download.download(remote(server, behaviour), cache, 0.5)
    assert time.monotonic() - began < 30
    assert remote(server, behaviour).url in str(error.value)
    assert list(cache.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_names_that_are_never_resolved_give_up(cache, tmp_path, monkeypatch):
    hang = "import socket, time\nsocket.getaddrinfo = lambda *args, **kwargs: time.sleep(600)\n"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(hang)
    monkeypatch.syspath_prepend(tmp_path / "path")
    began = time.monotonic()
    with pytest.raises(DataError, match="is there a network"):
        download.download(remote("http://example.invalid", "whole"), cache, 0.5)
    assert time.monotonic() - began < 30


def test_the_time_to_give_up_is_about_ten_seconds():
    assert download.STALL_SECONDS == 10


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cache folder .*file cannot be written.*BNJAX_CACHE"):
        download.download(remote("http://127.0.0.1:9", "whole"), tmp_path / "file")


def test_what_a_killed_machine_left_is_removed(server, cache):
    old, new = cache / "download-old", cache / "download-new"
    for draft in (old, new):
        (draft / "part").mkdir(parents=True)
        (draft / "part" / "file.bin").write_bytes(b"half")
    for path in (*old.rglob("*"), old):
        os.utime(path, (0, time.time() - 2 * download.ABANDONED_SECONDS))
    download.download(remote(server, "whole"), cache)
    assert sorted(path.name for path in cache.iterdir()) == ["download-new", "file.bin"]


def start(server, behaviour, cache, **options):
    program = (
        "import sys; from pathlib import Path; from bnjax import errors; from bnjax.data import "
        "download\n"
        "url, size, sha256, cache = sys.argv[1:]\n"
        "errors.run(lambda: bool(download.download(download.Remote(url, int(size), sha256), "
        "Path(cache))) - 1)"
    )
    file = remote(server, behaviour)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, file.url, str(file.size), file.sha256, str(cache)]
    return subprocess.Popen(command, start_new_session=True, env=environment, **options)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("whom", ["all", "one"])
def test_an_interrupted_download_leaves_nothing(whom, server, cache):
    process = start(server, "stalled", cache, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(path.stat().st_size > 0 for path in cache.rglob("*.bin")))
    if whom == "all":
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
        code, said = 130, "\ninterrupted\n"
    else:
        process.kill()
        code, said = -signal.SIGKILL, ""
    assert process.communicate(timeout=30) == (
        None,
        said,
    )  # which is complete when the process that downloads is gone, too
    assert process.returncode == code
    assert list(cache.iterdir()) == []


def test_a_terminal_shows_the_progress(server, cache):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with start(server, "whole", cache, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # how Linux says that the other end is closed
            pass
        assert process.wait(30) == 0
    os.close(ours)
    assert b"Dl Size" in shown
    assert b" 1/1 [" in shown

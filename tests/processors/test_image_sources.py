"""Images by path, URL and base64, and what a server may do."""

import contextlib
import gzip
import http.server
import sys
import threading

import pytest

from paddlemix.processors import image_sources, images
from paddlemix.processors.image_sources import load_image_source
from paddlemix.utils.errors import ImageError
from tests.helpers import image_base64, image_bytes, refused


def reason(call, *args):
    with pytest.raises(ImageError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return error.value.reason


# Ends what a server would go on sending.
OVER = threading.Event()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
                return
            if self.path == "/headers":
                self.send_response(200)
                for number in range(1000):
                    self.send_header(f"X-{number}", "a" * 100)
                with contextlib.suppress(ConnectionError):
                    self.end_headers()
                return
            if self.path == "/endless":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    for _ in range(1000):
                        self.wfile.write(b"1000\r\n" + bytes(0x1000) + b"\r\n")
                return
            if self.path == "/packed":
                self.send_response(200)
                self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                self.wfile.write(gzip.compress(bytes(10 << 20)))
                return
            bodies = {"/a.jpg?x=1": image_bytes(), "/%E5%9B%BE%20a.jpg": image_bytes(), "/big": b"x" * 5000}
            body = bodies.get(self.path, b"")
            if self.path.startswith("/slow"):
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if self.path == "/slow" else b"X-"))
                    for _ in range(1000):
                        if OVER.wait(0.02):
                            break
                        self.wfile.write(b"H")
                return
            self.send_response(200 if body or self.path == "/short" else 404)
            if self.path == "/short":
                self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    OVER.set()
    httpd.shutdown()


def test_url(server, monkeypatch):
    assert load_image_source(server + "/a.jpg?x=1") == image_bytes()
    assert load_image_source(server + "/to//a.jpg?x=1") == image_bytes()
    assert load_image_source(server + "/图 a.jpg") == image_bytes()
    assert load_image_source(server.replace("http", "HTTP") + "/a.jpg?x=1") == image_bytes()
    with refused(ImageError, "cannot fetch", match="404"):
        load_image_source(server + "/none")
    assert reason(load_image_source, server + "/short") == "cannot fetch"
    monkeypatch.setattr(images, "MAX_BYTES", 4000)
    assert reason(load_image_source, server + "/big") == "image too large"


def test_redirects_are_few_and_stay_with_http(server):
    assert reason(load_image_source, server + "/to/file:///etc/passwd") == "cannot fetch"
    assert reason(load_image_source, server + "/to//to//to//to//to//to/x") == "cannot fetch"


def test_answers_that_would_grow(server, monkeypatch):
    """What is counted is what a compressed body becomes; headers without end are cut off."""
    assert reason(load_image_source, server + "/headers") == "cannot fetch"
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    assert reason(load_image_source, server + "/packed") == "image too large"
    monkeypatch.setattr(images, "MAX_BYTES", 10_000)
    assert reason(load_image_source, server + "/endless") == "image too large"


@pytest.mark.parametrize("path", ["/slow", "/slow headers"])
def test_a_server_that_dribbles_is_left(server, monkeypatch, path):
    """It would go on until the test ends: what ends it is the limit on all of the download."""
    monkeypatch.setattr(image_sources, "URL_TIMEOUT_SECONDS", 0.3)
    with refused(ImageError, "cannot fetch", match="0.3 seconds"):
        load_image_source(server + path)


def test_without_requests(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    with refused(ImageError, "cannot fetch", match="requests"):
        load_image_source(server + "/a.jpg?x=1")
    assert load_image_source(image_base64()) == image_bytes()


def test_nobody_answers(server):
    assert reason(load_image_source, "http://127.0.0.1:9/a.jpg") == "cannot fetch"
    assert reason(load_image_source, "http://nowhere.invalid/a.jpg") == "cannot fetch"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.org/a", "http://", "gopher://x", "http://a:b/"])
def test_other_urls(url):
    assert reason(load_image_source, url) == "cannot fetch"


def test_sources(tmp_path):
    path = tmp_path / "a b.jpg"
    path.write_bytes(image_bytes())
    assert load_image_source(str(path)) == load_image_source(image_base64()) == load_image_source(image_bytes())
    assert load_image_source("data:image/jpeg;base64," + image_base64()) == image_bytes()
    assert reason(load_image_source, "missing.jpg") == "no such file"
    assert reason(load_image_source, "abcd") == "no such file"
    assert reason(load_image_source, "A" * 2000) == "not an image"
    assert reason(load_image_source, 3) == "not an image"
    assert reason(load_image_source, str(tmp_path)) == "no such file"
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    assert reason(load_image_source, str(tmp_path / "huge")) == "image too large"


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(image_bytes())

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(image_sources, "open", refuse, raising=False)
    with refused(ImageError, "no such file", match="Permission denied"):
        load_image_source(str(path))

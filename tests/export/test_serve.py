"""`bnjax serve`: its scores are those of the equations, and what is refused says why."""

import contextlib
import json
import queue
import re
import socket
import sys
import threading
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests
from served import CLASSES, SHAPE, Stub, noise, png, post, scores, server, small_network, trained

from bnjax import main
from bnjax.commands import serve
from bnjax.errors import UserError
from bnjax.export.exported import Exported
from bnjax.export.network import ExportedNetwork, RunNetwork

SMALL = {"bytes": 20_000, "pixels": 5_000, "images": 4}


@pytest.fixture(scope="module")
def url():
    """Of a small network with two batch norms."""
    with server(small_network()) as address:
        yield address


@pytest.fixture(scope="module")
def stub():
    """Of a server with small limits."""
    with server(Stub(), **SMALL, seconds=1) as address:
        yield address


def refused(response, status):
    """Asserts that a response refuses, in the way that all do; returns what it says."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert [*content] == ["error"]
    return content["error"]


@pytest.mark.parametrize("count", [1, 3, 8, 9, 32])
@pytest.mark.parametrize("statistics", ["stored", "batch", "none"])
def test_scores_are_those_of_the_equations(url, statistics, count):
    images = noise(count, seed=count)
    found = post(url, map(png, images), statistics=statistics, layers="yes").json()
    assert found["statistics"] == statistics
    truth, given = scores(trained(), images, statistics)
    for row, score in zip(found["predictions"], truth, strict=True):
        assert [*row["scores"]] == [*CLASSES]
        np.testing.assert_allclose([*row["scores"].values()], score, atol=1e-4)
        assert (row["class"], row["score"]) == (
            CLASSES[score.argmax()],
            row["scores"][CLASSES[score.argmax()]],
        )
    assert [layer["name"] for layer in found["layers"]] == ["norm_in", "dense_norm"]
    for layer in found["layers"]:
        mean, var = given[layer["name"]]
        np.testing.assert_allclose(layer["mean"], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(layer["var"], var, rtol=1e-3, atol=1e-4)


def test_the_three_kinds_of_statistics_differ_here():
    """Or else the test above would say nothing."""
    images = noise(3)
    kinds = [scores(trained(), images, kind)[0] for kind in ("stored", "batch", "none")]
    for i in range(3):
        assert np.abs(kinds[i] - kinds[i - 1]).max() > 0.01


def test_stored_statistics_are_the_default_and_images_do_not_meet(url):
    images = noise(5)
    together = post(url, map(png, images)).json()
    assert together["statistics"] == "stored"
    assert "layers" not in together
    for one, image in zip(together["predictions"], images, strict=True):
        (alone,) = post(url, [png(image)]).json()["predictions"]
        assert [*alone["scores"].values()] == pytest.approx([*one["scores"].values()], abs=1e-6)


def test_one_image_is_no_batch_for_a_norm_over_no_positions(url):
    one, other = (post(url, [png(image)], statistics="batch").json() for image in noise(2))
    assert one["note"].startswith("dense_norm got one value a channel")
    assert one["predictions"][0]["scores"] == other["predictions"][0]["scores"]
    assert "note" not in post(url, map(png, noise(2)), statistics="batch").json()


def test_a_network_without_batch_norms_is_served():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Dense(len(CLASSES), name="logits")(nn.LayerNorm()(x).mean((1, 2)))

    network, image = trained(), noise(1)
    network.model = Plain()
    variables = network.model.init(jax.random.key(0), image / np.float32(255), train=False)
    network.params, network.batch_stats = variables["params"], {}
    logits = network.model.apply(variables, image / np.float32(255), train=False)
    with server(RunNetwork(network)) as url:
        (row,) = post(url, map(png, image), layers="yes").json()["predictions"]
        assert "no batch norm" in refused(post(url, map(png, image), statistics="batch"), 400)
        assert requests.get(f"{url}/statistics", timeout=60).json()["layers"] == []
        assert requests.get(f"{url}/model", timeout=60).json()["statistics"] == ["stored"]
    powers = np.exp(np.asarray(logits, np.float64))[0]
    assert [*row["scores"].values()] == pytest.approx([*powers / powers.sum()], abs=1e-5)


def test_what_the_network_is(url):
    about = requests.get(f"{url}/model", timeout=60).json()
    assert (about["kind"], about["name"], about["step"]) == ("run", "small", 7)
    assert (about["classes"], about["image_shape"]) == ([*CLASSES], [*SHAPE])
    assert about["statistics"] == ["stored", "batch", "none"]
    assert about["norms"] == ["norm_in", "dense_norm"]
    found = requests.get(f"{url}/statistics", timeout=60).json()
    stored = trained().batch_stats
    assert found["layers"] == [
        {"name": name, **{leaf: stored[name][leaf].tolist() for leaf in ("mean", "var")}}
        for name in about["norms"]
    ]
    assert found["folded"] == {}


def test_the_page_loads_nothing_from_elsewhere(url):
    page = requests.get(url, timeout=60)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+", page.text))
    assert addresses <= {"http://www.w3.org"}  # the name of SVG, which is no address
    assert re.findall(r'(?:src|href)="([^"]*)"', page.text) == ["data:,"]


def test_jpegs_of_another_size_and_grey_ones_are_read(url):
    large, grey = noise(1, shape=(20, 30, 3))[0], noise(1)[0, ..., 0]
    names = [("large.jpg", png(large, "JPEG")), ("grey.png", png(grey))]
    one, other = post(url, names).json()["predictions"]
    assert (one["image"], one["note"]) == ("large.jpg", "resized from 30x20 to 5x6")
    truth, _ = scores(trained(), np.repeat(grey[..., None], 3, -1)[None], "stored")
    assert [*other["scores"].values()] == pytest.approx([*truth[0]], abs=1e-4)


def test_numbers_that_are_not_finite_are_null():
    with server(Stub(score=(np.nan, np.inf, 0.5))) as url:
        (row,) = post(url, [png(noise(1)[0])]).json()["predictions"]
    assert [*row["scores"].values()] == [None, None, 0.5]


IMAGE = ("image", ("a.png", png(noise(1)[0])))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([], "has to be multipart/form-data"),
        ([("other", ("a.png", b"x"))], "The field 'other' is unknown. There are: image,"),
        ([("image", (None, "x"))], "The field image is text. Send a file"),
        ([("statistics", (None, "stored"))], "There is no image. Send 1 to 4 as image."),
        ([IMAGE] * 5, "Too many files. Maximum number of files is 4"),
        ([IMAGE, ("statistics", (None, "mean"))], "Give it once, as one of: stored, batch, none"),
        ([IMAGE, ("statistics", (None, "batch"))], "no batch norm. Serve a run that has one"),
        ([IMAGE, *[("layers", (None, "no"))] * 2], "The field layers is not possible as given"),
        ([IMAGE, ("layers", ("a", b"no"))], "The field layers is not possible as given"),
        ([IMAGE, ("layers", (None, "x" * 2_000))], "Part exceeded maximum size of 1KB"),
        ([("image", ("a.png", b""))], "a.png cannot be read as an image: it is neither a PNG nor"),
        ([("image", ("a.gif", png(noise(1)[0], "GIF")))], "it is neither a PNG nor a JPEG file"),
        ([("image", ("b.png", png(noise(1)[0])[:80]))], "b.png cannot be read as an image: "),
        ([("image", ("a" * 500, b"x"))], "a…"),
    ],
)
def test_bad_forms_say_how_to_mend_them(stub, parts, said):
    response = requests.post(f"{stub}/predict", files=parts, timeout=60)
    text = refused(response, 415 if not parts else 400)
    assert said in text
    assert len(text) < 400


@pytest.mark.parametrize(
    "content",
    [b"", b"--x", b"--x\r\n\r\n\r\n", b"\x00" * 99, b"--x\r\nContent-Disposition: a\r\n\r\n"],
)
@pytest.mark.parametrize("kind", ["", ";boundary=x", "; boundary=", "; charset=no; boundary=x"])
def test_broken_multipart_is_refused(stub, kind, content):
    headers = {"content-type": f"multipart/form-data{kind}"}
    refused(requests.post(f"{stub}/predict", data=content, headers=headers, timeout=60), 400)


# How a form begins that is right as far as it goes.
BEGINNING = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


def test_too_many_bytes_are_refused_with_and_without_a_length(stub):
    content, kind = BEGINNING + b"y" * SMALL["bytes"], "multipart/form-data; boundary=x"
    for body in (content, iter([content[:9_000], content[9_000:]])):
        response = requests.post(
            f"{stub}/predict", data=body, headers={"content-type": kind}, timeout=60
        )
        assert "more than 20,000 bytes" in refused(response, 413)


def test_an_endless_body_is_not_read_for_ever(stub):
    host, port = stub.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        connection.sendall(b"%x\r\n%b\r\n" % (len(BEGINNING), BEGINNING))
        sent, chunk = 0, b"1000\r\n" + b"y" * 4096 + b"\r\n"
        with contextlib.suppress(OSError):  # the server hangs up
            while sent < 1 << 30:
                connection.sendall(chunk)
                sent += 4096
    assert sent < 100 << 20


def test_too_many_pixels_are_refused_before_they_are_decoded(stub):
    whole = png(np.zeros((80, 80), np.uint8))
    assert "6,400 pixels and may have 5,000" in refused(post(stub, [whole]), 413)
    cut = png(np.zeros((60, 60), np.uint8))[:-30]  # of which only the header can be read
    assert "7,200 pixels" in refused(post(stub, [cut, cut]), 413)


def test_a_body_that_does_not_come_is_given_up(stub):
    host, port = stub.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x"
        )
        answer = connection.makefile("rb").read()  # until the server hangs up
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not come within 1 seconds" in answer


@pytest.mark.parametrize("path", ["/nothing", "/predict/", "/model/x", "//", "/../etc/passwd"])
def test_unknown_paths_are_404(stub, path):
    assert "/openapi.json" in refused(requests.get(stub + path, timeout=60), 404)


@pytest.mark.parametrize("path", ["/", "/model", "/statistics", "/openapi.json", "/predict"])
@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "OTHER"])
def test_other_methods_are_405(stub, path, method):
    response = requests.request(method, stub + path, timeout=60)
    assert "/openapi.json" in refused(response, 405)
    assert response.headers["allow"] in ("POST", "GET, HEAD", "HEAD, GET")


def test_only_who_asks_by_its_name_is_answered():
    with server(Stub(), hosts=serve.names("127.0.0.1", "Here")) as address:
        port = address.rsplit(":", 1)[1]

        def asked(host, path="/model"):
            return requests.get(f"{address}{path}", headers={"Host": host}, timeout=60)

        for host in ("127.0.0.1", f"127.0.0.1:{port}", "localhost", f"LocalHost:{port}", "here:1"):
            assert asked(host).status_code == 200, host
        rebound = ("evil.example", f"evil.example:{port}", "localhost.evil.example")
        for host in (*rebound, "", "[::1", "[::1]", "127.0.0.2", "localhost@evil.example"):
            for path in ("/", "/model", "/statistics", "/openapi.json"):
                said = refused(asked(host, path), 421)
                assert "127.0.0.1 or here or localhost" in said
        files = [("image", ("a.png", png(noise(1)[0])))]
        headers = {"Host": "evil.example"}
        refused(requests.post(f"{address}/predict", files=files, headers=headers, timeout=60), 421)


@pytest.mark.parametrize(
    ("address", "host", "names"),
    [
        ("127.0.0.1", "127.0.0.1", ["127.0.0.1", "localhost"]),
        ("127.0.1.1", "MyPC", ["127.0.1.1", "mypc", "localhost"]),
        ("::1", "localhost", ["::1", "localhost"]),
        ("0.0.0.0", "0.0.0.0", None),
        ("192.0.2.7", "192.0.2.7", None),
        ("::", "::", None),
    ],
)
def test_a_server_for_its_machine_alone_has_its_names(address, host, names):
    assert serve.names(address, host) == names


def test_requests_beyond_the_queue_are_sent_away():
    go, answers, image = threading.Event(), queue.Queue(), png(noise(1)[0])

    class Slow(Stub):
        def predict(self, images, statistics):
            assert go.wait(60)
            return super().predict(images, statistics)

    with server(Slow(), waiting=2) as url:
        clients = [
            threading.Thread(target=lambda: answers.put(post(url, [image]))) for _ in range(5)
        ]
        for client in clients:
            client.start()
        for _ in range(2):  # of five, one is computed, and two wait
            away = answers.get(timeout=60)
            assert away.headers["retry-after"] == "1"
            assert "2 requests wait already" in refused(away, 503)
        assert requests.get(f"{url}/model", timeout=60).status_code == 200
        go.set()
        for client in clients:
            client.join()
        assert [answers.get(timeout=60).status_code for _ in range(3)] == [200] * 3
        assert post(url, [image]).status_code == 200


def test_an_error_of_ours_is_a_500_without_its_words():
    class Broken(Stub):
        def predict(self, images, statistics):
            raise RuntimeError("/a/path of this machine")

    with server(Broken()) as url:
        for _ in range(20):  # a place is given back
            text = refused(post(url, [png(noise(1)[0])]), 500)
        assert "path" not in text


def test_an_exported_network_has_its_stored_statistics():
    def compiled(size):
        def logits(weights, pixels):
            assert (pixels.dtype, pixels.shape) == (np.uint8, (size, *SHAPE))
            return jnp.asarray(pixels[:, 0, 0] * np.float32(weights["w"]))

        return logits

    leaves = {"mean": np.ones(2, np.float32), "var": np.full(2, 3, np.float32)}
    exported = object.__new__(Exported)
    exported.manifest = SimpleNamespace(
        name="small", step=3, dataset="noise", classes=[*CLASSES], image_shape=[*SHAPE]
    )
    exported.manifest.folded = {"b_norm": "b"}
    weights = {f"batch_stats.a.n.{name}": leaf for name, leaf in leaves.items()}
    exported._weights = jax.device_put(weights | {"w": np.float32(0.01)})
    exported.compiled = compiled
    images = noise(9)
    with server(ExportedNetwork(exported)) as url:
        found = post(url, map(png, images)).json()
        kept = requests.get(f"{url}/statistics", timeout=60).json()
        assert "Serve its run, with --workdir" in refused(
            post(url, [png(images[0])], statistics="none"), 400
        )
    powers = np.exp(images[:, 0, 0].astype(np.float64) * 0.01)
    np.testing.assert_allclose(
        [[*row["scores"].values()] for row in found["predictions"]],
        powers / powers.sum(-1, keepdims=True),
        atol=1e-6,
    )
    assert kept["layers"] == [{"name": "a.n", "mean": [1, 1], "var": [3, 3]}]
    assert kept["folded"] == {"b_norm": "b"}


def test_a_port_that_is_taken_is_said():
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port}: .*in use.*--port"):
            main.main(["serve", "--workdir", "nowhere", "--port", str(port)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workdir", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "no exported model in nowhere"),
        (["--model", "nowhere", "--checkpoint", "best"], "--checkpoint is of a run"),
        (["--workdir", "x", "--host", "no such host"], "cannot listen at no such host"),
        (["--workdir", "x", "--host", "203.0.113.1"], "cannot listen at 203.0.113.1"),
    ],
)
def test_what_cannot_be_served_is_said(words, said):
    with pytest.raises(UserError, match=said):
        main.main(["serve", "--port", "0", *words])


@pytest.mark.parametrize("port", ["-1", "65536", "x", "8 0"])
def test_a_port_is_a_number(port, capsys):
    with pytest.raises(SystemExit):
        main.main(["serve", "--workdir", "x", f"--port={port}"])
    assert "is not a port, 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "python_multipart"])
def test_a_package_that_is_missing_is_named(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"package {name}: pip install 'bnjax\[serve\]'"):
        main.main(["serve", "--workdir", "x"])


def test_the_description_is_json_of_openapi(url):
    found = requests.get(f"{url}/openapi.json", timeout=60)
    assert found.json()["openapi"] == "3.1.0"
    assert {*found.json()["paths"]} == {"/", "/model", "/statistics", "/predict", "/openapi.json"}
    assert json.dumps(found.json()).count("additionalProperties") > 5

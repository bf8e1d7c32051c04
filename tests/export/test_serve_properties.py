"""Requests made at random from the description that `bnjax serve` gives of itself."""

import collections
import io

import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from served import noise, png, server, small_network


@st.composite
def images(draw):
    """A PNG or JPEG file of any size and mode."""
    size, seed = draw(st.tuples(st.integers(1, 40), st.integers(1, 40))), draw(st.integers(0, 99))
    kind = draw(st.sampled_from(["PNG", "JPEG"]))
    mode = draw(st.sampled_from(["RGB", "L", *["RGBA", "P", "1", "LA", "I;16"] * (kind == "PNG")]))
    pixels = noise(1, seed, (*size, 3))[0]
    made = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        made = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    with io.BytesIO() as file:
        made.save(file, kind)
        return file.getvalue()


# The form's files; Schemathesis would send words in their place, which all are refused.
schemathesis.openapi.media_type("image/png", st.lists(images(), min_size=1, max_size=5))
CHECKED = settings(phases=[Phase.generate], database=None)


@pytest.fixture(scope="module")
def url():
    with server(small_network()) as address:
        yield address


def answers(url, mode, examples):
    """Sends requests as described ("positive"), or not quite; counts answers by their status."""
    session, found = requests.Session(), collections.Counter()
    described = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [one.ok() for one in described.get_all_operations()]
    assert {one.label for one in operations} >= {"GET /model", "POST /predict"}
    predict = next(one for one in operations if one.label == "POST /predict")
    chosen = operations if mode == GenerationMode.POSITIVE else [predict]
    # Half of the requests are for what takes an argument.
    requests_ = st.one_of(*[one.as_strategy(generation_mode=mode) for one in [predict, *chosen]])

    @settings(CHECKED, max_examples=examples)
    @given(requests_)
    def send(case):
        # An empty list is sent as no field at all, which is right.
        assume(not isinstance(case.body, dict) or [] not in case.body.values())
        response = case.call(session=session)
        found[response.status_code] += 1
        case.validate_response(response)  # status, type, headers and schema are as described

    send()
    return found


def damaged(url, examples):
    """Sends images of which some bytes are others, or are missing; counts likewise."""
    session, found = requests.Session(), collections.Counter()
    places = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4)

    @settings(CHECKED, max_examples=examples)
    @given(images(), places, st.floats(0, 1))
    def send(content, changes, kept):
        content = bytearray(content)
        for place, value in changes:
            content[int(place * (len(content) - 1))] = value
        if kept < 0.5:
            del content[int(2 * kept * len(content)) :]
        answer = session.post(f"{url}/predict", files={"image": ("x", bytes(content))}, timeout=60)
        found[answer.status_code] += 1
        assert answer.status_code in (200, 400, 413), answer.text
        assert ("error" in answer.json()) == (answer.status_code != 200)

    send()
    return found


def raw(url, examples):
    """Sends bodies that are hardly forms; counts likewise."""
    session, found = requests.Session(), collections.Counter()
    part = st.sampled_from([
        b"--x\r\n", b"--x--\r\n", b"\r\n", b"\r\n\r\n", b"\x00", b"--", b"x", b"=", b";", b"\xff",
        b"Content-Disposition: form-data", b'; name="image"', b'; filename="a.png"', b"; name=",
        b"Content-Type: image/png\r\n", b": ", b'; name="statistics"', b"stored", b"filename*=u",
        png(noise(1)[0]),
    ])  # fmt: skip
    kinds = st.sampled_from(["; boundary=x", ";boundary=", "", '; boundary="', "; boundary=\xe9"])

    @settings(CHECKED, max_examples=examples)
    @given(st.lists(part, max_size=12).map(b"".join), kinds)
    def send(content, kind):
        headers = {"content-type": f"multipart/form-data{kind}".encode("latin-1")}
        answer = session.post(f"{url}/predict", data=content, headers=headers, timeout=60)
        found[answer.status_code] += 1
        assert answer.status_code in (200, 400), answer.text
        assert ("error" in answer.json()) == (answer.status_code != 200)

    send()
    return found


def test_what_is_described_is_answered_as_described(url):
    found = answers(url, GenerationMode.POSITIVE, 25)
    assert {*found} == {200}


def test_what_is_not_described_is_refused(url):
    found = answers(url, GenerationMode.NEGATIVE, 25)
    assert found
    assert {*found} <= {400, 413, 415}


def test_damaged_images_are_read_or_refused(url):
    found = damaged(url, 25)
    assert found[200]
    assert found[400]


def test_bodies_that_are_hardly_forms_are_refused(url):
    assert raw(url, 30)[400]


@pytest.mark.slow
def test_ten_thousand_requests_and_no_error_of_ours(url, capsys):
    found = {
        "as described": answers(url, GenerationMode.POSITIVE, 2_600),
        "not as described": answers(url, GenerationMode.NEGATIVE, 1_600),
        "damaged images": damaged(url, 3_500),
        "hardly forms": raw(url, 2_500),
    }
    with capsys.disabled():
        print("\n", {name: dict(counts) for name, counts in found.items()})
    total = sum(found.values(), collections.Counter())
    assert total.total() >= 10_000
    assert max(total) < 500

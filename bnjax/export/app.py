"""The web application of `bnjax serve`: a page, and what it asks for."""

import contextlib
import importlib.resources
import math
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bnjax.errors import DataError
from bnjax.export.description import describe
from bnjax.export.network import BATCH, NONE, STORED, Answer, Layer, Network
from bnjax.export.uploads import Body, Limits, read_form, read_images
from bnjax.export.worker import Busy, Worker
from bnjax.train.predict import rows

# The page has everything in it, and may load nothing from elsewhere.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; img-src blob: data:; connect-src 'self'; frame-ancestors 'none'"
}
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
RETRY_AFTER = "1"  # seconds
LAYERS = "layers"
YES, NO = "yes", "no"


def application(
    network: Network, limits: Limits, hosts: Collection[str] | None = None
) -> Starlette:
    """Returns the application that answers for one network.

    Args:
        network: what is served.
        limits: of what a request may bring.
        hosts: the names by which it may be asked, in lower case; None for any.
    """
    api = _Api(network, limits)
    routes = [
        Route("/", api.page),
        Route("/model", api.model),
        Route("/statistics", api.statistics),
        Route("/predict", api.predict, methods=["POST"]),
        Route("/openapi.json", api.description),
    ]
    handlers: Any = {HTTPException: _refused, ClientDisconnect: _gone, Exception: _failed}
    app = Starlette(
        routes=routes,
        middleware=[] if hosts is None else [Middleware(_Named, hosts)],
        exception_handlers=handlers,
        lifespan=api.lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _Named:
    """Answers only who asks by a name of this server.

    A site can have its own name point at the loopback address (DNS rebinding); its pages in a
    browser of this machine could then read what is served here. The Host header tells.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and host_of(Headers(scope=scope)) not in self._hosts:
            text = (
                f"This server is for its own machine and answers at {' or '.join(self._hosts)} "
                "only. Use that in the address, or start it with --host 0.0.0.0 to answer anyone."
            )
            app = JSONResponse({"error": text}, 421, HEADERS | {"Connection": "close"})
        await app(scope, receive, send)


class _Api:
    def __init__(self, network: Network, limits: Limits):
        self._network, self._limits = network, limits
        self._worker = Worker(limits.waiting + 1)
        self._page = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
        self._about = about(network, limits)
        self._description = describe(network.about, limits)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self._worker.close()

    async def page(self, request: Request) -> Response:
        return HTMLResponse(self._page, headers=HEADERS | PAGE_HEADERS)

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._about, headers=HEADERS)

    async def statistics(self, request: Request) -> Response:
        found = {"layers": as_json(self._network.stored), "folded": self._about["folded"]}
        return JSONResponse(found, headers=HEADERS)

    async def description(self, request: Request) -> Response:
        return JSONResponse(self._description, headers=HEADERS)

    async def predict(self, request: Request) -> Response:
        body = Body(request, self._limits)
        try:
            with self._worker.place():
                return await self._predict(body)
        except Busy:
            error = HTTPException(
                503,
                f"{self._limits.waiting} requests wait already. Send this one again after "
                f"{RETRY_AFTER} second.",
                {"Retry-After": RETRY_AFTER},
            )
        except HTTPException as refusal:
            error = refusal
        if not await body.drop():  # what is still to come is not waited for
            error.headers = {**(error.headers or {}), "Connection": "close"}
        raise error

    async def _predict(self, body: Body) -> Response:
        choices = {"statistics": (STORED, BATCH, NONE), LAYERS: (NO, YES)}
        request = body.counted()
        try:
            form = await read_form(request, self._limits, choices)
            statistics = form.choices["statistics"]
            if statistics not in self._network.about.statistics:
                raise HTTPException(400, without_norms(self._network, statistics))
            files = [(file.filename or "", file.file) for file in form.files]
            layers = form.choices[LAYERS] == YES
            found = await self._worker.do(self._of_images, files, statistics, layers)
        except DataError as error:
            raise HTTPException(400, f"{error} Send whole PNG or JPEG files.") from error
        finally:
            await request.close()
        return JSONResponse(found, headers=HEADERS)

    def _of_images(self, files: Any, statistics: str, layers: bool) -> dict[str, Any]:
        about = self._network.about
        pictures = read_images(files, about.image_shape, self._limits)
        images = np.stack([picture.image for picture in pictures])
        answer = self._network.predict(images, statistics)
        found: dict[str, Any] = {
            "statistics": statistics,
            "predictions": rows(pictures, about.classes, answer.predicted),
        }
        found |= {"note": note} if (note := one_value(answer)) and statistics == BATCH else {}
        found |= {"layers": as_json(answer.given)} if layers else {}
        return finite(found)


def about(network: Network, limits: Limits) -> dict[str, Any]:
    """Returns what /model says: nothing about the machine, its folders included."""
    found = network.about
    return {
        "kind": found.kind,
        "name": found.name,
        "step": found.step,
        "dataset": found.dataset,
        "classes": [*found.classes],
        "image_shape": [*found.image_shape],
        "statistics": [*found.statistics],
        "norms": [layer.name for layer in network.stored],
        "folded": dict(found.folded),
        "limits": {
            "bytes": limits.bytes,
            "images": limits.images,
            "pixels": limits.pixels,
            "waiting": limits.waiting,
        },
    }


def as_json(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Returns layers as /statistics and /predict show them."""
    return [
        finite({"name": layer.name, "mean": layer.mean.tolist(), "var": layer.var.tolist()})
        for layer in layers
    ]


def host_of(headers: Headers) -> str | None:
    """Returns which host a request asks for, without the port, or None where it does not say."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:  # brackets that do not close
        return None


def finite(value: Any) -> Any:
    """Returns a value that JSON can hold: None stands for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def one_value(answer: Answer) -> str:
    """Returns what is to be said of norms that saw one value a channel, or nothing."""
    names = [layer.name for layer in answer.given if layer.values == 1]
    if not names:
        return ""
    return (
        f"{', '.join(names)} got one value a channel, whose variance is 0: what comes out is the "
        "same for every image. Send several images, which are a batch then."
    )


def without_norms(network: Network, statistics: str) -> str:
    """Returns why a network cannot be evaluated with these statistics."""
    if network.about.kind == "exported":
        why = "an exported network has only what was stored. Serve its run, with --workdir."
    else:
        why = "this network has no batch norm. Serve a run that has one, and was not folded."
    return f"statistics={statistics} is not possible: {why}"


async def _refused(request: Request, error: Exception) -> Response:
    """Answers with what a request did wrong and how to mend it."""
    assert isinstance(error, HTTPException)
    words = {
        404: "There is nothing at this path. /openapi.json says what there is.",
        405: "This path does not take this method. /openapi.json says which it does.",
    }
    text = words.get(error.status_code, error.detail)
    headers = HEADERS | dict(error.headers or {})
    return JSONResponse({"error": text}, error.status_code, headers)


async def _failed(request: Request, error: Exception) -> Response:
    """Answers after an error of ours, of which the terminal has the traceback."""
    text = "The server failed at this request. Its terminal says why; please report that."
    return JSONResponse({"error": text}, 500, HEADERS)


async def _gone(request: Request, error: Exception) -> Response:
    """Ends a request whose client went away; nobody reads it."""
    return Response(status_code=400)

"""What `bnjax serve` answers, described as OpenAPI 3.1."""

from typing import Any

from bnjax.export.network import STORED, About
from bnjax.export.uploads import IMAGE, TYPE, Limits

NUMBER = {"type": ["number", "null"]}  # null: not finite
TEXT = {"type": "string"}
NAMES = {"type": "array", "items": TEXT}
ERROR = {"$ref": "#/components/schemas/Error"}
LAYERS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "mean", "var"],
        "additionalProperties": False,
        "properties": {
            "name": TEXT,
            "mean": {"type": "array", "items": NUMBER},
            "var": {"type": "array", "items": NUMBER},
        },
    },
}
FOLDED = {"type": "object", "additionalProperties": TEXT}
MISDIRECTED = "The request asks for a host that this server is not."
ERRORS = {
    "400": "The form or an image in it cannot be read.",
    "408": "The body did not come in time.",
    "413": "The body is too large, or the images in it are.",
    "415": f"The body is not {TYPE}.",
    "421": MISDIRECTED,
    "503": "Too many requests wait.",
}


def describe(about: About, limits: Limits) -> dict[str, Any]:
    """Returns the description of the application for one network."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "bnjax serve",
            "version": "1",
            "description": "A trained network to try. Everything that fails answers with "
            '{"error": text}: what is wrong, why, and how to mend it.',
        },
        "paths": {
            "/": {"get": _get("The page", {"type": "string"}, "text/html")},
            "/openapi.json": {"get": _get("This description", {"type": "object"})},
            "/model": {"get": _get("What the network is, and what may be sent", _model(about))},
            "/statistics": {
                "get": _get(
                    "The stored running statistics, norm by norm in the order of the calls",
                    _object(layers=LAYERS, folded=FOLDED),
                )
            },
            "/predict": {"post": _predict(about, limits)},
        },
        "components": {"schemas": {"Error": _object(error=TEXT)}},
    }


def _get(summary: str, schema: Any, kind: str = "application/json") -> dict[str, Any]:
    responses = {"200": _answer(summary, schema, kind), "421": _answer(MISDIRECTED, ERROR)}
    return {"summary": summary, "responses": responses}


def _answer(summary: str, schema: Any, kind: str = "application/json") -> dict[str, Any]:
    return {"description": summary, "content": {kind: {"schema": schema}}}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": [*properties],
        "additionalProperties": False,
        "properties": properties,
    }


def _model(about: About) -> dict[str, Any]:
    whole = {"type": "integer"}
    limits = dict.fromkeys(("bytes", "images", "pixels", "waiting"), whole)
    return _object(
        kind={"enum": ["run", "exported"]},
        name=TEXT,
        step=whole,
        dataset=TEXT,
        classes=NAMES,
        image_shape={"type": "array", "items": whole, "minItems": 3, "maxItems": 3},
        statistics={"type": "array", "items": {"enum": [*about.statistics]}},
        norms=NAMES,
        folded=FOLDED,
        limits=_object(**limits),
    )


def _predict(about: About, limits: Limits) -> dict[str, Any]:
    form = {
        "type": "object",
        "required": [IMAGE],
        "additionalProperties": False,
        "properties": {
            IMAGE: {
                "type": "array",
                "minItems": 1,
                "maxItems": limits.images,
                "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                "description": f"PNG or JPEG files, of {limits.pixels:,} pixels together; resized "
                "to what the network takes.",
            },
            "statistics": {
                "enum": [*about.statistics],
                "default": STORED,
                "description": "What the batch norms normalise by: the stored averages, the images "
                "of this request, or a mean of 0 and a variance of 1.",
            },
            "layers": {
                "enum": ["no", "yes"],
                "default": "no",
                "description": "Whether to say which mean and variance each norm was given.",
            },
        },
    }
    prediction = _object(
        image=TEXT,
        score=NUMBER,
        scores={"type": "object", "additionalProperties": NUMBER},
        note=TEXT,
    )
    prediction["properties"]["class"] = {"enum": [*about.classes]}
    prediction["required"] = ["image", "class", "score", "scores"]
    answer = _object(
        statistics={"enum": [*about.statistics]},
        predictions={"type": "array", "items": prediction, "minItems": 1},
        note=TEXT,
        layers=LAYERS,
    )
    answer["required"] = ["statistics", "predictions"]
    responses = {status: _answer(text, ERROR) for status, text in ERRORS.items()}
    responses["503"]["headers"] = {
        "Retry-After": {
            "description": "Seconds after which to try again",
            "required": True,
            "schema": {"type": "integer"},
        }
    }
    encoding = {IMAGE: {"contentType": "image/png, image/jpeg"}}
    return {
        "summary": f"The scores of 1 to {limits.images} images, which are one batch",
        "requestBody": {
            "required": True,
            "content": {TYPE: {"schema": form, "encoding": encoding}},
            "description": f"At most {limits.bytes:,} bytes.",
        },
        "responses": {"200": _answer("The scores", answer), **responses},
    }

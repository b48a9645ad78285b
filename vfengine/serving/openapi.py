"""The published description of the API (OpenAPI 3.1), with the bounds of the served model."""

from __future__ import annotations

from typing import Any

from .. import __version__
from .jobs import FORMATS, STATUSES
from .model_info import ModelInfo
from .request_forms import MAX_FPS, MAX_PROMPT, REQUEST_NAME, Bounds

Schema = dict[str, Any]
_ID = {"type": "string", "pattern": "^video_[0-9a-f]{32}$"}
_MOMENT = {"type": ["integer", "null"], "description": "unix seconds"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_NUMBER_OR_NULL = {"type": ["number", "null"]}
_STATES = {
    400: "a field or parameter that cannot be taken; `param` names it",
    401: "no key, or a wrong one",
    403: "a request of a foreign page, or to a foreign name",
    404: "no such video, or a file of it that is not there yet",
    405: "another method",
    408: "a body that came too slowly",
    413: "a body that is too large",
    416: "a range outside of the file",
    429: "a full queue; retry-after-ms says when to try again",
    507: "a full disk; nothing was accepted, retry-after-ms says when to try again",
}
_REQUEST_ID = {
    "x-request-id": {
        "description": "names this exchange, as the server's log does",
        "required": True,
        "schema": {"type": "string"},
    }
}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _integer(low: int, high: int, words: str) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high, "description": words}


def _number(low: float, high: float, words: str) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high, "description": words}


def _fields(info: ModelInfo, bounds: Bounds) -> dict[str, Schema]:
    """Fields of requests, by name."""
    sizes = [f"{info.width * n}x{info.height * n}" for n in range(1, bounds.scale + 1)]
    label: Schema = {"type": "string", "description": "what to show, one of the model's labels"}
    if info.labels:
        label["enum"] = list(info.labels)
    return {
        "model": {"type": "string", "enum": [info.name]},
        "prompt": {
            "type": "string",
            "maxLength": MAX_PROMPT,
            "description": "what to show; of a model that knows labels alone, one of them",
        },
        "label": label,
        "negative_prompt": {"type": "string", "maxLength": MAX_PROMPT},
        "seconds": {
            "type": "string",
            "pattern": r"^[0-9]{1,4}(\.[0-9]{1,3})?$",
            "description": "length of the clip; times fps, its frames",
        },
        "size": {"type": "string", "enum": sizes},
        "seed": _integer(0, 2**64 - 2, "short for base_seed S and residual_seed S + 1"),
        "base_seed": _integer(0, 2**64 - 1, "seed of the base frame, the look"),
        "residual_seed": _integer(0, 2**64 - 1, "seed of the motion"),
        "num_frames": _integer(1, bounds.frames(info), "frames of the clip"),
        "fps": _number(1, MAX_FPS, "frames a second"),
        "num_inference_steps": _integer(*info.steps_range(bounds.steps), "steps of the solver"),
        "guidance_scale": _number(
            *info.guidance_range, "scale of classifier-free guidance; 1 is off"
        ),
        "solver": {"type": "string", "enum": list(info.solvers)},
        "eta": _number(0, 1, "share of new noise in each step of ddim"),
        "base_path": {"type": "string", "enum": list(info.base_paths) or ["clean"]},
        "loop": {"type": "boolean", "description": "the last and the first frame are neighbours"},
        "format": {"type": "string", "enum": list(FORMATS)},
        "scale": _integer(1, bounds.scale, "the pictures are enlarged so many times"),
        "input_reference": {
            "type": "object",
            "properties": {"image_url": {"type": "string", "pattern": "^data:image/"}},
            "required": ["image_url"],
            "additionalProperties": False,
            "description": "a picture that becomes the base frame, as a data: URL",
        },
    }


def _form(fields: dict[str, Schema], names: tuple[str, ...], **more: Any) -> Schema:
    properties = {name: fields[name] for name in names if name in fields}
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _multipart(form: Schema, file: str) -> Schema:
    properties = {**form["properties"], file: {"type": "string", "format": "binary"}}
    return {**form, "properties": properties}


def _video() -> Schema:
    properties: dict[str, Schema] = {
        "id": _ID,
        "object": {"const": "video"},
        "model": {"type": "string"},
        "status": {"enum": list(STATUSES)},
        "progress": {"type": "integer", "minimum": 0, "maximum": 100},
        "created_at": {"type": "integer", "description": "unix seconds"},
        "completed_at": _MOMENT,
        "expires_at": _MOMENT,
        "seconds": {"type": "string"},
        "size": {"type": "string", "pattern": "^[0-9]+x[0-9]+$"},
        "prompt": _TEXT_OR_NULL,
        "remixed_from_video_id": _TEXT_OR_NULL,
        "error": {
            "type": ["object", "null"],
            "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
            "required": ["code", "message"],
        },
    }
    required = list(properties)
    properties |= {
        "phase": _TEXT_OR_NULL,
        "queue_position": {"type": ["integer", "null"], "minimum": 1},
        "label": _TEXT_OR_NULL,
        "seed": {"type": ["integer", "null"]},
        "base_seed": {"type": "integer"},
        "residual_seed": {"type": "integer"},
        "num_frames": {"type": "integer"},
        "fps": {"type": "number"},
        "num_inference_steps": {"type": "integer"},
        "guidance_scale": {"type": "number"},
        "solver": {"type": "string"},
        "format": {"enum": list(FORMATS)},
        "scale": {"type": "integer"},
        "has_thumbnail": {"type": "boolean"},
        "inference_time_s": _NUMBER_OR_NULL,
        "peak_memory_mb": _NUMBER_OR_NULL,
    }
    return {"type": "object", "properties": properties, "required": required}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _schemas(info: ModelInfo, bounds: Bounds) -> dict[str, Schema]:
    # what the forms of requests hold is stated once, in request_forms
    from .request_forms import CREATE_FIELDS, EXTEND_FIELDS, REMIX_FIELDS

    fields = _fields(info, bounds)
    extend = _form(fields, EXTEND_FIELDS, required=["video"])
    extend["properties"]["video"] = {**_object(id=_ID), "additionalProperties": False}
    error = _object(
        message={"type": "string"}, type={"type": "string"}, param=_TEXT_OR_NULL, code=_TEXT_OR_NULL
    )
    return {
        "CreateVideo": _form(fields, CREATE_FIELDS, required=["prompt"]),
        "RemixVideo": _form(fields, REMIX_FIELDS),
        "ExtendVideo": extend,
        "Video": _video(),
        "VideoList": _object(
            object={"const": "list"},
            data={"type": "array", "items": _ref("Video")},
            first_id=_TEXT_OR_NULL,
            last_id=_TEXT_OR_NULL,
            has_more={"type": "boolean"},
        ),
        "VideoDeleted": _object(id=_ID, object={"const": "video.deleted"}, deleted={"const": True}),
        "Model": _object(
            id={"type": "string"},
            object={"const": "model"},
            created={"type": "integer"},
            owned_by={"type": "string"},
        ),
        "ModelList": _object(
            object={"const": "list"}, data={"type": "array", "items": _ref("Model")}
        ),
        "Health": _object(
            status={"enum": ["ok", "no engine"]},
            version={"type": "string"},
            model={"type": "string"},
            engines={"type": "integer"},
            queued={"type": "integer"},
            in_progress={"type": "integer"},
        ),
        "Error": _object(error=error),
    }


# -- paths -----------------------------------------------------------------------------------------


def _answer(words: str, content: Schema | None = None) -> Schema:
    return {"description": words, "headers": _REQUEST_ID, "content": content or {}}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _operation(words: str, answer: Schema, states: tuple[int, ...], **more: Any) -> Schema:
    """An operation with its answer for 200, and errors of these states besides the usual ones."""
    errors = sorted({401, 403, *states})
    return {
        "summary": words,
        "responses": {
            "200": answer,
            **{str(state): _answer(_STATES[state], _json("Error")) for state in errors},
        },
        **more,
    }


def _path_parameter(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query(name: str, schema: Schema) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _body(json_schema: Schema, multipart: Schema | None = None) -> Schema:
    content = {"application/json": {"schema": json_schema}}
    if multipart is not None:
        content["multipart/form-data"] = {"schema": multipart}
    return {"required": True, "content": content}


def openapi(info: ModelInfo, bounds: Bounds, with_keys: bool) -> dict[str, Any]:
    """The document; with_keys: whether requests must have a key."""
    schemas = _schemas(info, bounds)
    video = _answer("the video as it is now", _json("Video"))
    with_id = {"parameters": [_path_parameter("video_id", _ID)]}
    added = (400, 404, 408, 413, 429, 507)
    again = {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "schema": {
            "type": "string",
            "minLength": 1,
            "maxLength": 255,
            "pattern": f"^{REQUEST_NAME}$",
        },
        "description": "a second request with it is answered with the first one's video",
    }
    text = {"text/html": {"schema": {"type": "string"}}}
    file = {"schema": {"type": "string", "format": "binary"}}
    files = dict.fromkeys(("video/mp4", "video/webm", "image/webp", "image/gif"), file)
    files["image/png"] = file
    variants = {"type": "string", "enum": ["video", "thumbnail", "spritesheet"]}
    content = _operation(
        "the file of a video, its base frame, or a sheet of its frames",
        _answer("the file", files),
        (400, 404, 416),
        parameters=[_query("variant", variants)],
    )
    content["responses"]["206"] = _answer("a part of the file", files)
    create = _body(_ref("CreateVideo"), _multipart(schemas["CreateVideo"], "input_reference"))
    extend = _body(_ref("ExtendVideo"), _multipart(schemas["ExtendVideo"], "video"))
    anything = {"type": "object"}
    refused = _operation("not supported; the error names what is", video, (400, 404, 408, 413))
    refused["responses"].pop("200")
    paths: dict[str, Schema] = {
        "/v1/videos": {
            "post": _operation(
                "make a video", video, added, requestBody=create, parameters=[again]
            ),
            "get": _operation(
                "list videos",
                _answer("a page of videos", _json("VideoList")),
                (400,),
                parameters=[
                    _query("after", _ID),
                    _query("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
                    _query("order", {"type": "string", "enum": ["asc", "desc"]}),
                ],
            ),
        },
        "/v1/videos/{video_id}": {
            **with_id,
            "get": _operation("show a video", video, (404,)),
            "delete": _operation(
                "delete a video, and stop it if it is being made",
                _answer("it is deleted", _json("VideoDeleted")),
                (404, 507),
            ),
        },
        "/v1/videos/{video_id}/content": {**with_id, "get": content},
        "/v1/videos/{video_id}/remix": {
            **with_id,
            "post": _operation(
                "another motion of this look",
                video,
                added,
                requestBody=_body(_ref("RemixVideo")),
                parameters=[again],
            ),
        },
        "/v1/videos/extensions": {
            "post": _operation(
                "go on from the last frame of a video",
                video,
                added,
                requestBody=extend,
                parameters=[again],
            )
        },
        "/v1/videos/edits": {"post": {**refused, "requestBody": _body(anything)}},
        "/v1/videos/characters": {"post": {**refused, "requestBody": _body(anything)}},
        "/v1/models": {
            "get": _operation("list models", _answer("the models", _json("ModelList")), ())
        },
        "/v1/models/{model}": {
            "parameters": [_path_parameter("model", {"type": "string", "minLength": 1})],
            "get": _operation("show a model", _answer("the model", _json("Model")), (404,)),
        },
        "/health": {
            "get": _operation("whether engines run", _answer("they do", _json("Health")), ())
        },
        "/metrics": {
            "get": _operation(
                "figures for Prometheus",
                _answer("figures", {"text/plain": {"schema": {"type": "string"}}}),
                (),
            )
        },
        "/": {"get": _operation("the page", _answer("the page", text), (404,))},
    }
    paths["/health"]["get"]["responses"]["503"] = _answer("none runs", _json("Health"))
    components: Schema = {"schemas": schemas}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "vfengine serve", "version": __version__},
        "paths": paths,
        "components": components,
    }
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document

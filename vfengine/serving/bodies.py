"""Bodies of requests: JSON, multipart or urlencoded forms, to one form of fields.

Forms write nested values with brackets: input_reference[image_url]. All their values are text.
"""

from __future__ import annotations

import json
import re
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import Request

from .errors import ApiError, bad, shown

_MAX_FIELDS = 64
_MAX_VALUES = 10_000
_NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")
_TYPES = "application/json, multipart/form-data or application/x-www-form-urlencoded"


@dataclass
class Body:
    """What a request brought.

    values: by name; a nested one is a dict. None, and an empty text of a form, are left out
    files:  by name
    """

    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, UploadFile] = field(default_factory=dict)

    async def close(self) -> None:
        for file in self.files.values():
            await file.close()


class _Multipart(MultiPartParser):
    """A parser that tells whether the last boundary came."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def read_body(request: Request, max_bytes: int) -> Body:
    """The fields of a request, whose length the gate bounds as well.

    Raises ApiError for another type of content, for what is not well-formed, and for names that
    are there twice.
    """
    kind, _ = parse_options_header(request.headers.get("content-type"))
    if kind == b"multipart/form-data":
        return await _read_form(request, max_bytes)
    if kind == b"application/x-www-form-urlencoded":
        return await _read_form(request, max_bytes, urlencoded=True)
    if kind in (b"application/json", b""):
        return _read_json(await request.body())
    raise bad(f"expected {_TYPES}, got {shown(kind.decode('latin-1'))}", code="content_type")


def _read_json(data: bytes) -> Body:
    if not data.strip():
        return Body()
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > _MAX_VALUES:
        # as objects they would take many times the memory of their text
        raise bad(f"a JSON body may have {_MAX_VALUES} values at most", code="invalid_json")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:  # also for what is not UTF-8
        raise bad(f"the body is not JSON ({shown(str(error))})", code="invalid_json") from error
    if not isinstance(values, dict):
        raise bad("the body must be a JSON object", code="invalid_json")
    return Body({name: value for name, value in values.items() if value is not None})


async def _read_form(request: Request, max_bytes: int, urlencoded: bool = False) -> Body:
    bounds = {"max_fields": _MAX_FIELDS, "max_part_size": max_bytes}
    try:
        async with aclosing(request.stream()) as stream:
            if urlencoded:
                form = await FormParser(request.headers, stream, **bounds).parse()
            else:
                parser = _Multipart(request.headers, stream, max_files=1, **bounds)
                form = await parser.parse()
                if not parser.ended and form:
                    await form.close()
                    raise bad("the form has no last boundary", code="invalid_form")
    except (MultiPartException, FormParserError) as error:
        message = getattr(error, "message", str(error)).rstrip(".")
        raise bad(f"the form cannot be read: {message}", code="invalid_form") from error
    body = Body()
    try:
        for name, value in form.multi_items():
            _add(body, name, value)
    except ApiError:
        await form.close()
        raise
    return body


def _add(body: Body, name: str, value: str | UploadFile) -> None:
    if isinstance(value, UploadFile):
        if not value.filename and not value.size:
            return  # a browser's file input with nothing in it
        place, key = body.files, name
    elif match := _NESTED.fullmatch(name):
        name, key = match.groups()
        place = body.values.setdefault(name, {})
        if not isinstance(place, dict):
            raise bad(f"{shown(name)} is there twice", name[:80], "duplicate_parameter")
    elif value == "" and name != "prompt":
        return  # how clients write None
    else:
        place, key = body.values, name
    if (
        key in place
        or (place is body.values and name in body.files)
        or (place is body.files and name in body.values)
    ):
        raise bad(f"{shown(name)} is there twice", name[:80], "duplicate_parameter")
    place[key] = value


# -- values of fields ------------------------------------------------------------------------------


def whole(values: dict[str, Any], name: str, low: int, high: int) -> int | None:
    """A whole number, as a number or as text; None if it is not there."""
    value = number = values.get(name)
    if value is None:
        return None
    if (isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value, re.ASCII)) or (
        isinstance(value, float) and value.is_integer()
    ):
        number = int(value)
    if type(number) is not int or not low <= number <= high:
        message = f"{name} must be a whole number from {low} to {high}, got {shown(value)}"
        raise bad(message, name)
    return number


def real(values: dict[str, Any], name: str, low: float, high: float) -> float | None:
    """A number, as a number or as text; None if it is not there."""
    value = number = values.get(name)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", value, re.ASCII):
        number = float(value)
    if type(number) not in (int, float) or not low <= number <= high:  # also refuses NaN
        raise bad(f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}", name)
    return float(number)


def text(values: dict[str, Any], name: str, most: int) -> str | None:
    """A text of at most so many characters; None if it is not there."""
    value = values.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise bad(f"{name} must be a text, got {shown(value)}", name)
    if len(value) > most:
        raise bad(f"{name} may have {most} characters at most, got {len(value)}", name)
    if "\0" in value or any(0xD800 <= ord(char) < 0xE000 for char in value):
        raise bad(f"{name} must be a text without null characters and lone surrogates", name)
    return value


def choice(values: dict[str, Any], name: str, choices: tuple[str, ...]) -> str | None:
    """One of the choices; None if it is not there."""
    value = values.get(name)
    if value is None or (isinstance(value, str) and value in choices):
        return value
    raise bad(f"{name} must be one of {', '.join(choices)}, got {shown(value)}", name)


def switch(values: dict[str, Any], name: str) -> bool:
    """Whether something is on, as a boolean or as text; off if it is not there."""
    value = values.get(name)
    if isinstance(value, str) and value in ("true", "false"):
        return value == "true"
    if value is not None and not isinstance(value, bool):
        raise bad(f"{name} must be true or false, got {shown(value)}", name)
    return bool(value)

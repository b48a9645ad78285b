"""Errors of the API, in the form that clients read: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_NOT_AGAIN = {"x-should-retry": "false"}  # clients would try some statuses again on their own


class ApiError(Exception):
    """A request that cannot be answered as asked.

    message: for a person, on one line;  code: for a program
    param:   the field or query parameter that is wrong, if it is one
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        kind = _TYPES.get(self.status, "invalid_request_error")
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: a field that cannot be taken."""
    return ApiError(400, message, code, param)


def no_video(job_id: str) -> ApiError:
    return ApiError(404, f"there is no video {shown(job_id)}", "video_not_found", "video_id")


def not_yet(message: str) -> ApiError:
    """404 that a client is not to try again at once: what it asks for is not there yet."""
    return ApiError(404, message, "not_ready", "variant", _NOT_AGAIN)


def queue_full(waiting: int) -> ApiError:
    headers = {"retry-after-ms": "1000", "retry-after": "1"}
    return ApiError(429, f"{waiting} videos are waiting already", "queue_full", headers=headers)


def too_busy() -> ApiError:
    """503 that a client may try again, however its request is meant: none of it was read."""
    headers = {"retry-after-ms": "1000", "retry-after": "1", "connection": "close"}
    message = "too many connections are open: try again"
    return ApiError(503, message, "too_many_connections", headers=headers)


def disk_full() -> ApiError:
    """507 that a client tries again: nothing was accepted."""
    headers = {"retry-after-ms": "5000", "retry-after": "5"}
    message = "this server cannot write: its disk is full, or does not work"
    return ApiError(507, message, "disk_full", headers=headers)


def too_large(limit: int) -> ApiError:
    message = f"the body may have {limit:,} bytes at most".replace(",", " ")
    return ApiError(413, message, "body_too_large")


def too_slow(seconds: float) -> ApiError:
    message = f"the body did not arrive within {seconds:g} seconds"
    return ApiError(408, message, "body_too_slow", headers=_NOT_AGAIN)


def shown(value: object) -> str:
    """A value that a client sent, short and without what a terminal would act on."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""The error tree, and how it leaves the process: RFC 9457 problem details.

Every class is one problem with a stable code; the same instance of the fault always has the same code and status.
"""

# ruff: noqa: N818 - what went wrong is the name; that it is an error shows where it is raised.

import logging
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

log = logging.getLogger(__name__)
PROBLEM_TYPE = "application/problem+json"


class AvatarServiceError(Exception):
    """Root of the tree.  `extra` members travel in the problem next to the standard ones."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "The service failed"

    def __init__(self, detail: str = "", **extra: Any) -> None:
        super().__init__(detail)
        self.extra = extra


class AvatarNotFound(AvatarServiceError):
    """No avatar of that name is served."""

    status, code, title = 404, "avatar-not-found", "No such avatar"


class LodNotFound(AvatarServiceError):
    """The avatar has no mesh of that level of detail."""

    status, code, title = 404, "lod-not-found", "No such level of detail"


class AvatarUnavailable(AvatarServiceError):
    """The avatar is there, but its bundle is damaged or its graph cannot be run."""

    status, code, title = 503, "avatar-unavailable", "The avatar cannot be served"


class NotReady(AvatarServiceError):
    """No avatar can be reposed at the moment."""

    status, code, title = 503, "not-ready", "The service is not ready"


class EngineFailed(AvatarServiceError):
    """The engine raised; nothing is known about why."""

    status, code, title = 500, "engine-failed", "The avatar could not be reposed"


class OutputInvalid(AvatarServiceError):
    """The engine's answer has the wrong shape or is not finite."""

    status, code, title = 500, "output-invalid", "The avatar's graph gave an invalid surface"


class InvalidPose(AvatarServiceError):
    """The request can be read but holds no poses of this avatar's skeleton."""

    status, code, title = 422, "pose-invalid", "Not a sequence of SMPL poses"


class PoseShapeInvalid(InvalidPose):
    """Wrong width, wrong number of joints, ragged rows, or lengths that do not agree."""

    code, title = "pose-shape-invalid", "The poses have a shape that is not accepted"


class PoseNotFinite(InvalidPose):
    """A NaN or an infinity."""

    code, title = "pose-not-finite", "A pose or translation is not a finite number"


class PoseNotNumber(InvalidPose):
    """Text, true, null or an object where a number belongs."""

    code, title = "pose-not-number", "A pose or translation is not a number"


class PoseNotRotation(InvalidPose):
    """A matrix that is no rotation."""

    code, title = "pose-not-rotation", "A pose matrix is not a rotation"


class PoseOutOfRange(InvalidPose):
    """An angle above 4 pi, or a translation above 10 km."""

    code, title = "pose-out-of-range", "A pose or translation is out of range"


class PoseEmpty(InvalidPose):
    """Zero frames."""

    code, title = "pose-empty", "The sequence has no frames"


class OptionInvalid(InvalidPose):
    """fps, up_axis, units, rotation or every: unknown, out of range, or said twice with different values."""

    code, title = "option-invalid", "An option is not accepted"


class NpzUnsafe(InvalidPose):
    """The archive holds a pickle or a type that only a pickle could fill."""

    code, title = "npz-unsafe", "The .npz is not safe to read"


class NpzInvalid(InvalidPose):
    """Not a zip archive of plain arrays."""

    code, title = "npz-invalid", "The .npz cannot be read"


class TooManyFrames(AvatarServiceError):
    """More frames than this service, or this format, takes at once."""

    status, code, title = 413, "too-many-frames", "The sequence is too long"


class BodyTooLarge(AvatarServiceError):
    """More bytes than the service reads."""

    status, code, title = 413, "body-too-large", "The request body is too large"


class JsonBroken(AvatarServiceError):
    """The body is not JSON."""

    status, code, title = 400, "json-broken", "The body is not valid JSON"


class NotAcceptable(AvatarServiceError):
    """None of the formats of the Accept header can be given."""

    status, code, title = 406, "not-acceptable", "None of the accepted formats can be given"


class UnsupportedMedia(AvatarServiceError):
    """The body has a type or an encoding the service does not read."""

    status, code, title = 415, "unsupported-media-type", "The type of the body is not supported"


def problem(request: Request, status: int, code: str, title: str, detail: str | None, **extra: Any) -> JSONResponse:
    """Problem details (RFC 9457) as an answer that is never cached."""
    body = {"type": f"urn:reposer:problem:{code}", "title": title, "status": status}
    if detail:
        body["detail"] = detail
    body |= {"instance": request.url.path, "code": code, **extra}
    return JSONResponse(body, status, media_type=PROBLEM_TYPE, headers={"Cache-Control": "no-store"})


async def as_problem(request: Request, error: Exception) -> Response:
    """Render an error of ours."""
    assert isinstance(error, AvatarServiceError)
    if error.status >= 500:
        log.error("%s %s: %s: %s", request.method, request.url.path, error.code, error, exc_info=error.__cause__)
    # A 5xx message may name paths and hosts, so only its title leaves the process.
    detail = str(error) if error.status < 500 else None
    return problem(request, error.status, error.code, error.title, detail, **error.extra)


async def _validation_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Never the input itself: FastAPI's own handler fails with 500 on the NaN that it quotes.
    errors = [{"field": ".".join(str(part) for part in e["loc"]), "message": e["msg"]} for e in error.errors()]
    detail = "; ".join(f"{e['field']}: {e['message']}" for e in errors)
    return problem(request, 422, "option-invalid", OptionInvalid.title, detail, errors=errors)


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    answer = problem(request, error.status_code, phrase.lower().replace(" ", "-"), phrase, None)
    answer.headers.update(error.headers or {})
    return answer


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


async def _unexpected(request: Request, error: Exception) -> Response:
    return problem(request, 500, AvatarServiceError.code, AvatarServiceError.title, None)


def install(app: FastAPI) -> None:
    """Make every error of the application a problem."""
    app.add_exception_handler(AvatarServiceError, as_problem)
    app.add_exception_handler(RequestValidationError, _validation_problem)
    app.add_exception_handler(HTTPException, _http_problem)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _unexpected)

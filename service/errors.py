"""The error tree, and how it leaves the process: RFC 9457 problem details.

Every class is one problem with a stable code; the same instance of the fault always has the same code and status.
"""

# ruff: noqa: N818 - what went wrong is the name; that it is an error shows where it is raised.

import logging
import math
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection

log = logging.getLogger(__name__)
PROBLEM_TYPE = "application/problem+json"
AVATAR_RETRY_S = 30.0
"""An avatar that cannot be served is looked at again at most this often."""


class AvatarServiceError(Exception):
    """Root of the tree.  `extra` members travel in the problem next to the standard ones, `headers` beside it."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "The service failed"

    def __init__(self, detail: str = "", headers: dict[str, str] | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.headers, self.extra = headers or {}, extra


class AvatarNotFound(AvatarServiceError):
    """No avatar of that name is served."""

    status, code, title = 404, "avatar-not-found", "No such avatar"


class LodNotFound(AvatarServiceError):
    """The avatar has no mesh of that level of detail."""

    status, code, title = 404, "lod-not-found", "No such level of detail"


class AvatarUnavailable(AvatarServiceError):
    """The avatar is there, but its bundle is damaged or its graph cannot be run."""

    status, code, title = 503, "avatar-unavailable", "The avatar cannot be served"

    def __init__(self, detail: str = "", retry_after_s: float = AVATAR_RETRY_S) -> None:
        super().__init__(detail, {"Retry-After": str(max(1, math.ceil(retry_after_s)))})


class NotReady(AvatarServiceError):
    """No avatar can be reposed at the moment."""

    status, code, title = 503, "not-ready", "The service is not ready"


class EngineFailed(AvatarServiceError):
    """The engine raised; nothing is known about why.  The session is checked, and rebuilt if need be."""

    status, code, title = 503, "engine-failed", "The avatar could not be reposed"


class OutOfMemory(EngineFailed):
    """The device has no memory left for a batch of this size."""

    code, title = "out-of-memory", "The device has no memory left"


class OutputInvalid(AvatarServiceError):
    """The engine's answer has the wrong shape or is not finite."""

    status, code, title = 500, "model-output-invalid", "The avatar's graph gave an invalid surface"


class Overloaded(AvatarServiceError):
    """More is waiting than can be computed in time, or there is no memory for one more avatar."""

    status, code, title = 503, "overloaded", "The service is busy"

    def __init__(self, detail: str = "", retry_after_s: float = 1.0) -> None:
        seconds = max(1, math.ceil(retry_after_s))
        super().__init__(detail, {"Retry-After": str(seconds)}, retry_after_s=seconds)


class Rebuilding(Overloaded):
    """A fault has spoilt the avatar's engine, and a new one is being made."""

    code, title = "engine-rebuilding", "The avatar's engine is being rebuilt"


class Draining(AvatarServiceError):
    """The process is about to end and takes no new work."""

    status, code, title = 503, "draining", "The service is shutting down"


class DeadlinePassed(AvatarServiceError):
    """The time that the client gave is over."""

    status, code, title = 504, "deadline", "Not computed within the time given"


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


class Unauthorized(AvatarServiceError):
    """No API key, or one that is not known."""

    status, code, title = 401, "unauthorized", "A valid API key is needed"

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail, {"WWW-Authenticate": 'Bearer realm="reposer"'})


class Forbidden(AvatarServiceError):
    """The API key is not for this plane."""

    status, code, title = 403, "forbidden", "The API key does not allow this"


class OriginRefused(AvatarServiceError):
    """A browser calls from a page that is not allowed to."""

    status, code, title = 403, "origin-refused", "Pages of this origin may not call"


class RateLimited(AvatarServiceError):
    """More requests in a short time than this key may send."""

    status, code, title = 429, "rate-limited", "Too many requests"


class HeadersTooLarge(AvatarServiceError):
    """More header lines or bytes than the service reads."""

    status, code, title = 431, "headers-too-large", "The request's headers are too large"


class TargetInvalid(AvatarServiceError):
    """The path or query is too long, or the path has letters that no path of ours has."""

    status, code, title = 404, "not-found", "Not Found"


class BodyBroken(AvatarServiceError):
    """The body is cut into crumbs, or not as long as was announced."""

    status, code, title = 400, "body-broken", "The body cannot be read"


class BodyTooSlow(AvatarServiceError):
    """No byte of the body came for a long time."""

    status, code, title = 408, "body-too-slow", "The body did not arrive in time"


class BundleInvalid(AvatarServiceError):
    """What was uploaded is not a bundle that may be served."""

    status, code, title = 422, "bundle-invalid", "The bundle is refused"


class UploadConflict(AvatarServiceError):
    """Another upload or deletion of the same avatar is at work."""

    status, code, title = 409, "upload-conflict", "The avatar is being changed"


class PreconditionFailed(AvatarServiceError):
    """The avatar is not at the version that If-Match or If-None-Match names."""

    status, code, title = 412, "precondition-failed", "The avatar is at another version"


class VersionNotFound(AvatarServiceError):
    """The version is not kept."""

    status, code, title = 404, "version-not-found", "No such version of the avatar"


class InsufficientStorage(AvatarServiceError):
    """The disk is full."""

    status, code, title = 507, "insufficient-storage", "There is no room on the disk"


class JobNotFound(AvatarServiceError):
    """There is no such job, or it was removed to make room, or its avatar was changed."""

    status, code, title = 404, "job-not-found", "No such job"


class JobNotFinished(AvatarServiceError):
    """The job has no result yet."""

    status, code, title = 409, "job-not-finished", "The job is not finished"


class JobFailed(AvatarServiceError):
    """The job has ended without a result."""

    status, code, title = 409, "job-failed", "The job has no result"


def problem(
    request: HTTPConnection, status: int, code: str, title: str, detail: str | None, **extra: Any
) -> JSONResponse:
    """Problem details (RFC 9457) as an answer that is never cached."""
    body = {"type": f"urn:reposer:problem:{code}", "title": title, "status": status}
    if detail:
        body["detail"] = detail
    body |= {"instance": request.url.path, "code": code, **extra}
    request.state.problem = code  # for the access log
    if request_id := request.scope.get("state", {}).get("request_id"):
        body["request_id"] = request_id
    return JSONResponse(body, status, media_type=PROBLEM_TYPE, headers={"Cache-Control": "no-store"})


async def as_problem(request: HTTPConnection, error: Exception) -> Response:
    """Render an error of ours."""
    assert isinstance(error, AvatarServiceError)
    if error.status >= 500:
        method, level = request.scope.get("method", "WebSocket"), logging.ERROR
        if isinstance(error, Overloaded | Draining | DeadlinePassed):
            # No fault of ours, and by the thousand when it comes: of HTTP the line in the access log says enough.
            enough = request.scope["type"] == "http" and error.__cause__ is None
            level = logging.DEBUG if enough else logging.INFO
        request.state.reason = str(error)  # for the access log
        log.log(level, "%s %s: %s: %s", method, request.url.path, error.code, error, exc_info=error.__cause__)
    # A 5xx message may name paths and hosts, so only its title leaves the process.
    detail = str(error) if error.status < 500 else None
    answer = problem(request, error.status, error.code, error.title, detail, **error.extra)
    answer.headers.update(error.headers)
    return answer


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

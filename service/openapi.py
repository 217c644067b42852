"""The description of the API: every error as the problem it is, with an example, and the key it needs."""

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from service.admission import PUBLIC
from service.errors import PROBLEM_TYPE, AvatarServiceError
from service.schemas import Problem

_EVERYWHERE = (400, 404, 415, 431, 500)
"""What the limits on all that arrives, and the unforeseen, may answer to any request."""
_WITH_KEY = (401, 403, 429, 503)
"""And what who calls, from where, how often, and while the service ends, may be answered."""
_WITH_BODY = (408, 413)
"""And what the limits answer to a body that comes too slowly, or is too long."""
_REF = {"$ref": "#/components/schemas/Problem"}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may answer with these statuses; the rest is filled in by `describe`."""
    return {status: {"model": Problem} for status in statuses}


def describe(app: FastAPI) -> None:
    """Make `app.openapi()` say of each operation which problems it answers with, and what they look like."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(generate())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi


def _complete(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Problem"] = Problem.model_json_schema()
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key, where the service has keys."}
    }
    components["responses"] = {
        f"Problem{status}": {
            "description": HTTPStatus(status).phrase,
            "content": {PROBLEM_TYPE: {"schema": _REF, "examples": examples}},
        }
        for status, examples in sorted(_examples().items())
    }
    for path, item in document["paths"].items():
        for operation in item.values():
            needs_key = not PUBLIC.fullmatch(path)
            if needs_key:
                operation["security"] = [{"key": []}, {}]
            responses = operation["responses"]
            wanted = _EVERYWHERE + (_WITH_KEY if needs_key else ())
            wanted += _WITH_BODY if "requestBody" in operation else ()
            for status in sorted({*wanted, *(int(s) for s in responses if s.isdecimal() and int(s) >= 400)}):
                responses[str(status)] = {"$ref": f"#/components/responses/Problem{status}"}
    # FastAPI's own form of a validation error, which nobody gets to see here.
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)


def _examples() -> dict[int, dict[str, Any]]:
    """By status and code, one of each class of the tree."""
    examples: dict[int, dict[str, Any]] = {}
    for error in _tree(AvatarServiceError):
        problem = {
            "type": f"urn:reposer:problem:{error.code}",
            "title": error.title,
            "status": error.status,
            "code": error.code,
            "instance": "/avatars/open",
            "request_id": "5a0f3e2c9b1d4c7e8f6a7b8c9d0e1f2a",
        }
        # A 5xx does not say more: its message may name paths and hosts.
        if error.status < 500 and error.__doc__:
            problem["detail"] = error.__doc__
        examples.setdefault(error.status, {})[error.code] = {"summary": error.title, "value": problem}
    return examples


def _tree(root: type[AvatarServiceError]) -> Iterator[type[AvatarServiceError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)

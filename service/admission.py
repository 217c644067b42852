"""The second thing a request meets: who calls, from where, and how often."""

import re

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import AvatarServiceError, RateLimited
from service.limits import refuse
from service.rates import RateLimiter
from service.security import ANONYMOUS, Guard, Plane

PUBLIC = re.compile(r"/(livez|readyz|startupz|v2/health/(live|ready)|openapi\.json|docs|redoc)?/?|/viewer(/.*)?")
"""Nothing of an avatar is in these: probes, the description of the API, and the viewer's own files."""
_READS = ("GET", "HEAD", "OPTIONS")


class Admission:
    """ASGI middleware: `request.state.principal` is who calls; everybody else is refused here."""

    def __init__(self, app: ASGIApp, guard: Guard, rates: RateLimiter, *, public_metrics: bool = False) -> None:
        self._app, self._guard, self._rates, self._public_metrics = app, guard, rates, public_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or self._is_public(scope):
            return await self._app(scope, receive, send)
        rate_headers: list[tuple[bytes, bytes]] = []

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *rate_headers]}
            await send(message)

        try:
            headers = HTTPConnection(scope).headers
            self._guard.check_origin(headers)
            principal = self._guard.principal(headers)
            caller = principal.name
            if principal is ANONYMOUS and scope.get("client"):
                caller = scope["client"][0]
            allowance = await self._rates.take_everywhere(caller)
            if allowance is not None:
                fields = self._rates.headers(allowance)
                if allowance.wait_s:
                    raise RateLimited("this key sends requests too fast", fields)
                rate_headers += [(name.lower().encode(), value.encode()) for name, value in fields.items()]
            if plane := plane_of(scope):
                principal.require(plane)
        except AvatarServiceError as error:
            return await refuse(scope, receive, send, error)
        scope.setdefault("state", {})["principal"] = principal
        return await self._app(scope, receive, answer)

    def _is_public(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] not in _READS:
            return False
        if scope["path"] == "/metrics":  # no other spelling: a proxy in front refuses this one
            return self._public_metrics
        return PUBLIC.fullmatch(scope["path"]) is not None


def plane_of(scope: Scope) -> Plane | None:
    """The plane a request needs; None for reading, which any key may."""
    if scope["type"] == "websocket":
        return "data"
    if scope["method"] in _READS:
        return None
    if scope["method"] in ("PUT", "DELETE", "PATCH"):
        # A job is its owner's to cancel; avatars are everybody's.
        return "data" if scope["path"].startswith("/jobs") else "admin"
    return "admin" if scope["path"].rstrip("/").endswith(("/load", "/unload")) else "data"

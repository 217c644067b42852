"""`POST /avatars/{id}/repose`: poses in, the clothed surface out."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from service.answers import FORMATS
from service.headers import ANSWER_HEADERS, KNOWN_HEADERS, REQUEST_HEADERS
from service.openapi import problems
from service.pose_values import ACCEPTED_WIDTHS, SHAPES
from service.reposing import JSON_TYPES, NPZ_TYPES, Reposing
from service.schemas import ReposeQuery

_BODY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["poses"],
    "additionalProperties": False,
    "properties": {
        "poses": {
            "type": "array",
            "items": {"type": "array"},
            "description": f"SMPL poses: (F, W), W one of {', '.join(map(str, ACCEPTED_WIDTHS))}, or (F, joints, 3), "
            "axis-angle in radians; or (F, joints, 3, 3), matrices; (F, joints, 4), quaternions, w first; (F, joints, "
            "6), the first two columns of matrices. Fingers and face are not used.",
        },
        "translations": {"type": "array", "items": {"type": "array"}, "description": "(F, 3); default zero."},
        "fps": {"type": "number", "default": 30},
        "up_axis": {"enum": ["y", "z"], "default": "y"},
        "units": {"enum": ["m", "cm"], "default": "m"},
        "rotation": {"enum": list(SHAPES)},
        "frame": {"enum": ["world", "camera"], "default": "world"},
    },
    "example": {"poses": [[0.0] * 72], "fps": 30},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST = {
    "required": True,
    "content": {kind: {"schema": _BODY_SCHEMA} for kind in JSON_TYPES} | dict.fromkeys(NPZ_TYPES, _BINARY),
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": dict.fromkeys(FORMATS, _BINARY),
        "description": "The reposed surface, in the accepted format",
        "headers": ANSWER_HEADERS,
    },
    304: {
        "description": "The answer you have, as If-None-Match names it, is the one you would get",
        "headers": KNOWN_HEADERS,
    },
    **problems(400, 404, 406, 413, 415, 422, 503, 504, 507),
}


def repose_routes(reposing: Reposing) -> APIRouter:
    """The one route that computes."""
    router = APIRouter(tags=["avatars"])

    @router.post(
        "/avatars/{avatar_id}/repose",
        operation_id="repose",
        response_class=Response,
        responses=_RESPONSES,
        openapi_extra={"requestBody": REQUEST, "parameters": REQUEST_HEADERS},
    )
    async def repose(avatar_id: str, query: Annotated[ReposeQuery, Query()], request: Request) -> Response:
        """Repose the avatar, frame after frame, with the vertices and faces of `GET /avatars/{id}/mesh`.

        The body is JSON, a `.smpl`, or an .npz in the layout of AMASS, CAPE or SMPL (`poses` or `pose`, `trans`,
        `transl` or `translations`, `mocap_framerate`, `mocap_frame_rate` or `fps`).  AMASS is z up: say `up_axis=z`.

        `Accept` chooses the answer.  `application/vnd.reposer.frames` streams each frame as soon as it is computed: 48
        bytes of header, then float32 x y z of each vertex; with `;codec=q16` or `;codec=q16d` half of that or less,
        exact to 0.02 mm (`service/frames.py` has the layout and a decoder).  `application/x-npz` has `vertices`
        (F, V, 3), `faces` and `fps`; `model/gltf-binary` is an animated mesh of at most 255 frames; there are
        others.  All are y up, in metres; the `Reposer-*` headers say what was applied to the input.
        """
        return await reposing.answer(avatar_id, query, request)

    return router

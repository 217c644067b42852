"""What the headers of a reposing request and of its answer mean, as the description of the API says it."""

from typing import Any

from service.reposing import MAX_TIMEOUT_S


def _parameter(name: str, text: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


def _headers(kind: str, required: bool = True, **texts: str) -> dict[str, dict[str, Any]]:
    """Of an answer; `required` are those that are always there.  The names are written with `_` for `-`."""
    return {
        name.replace("_", "-"): {"description": text, "required": required, "schema": {"type": kind}}
        for name, text in texts.items()
    }


REQUEST_HEADERS = [
    _parameter("If-None-Match", "ETags of answers you have: 304 if one of them is what you would get.", type="string"),
    _parameter(
        "Request-Timeout",
        "Seconds from the arrival of the request after which you do not want the answer: then 504.",
        type="number",
        exclusiveMinimum=0,
        maximum=MAX_TIMEOUT_S,
    ),
    _parameter(
        "X-Deadline-Ms",
        "The same in milliseconds. Of two times the shorter one counts.",
        type="number",
        exclusiveMinimum=0,
        maximum=1000 * MAX_TIMEOUT_S,
    ),
    _parameter("Cache-Control", "`no-store`: compute it anew and keep nothing of it.", type="string"),
]
"""Beside `Accept`, `Content-Type` and `Authorization`, which OpenAPI says in other ways."""
READ_HEADERS = {
    **_headers("integer", Reposer_Frames="Frames of the answer."),
    **_headers("number", Reposer_Fps="Frames a second of the answer."),
    **_headers(
        "string",
        Reposer_Up_Axis="Up axis that the posted poses were taken to have: `y` or `z`.",
        Reposer_Units="Units that the posted translations were taken to have: `m` or `cm`.",
    ),
}
"""What was applied to poses that are read."""
APPLIED_HEADERS = {
    **READ_HEADERS,
    **_headers(
        "string",
        Reposer_Avatar="Name of the avatar.",
        Reposer_Bundle="Digest of the avatar's bundle: its version.",
        Reposer_Lod="Level of detail of the mesh.",
        Reposer_Rotation="What the posted poses were taken to hold: `axis_angle`, `matrix`, `quat_wxyz` or `6d`.",
        Reposer_Frame="Frame that the posted poses were taken to be in: `world` or `camera`.",
        Reposer_Device="Where this avatar is computed: `cuda` or `cpu`.",
        Content_Disposition="A name for the file.",
    ),
    **_headers("integer", Reposer_Vertices="Vertices of each frame."),
    **_headers("number", required=False, Reposer_Posted_Fps="Frames a second as posted, where the answer has others."),
    **_headers("string", required=False, Warning="299: what of the input was left out or repaired, one text for each."),
}
"""What was applied to poses that are reposed."""
KNOWN_HEADERS = {
    **APPLIED_HEADERS,
    **_headers(
        "string",
        ETag="Of this answer, for `If-None-Match`: the same for the same poses in another file.",
        Vary="`Accept`.",
    ),
}
"""Of every answer to poses that were understood."""
ANSWER_HEADERS = {
    **KNOWN_HEADERS,
    **_headers(
        "string",
        X_Cache="`hit`: nothing was computed; `miss`: it was not kept here; `bypass`: you asked for `no-store`.",
        Server_Timing="Milliseconds of `parse`, `cache`, `queue`, `infer` and `encode`, until the first byte left.",
    ),
    **_headers("string", required=False, Cache_Control="`no-store`, where you asked for it."),
    **_headers("integer", required=False, Content_Length="Bytes of the answer, where that is known before its end."),
}

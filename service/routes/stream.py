"""`WS /avatars/{id}/stream`: poses in, frames out, over one WebSocket (`docs/protocol.md`)."""

from fastapi import APIRouter, WebSocket

from service.streaming.streams import Streams


def stream_routes(streams: Streams) -> APIRouter:
    """The one WebSocket of the service."""
    router = APIRouter()

    @router.websocket("/avatars/{avatar_id}/stream")
    async def stream(websocket: WebSocket, avatar_id: str) -> None:
        await streams.serve(websocket, avatar_id)

    return router

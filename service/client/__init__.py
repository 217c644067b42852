"""The Python client: `Client` and `AsyncClient`.  Needs httpx, websockets, zstandard and numpy."""

from service.client.aio import AsyncClient
from service.client.aio_stream import AsyncStream
from service.client.errors import AvatarChanged, ClientError, ConnectionLost, PoseRefused, Refused, StreamClosed
from service.client.sync import Client
from service.client.sync_stream import Stream
from service.frames import Frame

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "AvatarChanged",
    "Client",
    "ClientError",
    "ConnectionLost",
    "Frame",
    "PoseRefused",
    "Refused",
    "Stream",
    "StreamClosed",
]

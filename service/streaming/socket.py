"""uvicorn's WebSocket, made fit for clients that stop reading.

As it comes (uvicorn 0.54), a close waits for ever behind what the client does not read, and a connection whose
application has ended stays until its buffer is empty.
"""

import socket
from asyncio import BaseTransport
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

NOTSENT_BYTES = 128 << 10
"""What the kernel may hold of a stream: by default it swallows half a second of frames that get stale there."""
LINGER_S = 5.0
"""What is left in the buffer when a stream has ended has this long to leave."""


class StreamSocket(WebSocketsSansIOProtocol):
    """`uvicorn.run(ws=StreamSocket)`."""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_BYTES)

    async def send(self, message: Any) -> None:
        if message["type"] == "websocket.close":
            self.writable.set()  # a few bytes that should not wait for what the client does not read
        await super().send(message)

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(LINGER_S, self.transport.abort)

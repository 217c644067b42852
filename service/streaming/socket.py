"""uvicorn's WebSocket, made fit for clients that stop reading.

As it comes (uvicorn 0.54), a close waits for ever behind what the client does not read, and a connection whose
application has ended stays until its buffer is empty.
"""

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

LINGER_S = 5.0
"""What is left in the buffer when a stream has ended has this long to leave."""


class StreamSocket(WebSocketsSansIOProtocol):
    """`uvicorn.run(ws=StreamSocket)`."""

    async def send(self, message: Any) -> None:
        if message["type"] == "websocket.close":
            self.writable.set()  # a few bytes that should not wait for what the client does not read
        await super().send(message)

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self.loop.call_later(LINGER_S, self.transport.abort)

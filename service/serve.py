"""The server process, from its socket to its exit status.

It ends with 0 after SIGTERM or Ctrl-C, and with 70 if the engine failed and did not come back, so that whoever watches
over the process starts a new one.  Either way it drains first, and is gone within a limit whatever a client does.
"""

import asyncio
import fcntl
import gc
import logging
import os
import socket
import sys
import termios
import threading
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from pythonjsonlogger.json import JsonFormatter
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.app import create_app
from service.lifecycle import background
from service.limits import request_id
from service.scheduling import ask_for_short_slices
from service.settings import Settings
from service.streaming.session import Limits
from service.streaming.socket import StreamSocket
from service.tracing import add_trace

log = logging.getLogger(__name__)
ENGINE_FAILED = 70
CLOSE_S = 1
"""For closing connections after draining; then they are cut off."""
HARD_STOP_S = 5.0
"""For all the rest.  Only a thread that hangs lets it come to this."""


def serve(settings: Settings, host: str, port: int) -> int:
    """Serve until told to stop; returns the exit status."""
    set_up_logging()
    if not ask_for_short_slices():  # before there are other threads, which then have them too
        log.info("there are no short slices here: answers come later while all cores compute")
    app = create_app(settings)
    # What is there now stays: looking through it for garbage would stop the stream for 0.05 s now and then.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        # Of what is installed, uvicorn would take whatever is fastest; this is what the tests know.
        loop="asyncio",
        http=partial(HttpProtocol, send_idle_s=settings.send_idle_s),  # type: ignore[arg-type] - a class or as good as one
        # A client that does not read would otherwise keep the process from ending (uvicorn 0.54).
        timeout_graceful_shutdown=CLOSE_S,
        ws=StreamSocket,
        ws_max_size=Limits.message_bytes,
        ws_max_queue=8,
        # It gains 8 % on vertices and costs more time than computing them.
        ws_per_message_deflate=False,
        server_header=False,
        access_log=False,
        log_config=None,
    )
    listening = config.bind_socket()
    # asyncio asks for it only where a socket says that it is TCP, and uvicorn's do not say.  Without, the end of a
    # frame waits until the client's kernel has acknowledged what came before, for up to 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = _Server(config, app, settings.drain_grace_s)
    server.run(sockets=[listening])
    return server.exit_status


class HttpProtocol(H11Protocol):
    """uvicorn's own, but for what sends, and for clients that do not read: uvicorn waits for them for ever."""

    def __init__(self, *args: Any, send_idle_s: float = 30.0, **kwargs: Any) -> None:
        """`send_idle_s`: a client that takes no byte of what there is for it for so long is cut off."""
        super().__init__(*args, **kwargs)
        self.conn = Connection(h11.SERVER)
        self._send_idle_s, self._left_bytes = send_idle_s, 0
        self._look: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """There is more for the client than it takes."""
        super().pause_writing()
        self._look_later(self._bytes_left())

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        self._look_no_more()

    def data_received(self, data: bytes) -> None:
        """It asks for more, so what is left grows again; unless it is waited for, and nothing is written."""
        if not self.flow.write_paused:
            self._look_no_more()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """All of an answer is written; a last bit of it may still be here."""
        super().on_response_complete()
        # Unless what the client had sent already has begun another answer, or a stream.
        ended = self.cycle is None or self.cycle.response_complete
        if ended and self.transport.get_protocol() is self and self.transport.get_write_buffer_size():
            self._look_later(self._bytes_left())

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """From here on, the connection is another protocol's."""
        self._look_no_more()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone, or was cut off."""
        self._look_no_more()
        super().connection_lost(exc)

    def _look_later(self, left_bytes: int) -> None:
        self._look_no_more()
        self._left_bytes = left_bytes
        self._look = self.loop.call_later(self._send_idle_s, self._look_again)

    def _look_no_more(self) -> None:
        if self._look is not None:
            self._look.cancel()

    def _look_again(self) -> None:
        left_bytes = self._bytes_left()
        if 0 < left_bytes < self._left_bytes:
            self._look_later(left_bytes)
        elif left_bytes:
            log.info("a client that takes nothing is cut off")
            self.transport.abort()

    def _bytes_left(self) -> int:
        """What the client has not acknowledged: what lies here, and, where the kernel tells, in its buffers.  Those
        of megabytes; for a slow client, what lies here stays as it is for minutes."""
        left = self.transport.get_write_buffer_size()
        if sys.platform == "linux":
            with suppress(OSError, ValueError):
                unsent = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
                left += int.from_bytes(unsent, sys.byteorder)
        return left


class Connection(h11.Connection):
    """Hands on each piece of a body as it is.  h11's own copies it, unless it is `bytes`: a fifth of the time that a
    cached answer takes."""

    def send(self, event: Any) -> Any:
        """What is to be sent for `event`: `bytes`, or the very data of it."""
        parts = self.send_with_data_passthrough(event)
        if parts is None:
            return None
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Server(uvicorn.Server):
    """Drains before it closes.  uvicorn's own closes every connection at once, and ends with the signal's status."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace_s: float) -> None:
        super().__init__(config)
        self._lifecycle, self._gave_up = app.state.lifecycle, app.state.room.gave_up
        self._grace_s = grace_s
        self._told_to_stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.exit_status = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one stops at once."""
        if self._lifecycle.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._lifecycle.draining = True
        self._loop.call_soon_threadsafe(self._told_to_stop.set)

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with background(self._drain_on(self._told_to_stop, 0), self._drain_on(self._gave_up, ENGINE_FAILED)):
            await super().main_loop()

    async def _drain_on(self, event: asyncio.Event, exit_status: int) -> None:
        await event.wait()
        self.exit_status = exit_status
        stop = threading.Timer(self._grace_s + CLOSE_S + HARD_STOP_S, _stop_hard, [exit_status])
        stop.daemon = True
        stop.start()
        await self._lifecycle.drain(self._grace_s)
        self.should_exit = True


def _stop_hard(exit_status: int) -> None:
    log.critical("a thread hangs: the process ends without it")
    logging.shutdown()
    os._exit(exit_status)


def set_up_logging() -> None:
    """To a terminal in words; elsewhere one JSON object a line, with the id of the request."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_request_id)
    handler.addFilter(add_trace)
    if sys.stderr.isatty():
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    else:
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        fields = "%(asctime)s %(levelname)s %(name)s %(message)s %(request_id)s"
        handler.setFormatter(JsonFormatter(fields, rename_fields=names))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True

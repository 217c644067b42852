"""What Prometheus sees: how long frames wait, are computed, encoded and sent, and what was refused or dropped.

No avatar and nothing else that a client chooses is a label: the number of series is fixed.
"""

import asyncio
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
FRAMES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LAG_INTERVAL_S = 0.1


class Metrics:
    """The figures of one application; each has a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"reposer_{name}_seconds", text, registry=registry, buckets=SECONDS)

        self.queue_seconds = seconds("queue", "Time a piece of work waited for the engine.")
        self.infer_seconds = seconds("infer", "Time of a batch in the engine.")
        self.encode_seconds = seconds("encode", "Time to encode a piece of an answer.")
        self.send_seconds = seconds("send", "Time until the socket took a piece of an answer.")
        self.http_seconds = Histogram(
            "reposer_http_seconds",
            "Time from the head of a request to the end of its answer, by status; 499: the client had gone.",
            ["status"],
            registry=registry,
            buckets=SECONDS,
        )
        self.loop_lag_seconds = seconds("loop_lag", "Time by which the event loop was late.")
        self.batch_frames = Histogram(
            "reposer_batch_frames", "Frames in a batch.", ["line"], registry=registry, buckets=FRAMES
        )
        self.batch_pieces = Histogram(
            "reposer_batch_pieces", "Pieces of work merged into a batch.", registry=registry, buckets=FRAMES
        )
        self.frames = Counter("reposer_frames", "Frames computed.", ["line"], registry=registry)
        self.failures = Counter("reposer_failures", "Work that was not done, by reason.", ["reason"], registry=registry)
        self.frames_dropped = Counter(
            "reposer_frames_dropped", "Poses of live streams overtaken by newer ones.", registry=registry
        )
        self.cache = Counter("reposer_cache", "Looks into the cache.", ["result"], registry=registry)
        self.streams = Gauge("reposer_streams", "Open streams.", registry=registry)
        self.requests_in_flight = Gauge(
            "reposer_requests_in_flight", "Requests that are being answered.", registry=registry
        )
        self.avatars_loaded = Gauge("reposer_avatars_loaded", "Avatars in memory.", registry=registry)
        self.avatar_bytes = Gauge("reposer_avatar_bytes", "Estimated bytes of avatars in memory.", registry=registry)
        self.gpu_memory_bytes = Gauge("reposer_gpu_memory_bytes", "Memory in use.", ["gpu"], registry=registry)
        self.stream_ends = Counter(
            "reposer_stream_ends", "Streams ended, by the code of the close.", ["code"], registry=registry
        )

    async def watch_loop(self) -> None:
        """See how late the event loop comes to what it has to do.  Never returns."""
        while True:
            due = time.monotonic() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.loop_lag_seconds.observe(max(0.0, time.monotonic() - due))

    def computed(self, live: bool, frames: int, pieces: int, seconds: float) -> None:
        """A batch was computed."""
        line = "live" if live else "bulk"
        self.infer_seconds.observe(seconds)
        self.batch_frames.labels(line).observe(frames)
        self.batch_pieces.observe(pieces)
        self.frames.labels(line).inc(frames)

    def refused(self, reason: str) -> None:
        """A piece of work was not done; `reason` is the code of a problem of ours."""
        self.failures.labels(reason).inc()

/** The stream of one avatar, and how well it runs. */
import type { AvatarStream, Frame, Reposer, StreamHandlers } from "reposer-client";

export interface Asked {
  pose: Float32Array;
  translation: Float32Array;
}

/** Rate, delay and loss as the user sees them. */
export class Meter {
  #frames: { at: number; delay: number }[] = [];
  #lastSeq: number | undefined;
  dropped = 0;

  /** A new connection counts anew. */
  connected(): void {
    this.#lastSeq = undefined;
  }

  frame(seq: number, sentMs: number): void {
    const at = performance.now();
    this.#frames.push({ at, delay: at - sentMs });
    // Poses are numbered without gaps: a gap between frames is what was dropped.
    if (this.#lastSeq !== undefined) this.dropped += seq - this.#lastSeq - 1;
    this.#lastSeq = seq;
  }

  /** Frames in the last second, and the median of their delays in milliseconds. */
  read(): { rate: number; delayMs: number | undefined } {
    const since = performance.now() - 1000;
    this.#frames = this.#frames.filter(({ at }) => at > since);
    const delays = this.#frames.map(({ delay }) => delay).sort((a, b) => a - b);
    return { rate: delays.length, delayMs: delays[delays.length >> 1] };
  }
}

export class Live {
  readonly meter = new Meter();
  readonly #stream: AvatarStream;
  readonly #asked = new Map<number, Asked>();

  /** @param onFrame called with the pose that the frame is of. */
  constructor(
    reposer: Reposer,
    avatar: string,
    lod: string,
    handlers: Omit<StreamHandlers, "onFrame">,
    onFrame: (frame: Frame, asked: Asked) => void,
  ) {
    this.#stream = reposer.stream(
      { avatar, lod, mode: "live" },
      {
        ...handlers,
        onHello: (hello) => {
          this.meter.connected();
          handlers.onHello?.(hello);
        },
        onFrame: (frame) => {
          this.meter.frame(frame.seq, Number(frame.clientUs) / 1000);
          const asked = this.#asked.get(frame.seq);
          for (const seq of this.#asked.keys()) if (seq <= frame.seq) this.#asked.delete(seq);
          if (asked) onFrame(frame, asked);
        },
      },
    );
  }

  get open(): boolean {
    return this.#stream.state === "open";
  }

  ask(asked: Asked): void {
    if (this.#stream.state === "closed") return;
    this.#asked.set(this.#stream.send(asked.pose, asked.translation), asked);
    // Without a connection only the newest pose is kept.
    if (!this.open) for (const seq of [...this.#asked.keys()].slice(0, -1)) this.#asked.delete(seq);
  }

  retry(): void {
    this.#stream.retry();
  }

  close(): void {
    this.#stream.close();
  }
}

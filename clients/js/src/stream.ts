/**
 * A live stream: poses in, frames out, over one WebSocket that is opened again when it breaks.
 * `docs/protocol.md` is what both ends keep to.
 */
import { FrameDecoder, type Codec, type Frame } from "./frames.js";
import { poseMessage, type Rotation } from "./poses.js";
import { Problem } from "./problem.js";

export interface StreamOptions {
  avatar: string;
  lod?: string;
  /** `live`: the newest pose wins.  `complete`: every pose gets its frame, in order. */
  mode?: "live" | "complete";
  /** What may be sent, best first. */
  codecs?: Codec[];
  /** Frames that may be on their way unacknowledged. */
  window?: number;
  maxFps?: number;
  upAxis?: "y" | "z";
  units?: "m" | "cm";
  /** `camera`: y down and z away, as estimators have it.  Not together with `upAxis: "z"`. */
  frame?: "world" | "camera";
  /** What each row of `send` holds; default axis-angle. */
  rotation?: Rotation;
  /** Take the nearest rotation where the numbers of a pose are none, instead of refusing it. */
  normalize?: boolean;
  key?: string;
  /** Default: the global one; node before 22 needs that of the package `ws`. */
  WebSocket?: new (url: string, protocols: string[]) => WebSocket;
}

export interface Hello {
  avatar: string;
  bundle: string;
  resumed: boolean;
  lod: string;
  vertices: number;
  codec: Codec;
  max_fps: number;
  window: number;
  credits: number;
  heartbeat_s: number;
  silence_s: number;
}

export interface StreamStats {
  poses: number;
  frames: number;
  dropped: number;
  refused: number;
}

/** `waiting`: not connected, trying again; `closed`: over, by us or for a reason that trying again does not mend. */
export type StreamState = "connecting" | "open" | "waiting" | "closed";

export interface StreamHandlers {
  /** One frame.  It is acknowledged when this returns, or when the promise that this returns is fulfilled. */
  onFrame(frame: Frame): void | Promise<void>;
  /** After every connection, before its first frame. */
  onHello?(hello: Hello): void;
  /** `retryInS` where the state is `waiting`; `problem` where the service said why. */
  onState?(state: StreamState, why: { retryInS?: number; problem?: Problem; code?: number }): void;
  /** A pose was refused; the stream goes on. */
  onProblem?(problem: Problem, seq?: number): void;
  onStats?(stats: StreamStats): void;
}

interface Pose {
  seq: number;
  message: ArrayBuffer | string;
}

const FIRST_DELAY_S = 0.25;
const LONGEST_DELAY_S = 8;
const FINAL_CODES = new Set([1000, 1003, 1007, 1009, 4400, 4401, 4402, 4403, 4404, 4422]);
const RESTARTING = 1012;
const OPEN = 1; // WebSocket.OPEN, which node lacks

export class AvatarStream {
  readonly #base: URL;
  readonly #options: StreamOptions;
  readonly #handlers: StreamHandlers;
  #socket: WebSocket | undefined;
  #state: StreamState = "connecting";
  #hello: Hello | undefined;
  /** Poses without an answer, oldest first; in live mode the newest only. */
  #pending: Pose[] = [];
  /** How many of them this connection has been given. */
  #given = 0;
  #seq = 0;
  #lastFrame: number | undefined;
  #attempts = 0;
  #heard = 0;
  #ending = false;
  #endSent = false;
  #retryTimer: ReturnType<typeof setTimeout> | undefined;
  #pingTimer: ReturnType<typeof setInterval> | undefined;

  /** Connects at once. @param base address of the service, http or https. */
  constructor(base: string | URL, options: StreamOptions, handlers: StreamHandlers) {
    this.#base = new URL(base);
    if (!this.#base.pathname.endsWith("/")) this.#base.pathname += "/";
    this.#options = options;
    this.#handlers = handlers;
    this.#connect();
  }

  get state(): StreamState {
    return this.#state;
  }

  /** Poses sent or to be sent that have no answer yet. */
  get unanswered(): number {
    return this.#pending.length;
  }

  /**
   * Ask for the frame of a pose.  Without a connection, it is sent when there is one.
   * @param pose 72 numbers, axis-angle of the 24 SMPL joints, radians; or any row of `poseMessage`, in the `rotation`
   *   of the stream.
   * @param translation of the root, in the units of the stream.
   * @returns the `seq` of its frame.
   */
  send(pose: ArrayLike<number>, translation: ArrayLike<number> = [0, 0, 0]): number {
    if (this.#ending || this.#state === "closed") throw new Error("the stream has ended");
    const seq = this.#seq++;
    const clientUs = BigInt(Math.round(performance.now() * 1000));
    const message = poseMessage(seq, pose, translation, clientUs, this.#options.rotation);
    if (this.#options.mode !== "complete") {
      this.#pending = [];
      this.#given = 0;
    }
    this.#pending.push({ seq, message });
    this.#give();
    return seq;
  }

  /** No more poses: the service answers what it owes, and the stream closes. */
  end(): void {
    this.#ending = true;
    this.#give();
  }

  /** Close at once. */
  close(): void {
    this.#stop("closed", {});
    this.#socket?.close(1000);
  }

  /** Try again now, where the stream waits. */
  retry(): void {
    if (this.#state === "waiting") this.#connect();
  }

  #connect(): void {
    clearTimeout(this.#retryTimer);
    this.#to("connecting", {});
    const { avatar, codecs = ["q16", "f32"], key } = this.#options;
    const url = new URL(`avatars/${encodeURIComponent(avatar)}/stream`, this.#base);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const { lod, mode, window, maxFps, upAxis, units, frame, rotation, normalize } = this.#options;
    const meant = { up_axis: upAxis, units, frame, rotation, normalize };
    const query: Record<string, unknown> = { lod, mode, window, max_fps: maxFps, ...meant };
    if (this.#hello && this.#lastFrame !== undefined) {
      Object.assign(query, { last_seq: this.#lastFrame, bundle: this.#hello.bundle });
    }
    for (const [name, value] of Object.entries(query)) {
      if (value !== undefined) url.searchParams.set(name, String(value));
    }
    const protocols = codecs.map((codec) => `reposer.v1.${codec}`);
    if (key !== undefined) protocols.push(`bearer.${base64url(key)}`);
    const socket = new (this.#options.WebSocket ?? WebSocket)(url.href, protocols);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    const decoder = new FrameDecoder();
    let greeted = false;
    this.#given = 0;
    this.#endSent = false;
    socket.onmessage = ({ data }) => {
      if (socket !== this.#socket) return;
      this.#heard = performance.now();
      if (typeof data === "string") {
        const message = JSON.parse(data);
        if (message.type === "hello") greeted = true;
        this.#text(socket, message);
        return;
      }
      let frame: Frame;
      try {
        frame = decoder.decode(data as ArrayBuffer);
      } catch (error) {
        this.#handlers.onProblem?.(new Problem(0, "frame-damaged", "A frame cannot be read", String(error)));
        socket.close();
        return;
      }
      this.#frame(socket, frame);
    };
    // Says nothing that the close after it does not; node's WebSocket throws what nobody listens to.
    socket.onerror = () => {};
    socket.onclose = ({ code }) => {
      if (socket === this.#socket) void this.#lost(code, greeted);
    };
  }

  #text(socket: WebSocket, message: any): void {
    switch (message.type) {
      case "hello":
        this.#hello = message as Hello;
        this.#attempts = 0;
        this.#to("open", {});
        this.#handlers.onHello?.(message);
        this.#pingTimer = setInterval(() => this.#heartbeat(socket, message), 1000 * message.heartbeat_s);
        this.#give();
        break;
      case "ping":
        socket.send(JSON.stringify({ type: "pong", t: message.t }));
        break;
      case "pong":
      case "end":
        this.#handlers.onStats?.(message.stats);
        break;
      case "error":
        if (message.seq !== undefined) this.#answered(message.seq);
        this.#handlers.onProblem?.(
          new Problem(message.status, message.code, message.title, message.detail),
          message.seq,
        );
        break;
    }
  }

  #frame(socket: WebSocket, frame: Frame): void {
    this.#lastFrame = frame.seq;
    const acknowledge = () => {
      if (socket.readyState === OPEN) socket.send(JSON.stringify({ type: "ack", seq: frame.seq }));
    };
    const used = this.#handlers.onFrame(frame);
    if (used) void used.then(acknowledge);
    else acknowledge();
    this.#answered(frame.seq);
  }

  /** Frames come in order, so what is older than an answered pose needs no answer any more. */
  #answered(seq: number): void {
    const left = this.#pending.findIndex((pose) => pose.seq > seq);
    const done = left < 0 ? this.#pending.length : left;
    this.#pending.splice(0, done);
    this.#given = Math.max(0, this.#given - done);
    this.#give();
  }

  #give(): void {
    const socket = this.#socket;
    if (this.#state !== "open" || !socket || socket.readyState !== OPEN) return;
    const most = this.#options.mode === "complete" ? this.#hello!.credits : 1;
    while (this.#given < Math.min(most, this.#pending.length)) socket.send(this.#pending[this.#given++].message);
    if (this.#ending && !this.#endSent && this.#given === this.#pending.length) {
      socket.send(JSON.stringify({ type: "end" }));
      this.#endSent = true;
    }
  }

  /** A dead peer is seen by its silence: browsers hide the WebSocket's own pings. */
  #heartbeat(socket: WebSocket, hello: Hello): void {
    if (performance.now() - this.#heard > 1000 * hello.silence_s) {
      void this.#lost(1006, true);
      socket.close();
    } else {
      socket.send(JSON.stringify({ type: "ping", t: Math.round(performance.now() * 1000) }));
    }
  }

  async #lost(code: number, greeted: boolean): Promise<void> {
    clearInterval(this.#pingTimer);
    this.#socket = undefined;
    if (this.#state === "closed") return;
    if (FINAL_CODES.has(code)) return this.#stop("closed", { code });
    // A WebSocket that was refused does not say why; the avatar's page does.
    const problem = greeted ? undefined : await this.#reason();
    if (this.state === "closed") return; // meanwhile, by `close`
    if (problem && problem.status < 500 && problem.status !== 429) return this.#stop("closed", { code, problem });
    const atOnce = code === RESTARTING && this.#attempts === 0;
    const backoffS = atOnce ? 0 : Math.min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** this.#attempts);
    const retryInS = Math.max(backoffS * (0.5 + 0.5 * Math.random()), problem?.retryAfterS ?? 0);
    this.#attempts++;
    this.#to("waiting", { code, problem, retryInS });
    this.#retryTimer = setTimeout(() => this.#connect(), 1000 * retryInS);
  }

  async #reason(): Promise<Problem | undefined> {
    const { avatar, key } = this.#options;
    try {
      const headers: HeadersInit = key === undefined ? {} : { Authorization: `Bearer ${key}` };
      const answer = await fetch(new URL(`avatars/${encodeURIComponent(avatar)}`, this.#base), { headers });
      return answer.ok ? undefined : await Problem.from(answer);
    } catch {
      return undefined; // not there at all
    }
  }

  #stop(state: "closed", why: { code?: number; problem?: Problem }): void {
    clearTimeout(this.#retryTimer);
    clearInterval(this.#pingTimer);
    this.#pending = [];
    this.#to(state, why);
  }

  #to(state: StreamState, why: { retryInS?: number; problem?: Problem; code?: number }): void {
    this.#state = state;
    this.#handlers.onState?.(state, why);
  }
}

function base64url(text: string): string {
  const bytes = String.fromCharCode(...new TextEncoder().encode(text));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

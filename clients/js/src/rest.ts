/** The REST half of the service. */
import { decodeStream, type Codec, type Frame } from "./frames.js";
import type { Rotation } from "./poses.js";
import { Problem } from "./problem.js";
import { AvatarStream, type StreamHandlers, type StreamOptions } from "./stream.js";

export interface LevelOfDetail {
  vertices: number;
  faces: number;
}

export interface AvatarSummary {
  id: string;
  /** `ready` can be posed; other words say why not. */
  status: string;
  /** `cuda` or `cpu`; null where it is not known. */
  device: string | null;
  levels_of_detail: Record<string, LevelOfDetail>;
}

export interface AvatarDetail extends AvatarSummary {
  bundle_digest: string;
  joint_names: string[];
  parents: number[];
  /** Joints of the T-pose, metres. */
  rest_joints: number[][];
  /** Axis-angle of the pose the canonical mesh is in, radians. */
  canonical_pose: number[][];
}

/** Poses as JSON; units, axes and rotation as in the REST API. */
export interface PoseSequence {
  poses: number[][] | number[][][] | number[][][][];
  translations?: number[][];
  fps?: number;
  up_axis?: "y" | "z";
  units?: "m" | "cm";
  rotation?: Rotation;
  frame?: "world" | "camera";
}

export interface ReposeOptions {
  lod?: string;
  /** Of the posted poses; AMASS has z. */
  upAxis?: "y" | "z";
  units?: "m" | "cm";
  /** `camera`: the posted poses have y down and z away, as estimators do. */
  frame?: "world" | "camera";
  /** What the poses hold; needed where their shape does not say it. */
  rotation?: Rotation;
  /** Take the nearest rotation where a matrix, quaternion or 6d is none, instead of refusing it. */
  normalize?: boolean;
  /** Frames a second of the posted poses. */
  fps?: number;
  /** Resample to this rate; not together with `every`. */
  targetFps?: number;
  /** Use each n-th frame only. */
  every?: number;
  signal?: AbortSignal;
}

export interface ReposerOptions {
  /** API key, where the service asks for one. */
  key?: string;
  /** Default: the global one. */
  fetch?: typeof fetch;
}

export class Reposer {
  readonly base: URL;
  readonly #key: string | undefined;
  readonly #fetch: typeof fetch;

  /** @param base address of the service, such as `http://127.0.0.1:8000`. */
  constructor(base: string | URL, options: ReposerOptions = {}) {
    this.base = new URL(base);
    if (!this.base.pathname.endsWith("/")) this.base.pathname += "/";
    this.#key = options.key;
    this.#fetch = options.fetch ?? fetch.bind(globalThis);
  }

  async avatars(): Promise<AvatarSummary[]> {
    return (await (await this.request("avatars")).json()).avatars;
  }

  async avatar(id: string): Promise<AvatarDetail> {
    return (await this.request(`avatars/${encodeURIComponent(id)}`)).json();
  }

  /** The canonical mesh as .glb: its vertices and faces are those of every frame. */
  async mesh(id: string, lod = "standard"): Promise<ArrayBuffer> {
    const path = `avatars/${encodeURIComponent(id)}/mesh?lod=${encodeURIComponent(lod)}`;
    return (await this.request(path)).arrayBuffer();
  }

  /**
   * Repose a whole sequence; the answer has the format of `accept`.
   * @param poses a sequence, or the bytes of an .npz.
   * @throws Problem where the service refuses.
   */
  async repose(
    id: string,
    poses: PoseSequence | Blob | ArrayBuffer | Uint8Array<ArrayBuffer>,
    accept: string,
    options: ReposeOptions = {},
  ): Promise<Response> {
    const { signal, upAxis, targetFps, ...rest } = options;
    const query = search({ ...rest, up_axis: upAxis, target_fps: targetFps });
    const binary = poses instanceof Blob || poses instanceof ArrayBuffer || poses instanceof Uint8Array;
    return this.request(`avatars/${encodeURIComponent(id)}/repose?${query}`, {
      method: "POST",
      headers: { Accept: accept, "Content-Type": binary ? "application/x-npz" : "application/json" },
      body: binary ? poses : JSON.stringify(poses),
      signal,
    });
  }

  /** Repose a whole sequence, frame after frame as they are computed. */
  async *frames(
    id: string,
    poses: Parameters<Reposer["repose"]>[1],
    options: ReposeOptions & { codec?: Codec } = {},
  ): AsyncGenerator<Frame> {
    const { codec = "q16", ...rest } = options;
    const answer = await this.repose(id, poses, `application/vnd.reposer.frames; codec=${codec}`, rest);
    if (answer.body) yield* decodeStream(chunks(answer.body));
  }

  /** Open a stream: poses in, frames out, one at a time. */
  stream(options: Omit<StreamOptions, "key">, handlers: StreamHandlers): AvatarStream {
    return new AvatarStream(this.base, { ...options, key: this.#key }, handlers);
  }

  /**
   * Any request below the base address, with the key.
   * @throws Problem for every answer that is not 2xx.
   */
  async request(path: string, init: RequestInit = {}): Promise<Response> {
    const headers = new Headers(init.headers);
    if (this.#key !== undefined) headers.set("Authorization", `Bearer ${this.#key}`);
    const answer = await this.#fetch(new URL(path, this.base), { ...init, headers });
    if (!answer.ok) throw await Problem.from(answer);
    return answer;
  }
}

function search(query: object): URLSearchParams {
  const said = Object.entries(query).filter(([, value]) => value !== undefined);
  return new URLSearchParams(said.map(([name, value]) => [name, String(value)]));
}

// Safari's ReadableStream cannot be iterated.
async function* chunks(body: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array> {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel();
  }
}

/** Motions, and the clock that plays them. */
import { Problem, type Reposer } from "reposer-client";

/** A pose sequence in the one form used here: axis-angle, y up, metres. */
export interface Motion {
  name: string;
  fps: number;
  /** F x 72. */
  poses: Float32Array;
  /** F x 3. */
  translations: Float32Array;
  frames: number;
  /** What the service applied to the file, in words. */
  applied: string;
}

const TYPES: Record<string, string> = {
  json: "application/json",
  npz: "application/x-npz",
  npy: "application/x-npy",
  smpl: "application/x-npz", // which a .smpl file is
};

/**
 * A motion from the bytes of a pose file, read by the service: the page and the API understand the same files.
 * @throws Problem where the service refuses it.
 */
export async function readMotion(reposer: Reposer, avatar: string, name: string, file: Blob, upAxis: string): Promise<Motion> {
  const type = TYPES[name.split(".").at(-1)!.toLowerCase()];
  if (!type) throw new Problem(415, "unsupported-media-type", `${name} is no .npz, .npy, .json or .smpl file`);
  const query = upAxis ? `?up_axis=${upAxis}` : "";
  const answer = await reposer.request(`avatars/${encodeURIComponent(avatar)}/poses${query}`, {
    method: "POST",
    headers: { "Content-Type": type },
    body: file,
  });
  const said = (header: string) => answer.headers.get(`Reposer-${header}`) ?? "";
  // Rows of 75 float32: 72 of the pose, 3 of the translation.
  const rows = new Float32Array(await answer.arrayBuffer());
  const frames = rows.length / 75;
  const motion = {
    name,
    fps: Number(said("Fps")),
    poses: new Float32Array(72 * frames),
    translations: new Float32Array(3 * frames),
    frames,
    applied: `${name}: ${frames} frames, ${said("Fps")} a second, ${said("Up-Axis")} up, ${said("Units")}`,
  };
  for (let n = 0; n < frames; n++) {
    motion.poses.set(rows.subarray(75 * n, 75 * n + 72), 72 * n);
    motion.translations.set(rows.subarray(75 * n + 72, 75 * n + 75), 3 * n);
  }
  return motion;
}

/** Which frame it is now. */
export class Player {
  motion: Motion | undefined;
  playing = false;
  speed = 1;
  /** Seconds into the motion. */
  #time = 0;

  load(motion: Motion): void {
    this.motion = motion;
    this.#time = 0;
  }

  get frame(): number {
    return this.motion ? Math.min(this.motion.frames - 1, Math.floor(this.#time * this.motion.fps + 1e-6)) : 0;
  }

  set frame(frame: number) {
    if (this.motion) this.#time = frame / this.motion.fps;
  }

  /** Let time pass; begins anew at the end. */
  advance(seconds: number): void {
    if (!this.playing || !this.motion) return;
    const length = this.motion.frames / this.motion.fps;
    this.#time = (this.#time + this.speed * seconds) % length;
  }

  /** The pose and translation of the current frame. */
  get pose(): [Float32Array, Float32Array] | undefined {
    return this.motion && poseAt(this.motion, this.frame);
  }
}

export function poseAt(motion: Motion, frame: number): [Float32Array, Float32Array] {
  return [
    motion.poses.slice(72 * frame, 72 * frame + 72),
    motion.translations.slice(3 * frame, 3 * frame + 3),
  ];
}

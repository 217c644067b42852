/** Keeps the poses that are on screen, 30 a second, and has the service write them as an animated .glb. */
import type { Reposer } from "reposer-client";

export const RECORD_FPS = 30;
/** What an animated .glb holds. */
export const MAX_FRAMES = 255;

export class Recorder {
  #poses: number[][] = [];
  #translations: number[][] = [];
  #began: number | undefined;

  get recording(): boolean {
    return this.#began !== undefined;
  }

  get frames(): number {
    return this.#poses.length;
  }

  start(nowMs: number): void {
    [this.#poses, this.#translations, this.#began] = [[], [], nowMs];
  }

  /**
   * Note the pose of this moment; the frames that were due since the last one held the pose of then.
   * @returns false when nothing more fits.
   */
  tick(nowMs: number, pose: ArrayLike<number>, translation: ArrayLike<number>): boolean {
    const due = Math.min(Math.floor(((nowMs - this.#began!) / 1000) * RECORD_FPS) + 1, MAX_FRAMES);
    while (this.frames < due) {
      const held = this.frames > 0 && this.frames < due - 1;
      this.#poses.push(held ? this.#poses.at(-1)! : Array.from(pose));
      this.#translations.push(held ? this.#translations.at(-1)! : Array.from(translation));
    }
    return this.frames < MAX_FRAMES;
  }

  /** Ends the recording; the file. */
  async finish(reposer: Reposer, avatar: string, lod: string): Promise<Blob> {
    this.#began = undefined;
    const sequence = { poses: this.#poses, translations: this.#translations, fps: RECORD_FPS };
    return (await reposer.repose(avatar, sequence, "model/gltf-binary", { lod })).blob();
  }
}

export function download(file: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The vectors in `tests/golden/` that the Python side wrote. */
import { readFileSync } from "node:fs";

const GOLDEN = new URL("../../../../tests/golden/", import.meta.url);

export function goldenJson(path: string): any {
  return JSON.parse(readFileSync(new URL(path, GOLDEN), "utf8"));
}

/** In a buffer of its own, that begins with it. */
export function goldenBytes(path: string): Uint8Array<ArrayBuffer> {
  return new Uint8Array(readFileSync(new URL(path, GOLDEN)));
}

/** The largest difference; infinite where the lengths differ. */
export function distance(values: ArrayLike<number>, wanted: number[]): number {
  if (values.length !== wanted.length) return Infinity;
  return wanted.reduce((worst, value, n) => Math.max(worst, Math.abs(value - values[n])), 0);
}

/** What the surface is coloured by. */
import { BufferAttribute, Color, DynamicDrawUsage } from "three";
import type { CanonicalMesh } from "./surface";

export const VIEWS = {
  shaded: "Shaded",
  texture: "Texture",
  wireframe: "Wireframe",
  weights: "Skin weights",
  displacement: "What the networks add",
} as const;
export type View = keyof typeof VIEWS;

/** The end of the displacement ramp, metres: more looks the same. */
export const RAMP_END_M = 0.05;
const RAMP = ["#56615e", "#0f9d58", "#c6ff5e"].map((text) => new Color(text));

/** Each bone in its own colour, neighbours far apart on the wheel; blended as the weights blend the bones. */
export function weightColors(mesh: CanonicalMesh): BufferAttribute | undefined {
  if (!mesh.joints || !mesh.weights) return undefined;
  const bones = Array.from({ length: 24 }, (_, joint) => new Color().setHSL((joint * 0.382) % 1, 0.62, 0.55));
  const colors = new Float32Array(mesh.positions.length);
  for (let k = 0; k < mesh.joints.length; k++) {
    const { r, g, b } = bones[mesh.joints[k]];
    const at = 3 * (k >> 2);
    colors[at] += mesh.weights[k] * r;
    colors[at + 1] += mesh.weights[k] * g;
    colors[at + 2] += mesh.weights[k] * b;
  }
  return new BufferAttribute(colors, 3);
}

export function displacementColors(vertexCount: number): BufferAttribute {
  return new BufferAttribute(new Float32Array(3 * vertexCount), 3).setUsage(DynamicDrawUsage);
}

/**
 * Colour each vertex by its distance between two surfaces of the same vertices.
 * @returns the largest distance, metres.
 */
export function paintDisplacement(from: Float32Array, to: Float32Array, colors: BufferAttribute): number {
  const out = colors.array as Float32Array;
  let largest = 0;
  for (let at = 0; at < out.length; at += 3) {
    const distance = Math.hypot(from[at] - to[at], from[at + 1] - to[at + 1], from[at + 2] - to[at + 2]);
    largest = Math.max(largest, distance);
    const t = Math.min(1, distance / RAMP_END_M) * (RAMP.length - 1);
    const low = RAMP[Math.min(RAMP.length - 2, Math.floor(t))];
    const high = RAMP[Math.min(RAMP.length - 1, Math.floor(t) + 1)];
    const share = t - Math.floor(t);
    out[at] = low.r + share * (high.r - low.r);
    out[at + 1] = low.g + share * (high.g - low.g);
    out[at + 2] = low.b + share * (high.b - low.b);
  }
  colors.needsUpdate = true;
  return largest;
}

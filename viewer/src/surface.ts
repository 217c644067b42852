/** One avatar's surface on screen: the topology never changes, the positions do, in place. */
import { BufferAttribute, BufferGeometry, DynamicDrawUsage, Mesh, type Texture } from "three";
import { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";

/** The canonical mesh of one level of detail, as the service gives it. */
export interface CanonicalMesh {
  positions: Float32Array;
  index: Uint16Array | Uint32Array;
  uv?: BufferAttribute;
  /** Linear light. */
  colors?: BufferAttribute;
  texture?: Texture;
  /** Four bones of each vertex, and their weights. */
  joints?: ArrayLike<number>;
  weights?: ArrayLike<number>;
}

export async function readCanonicalMesh(glb: ArrayBuffer): Promise<CanonicalMesh> {
  const { scene } = await new GLTFLoader().parseAsync(glb, "");
  const mesh = scene.getObjectByProperty("isMesh", true) as Mesh | undefined;
  if (!mesh?.geometry.index) throw new Error("the mesh has no faces");
  const { attributes, index } = mesh.geometry;
  const material = mesh.material as { map?: Texture | null };
  return {
    positions: attributes.position.array as Float32Array,
    index: index.array as Uint16Array | Uint32Array,
    uv: attributes.uv as BufferAttribute | undefined,
    colors: attributes.color as BufferAttribute | undefined,
    texture: material.map ?? undefined,
    joints: attributes.skinIndex?.array,
    weights: attributes.skinWeight?.array,
  };
}

export class Surface {
  readonly geometry = new BufferGeometry();
  readonly positions: Float32Array;
  readonly #normals: Float32Array;
  readonly #index: ArrayLike<number>;
  /** The first vertex at the same place: the sides of a texture seam share their normal. */
  readonly #twin: Uint32Array;

  constructor(mesh: CanonicalMesh) {
    this.positions = mesh.positions.slice();
    this.#normals = new Float32Array(this.positions.length);
    this.#index = mesh.index;
    this.#twin = twins(mesh.positions);
    this.geometry.setIndex(new BufferAttribute(mesh.index, 1));
    this.geometry.setAttribute("position", new BufferAttribute(this.positions, 3).setUsage(DynamicDrawUsage));
    this.geometry.setAttribute("normal", new BufferAttribute(this.#normals, 3).setUsage(DynamicDrawUsage));
    if (mesh.uv) this.geometry.setAttribute("uv", mesh.uv);
    this.updated();
  }

  get vertexCount(): number {
    return this.positions.length / 3;
  }

  /** Call after writing to `positions`. */
  updated(): void {
    smoothNormals(this.positions, this.#index, this.#twin, this.#normals);
    this.geometry.attributes.position.needsUpdate = true;
    this.geometry.attributes.normal.needsUpdate = true;
  }
}

function twins(positions: Float32Array): Uint32Array {
  const first = new Map<string, number>();
  return Uint32Array.from({ length: positions.length / 3 }, (_, v) => {
    const place = `${positions[3 * v]},${positions[3 * v + 1]},${positions[3 * v + 2]}`;
    if (!first.has(place)) first.set(place, v);
    return first.get(place)!;
  });
}

/** Normals weighted by the area of the faces around. */
function smoothNormals(p: Float32Array, index: ArrayLike<number>, twin: Uint32Array, out: Float32Array): void {
  out.fill(0);
  for (let f = 0; f < index.length; f += 3) {
    const a = 3 * index[f];
    const b = 3 * index[f + 1];
    const c = 3 * index[f + 2];
    const ux = p[b] - p[a];
    const uy = p[b + 1] - p[a + 1];
    const uz = p[b + 2] - p[a + 2];
    const vx = p[c] - p[a];
    const vy = p[c + 1] - p[a + 1];
    const vz = p[c + 2] - p[a + 2];
    const nx = uy * vz - uz * vy;
    const ny = uz * vx - ux * vz;
    const nz = ux * vy - uy * vx;
    for (let corner = f; corner < f + 3; corner++) {
      const at = 3 * twin[index[corner]];
      out[at] += nx;
      out[at + 1] += ny;
      out[at + 2] += nz;
    }
  }
  for (let v = 0; v < twin.length; v++) {
    const at = 3 * v;
    const from = 3 * twin[v];
    if (from === at) {
      const length = Math.hypot(out[at], out[at + 1], out[at + 2]) || 1;
      out[at] /= length;
      out[at + 1] /= length;
      out[at + 2] /= length;
    } else {
      out[at] = out[from];
      out[at + 1] = out[from + 1];
      out[at + 2] = out[from + 2];
    }
  }
}

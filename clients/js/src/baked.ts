/**
 * A baked avatar (`reposer bake`): the clothed surface without a service, from one file.
 * Its network weighs corrective shapes by the pose; then the surface is skinned.  `docs/formats.md` has the formula.
 */
import { Shapes } from "./shapes.js";
import { Skeleton, linearBlendSkinning } from "./skeleton.js";
import { rotationAbout } from "./transforms.js";

const MAGIC = 0x46546c67; // "glTF" read as a little-endian u32
const ORIGIN = [0, 0, 0];
const KINDS: Record<number, any> = {
  5120: Int8Array,
  5121: Uint8Array,
  5123: Uint16Array,
  5125: Uint32Array,
  5126: Float32Array,
};

export class BakedAvatar {
  /** x y z of each vertex before corrections, metres. */
  readonly canonical: Float32Array;
  readonly index: Uint16Array | Uint32Array;
  readonly skeleton: Skeleton;
  readonly #joints: Uint8Array;
  readonly #weights: Float32Array;
  readonly #shapes: Shapes;
  readonly #network: Network;
  readonly #corrected: Float32Array;

  /**
   * @param glb what `reposer bake` wrote; all but its shapes is viewed, not copied.
   * @throws Error where it is not such a file, or WebAssembly with SIMD is missing: see `Shapes`.
   */
  constructor(glb: ArrayBuffer) {
    const head = new DataView(glb);
    if (glb.byteLength < 28 || head.getUint32(0, true) !== MAGIC) throw new Error("expected a .glb");
    const jsonBytes = head.getUint32(12, true);
    const document = JSON.parse(new TextDecoder().decode(new Uint8Array(glb, 20, jsonBytes)));
    const [mesh] = document.meshes;
    if (mesh.extras?.fidelity !== "baked") throw new Error("expected a .glb of reposer bake");
    const { attributes, indices, targets } = mesh.primitives[0];
    const array = (number: number) => accessor(glb, 28 + jsonBytes, document, number);
    this.canonical = array(attributes.POSITION) as Float32Array;
    this.index = array(indices) as Uint16Array | Uint32Array;
    this.#joints = array(attributes.JOINTS_0) as Uint8Array;
    this.#weights = array(attributes.WEIGHTS_0) as Float32Array;
    this.#shapes = new Shapes(targets.map((target: { POSITION: number }) => array(target.POSITION) as Int8Array));
    this.#network = new Network(mesh.extras.network, (part) => array(part.accessor) as Float32Array);
    this.#corrected = new Float32Array(this.canonical.length);
    this.skeleton = new Skeleton(skeletonOf(document));
  }

  /** The weight of each shape in a pose of 72 numbers, axis-angle, radians. */
  shapeWeights(pose: ArrayLike<number>): Float64Array {
    return this.#network.weights(pose);
  }

  /**
   * The surface: x y z of each vertex, metres.
   * @param pose axis-angle of the 24 joints, 72 numbers, radians.
   * @param translation of the root, metres.
   */
  vertices(
    pose: ArrayLike<number>,
    translation: ArrayLike<number> = ORIGIN,
    out: Float32Array = new Float32Array(this.canonical.length),
  ): Float32Array {
    const corrected = this.#corrected;
    corrected.set(this.canonical);
    this.#shapes.addTo(corrected, this.#network.weights(pose));
    const bones = this.skeleton.boneTransforms(pose, translation);
    return linearBlendSkinning(corrected, bones, this.#joints, this.#weights, out);
  }
}

/** An array of the network: the accessor with its numbers, rows first. */
interface Part {
  accessor: number;
  shape: number[];
}

interface NetworkRecord {
  before: Part;
  after: Part;
  hidden: { matrix: Part; bias: Part }[];
  linear: Part;
  output: Part;
  constant: Part;
}

/** weights = constant + f linear + h output, f the turns of joints 1 to 23 as 3 x 3 matrices, h the last hidden layer. */
class Network {
  readonly #before: Float32Array;
  readonly #after: Float32Array;
  readonly #hidden: { matrix: Float32Array; bias: Float32Array }[];
  readonly #linear: Float32Array;
  readonly #output: Float32Array;
  readonly #constant: Float32Array;

  constructor(record: NetworkRecord, numbers: (part: Part) => Float32Array) {
    this.#before = numbers(record.before);
    this.#after = numbers(record.after);
    this.#hidden = record.hidden.map(({ matrix, bias }) => ({ matrix: numbers(matrix), bias: numbers(bias) }));
    this.#linear = numbers(record.linear);
    this.#output = numbers(record.output);
    this.#constant = numbers(record.constant);
  }

  weights(pose: ArrayLike<number>): Float64Array {
    const features = this.#features(pose);
    let layer = features;
    for (const { matrix, bias } of this.#hidden) {
      const sums = Float64Array.from(bias);
      addProduct(layer, matrix, sums);
      layer = sums.map(Math.tanh);
    }
    const weights = Float64Array.from(this.#constant);
    addProduct(features, this.#linear, weights);
    addProduct(layer, this.#output, weights);
    return weights;
  }

  /** before[j] R_j after[j] - 1 of each joint but the root, rows first. */
  #features(pose: ArrayLike<number>): Float64Array {
    const features = new Float64Array(this.#before.length);
    const half = new Float64Array(9);
    for (let at = 0; at < features.length; at += 9) {
      const joint = 3 * (1 + at / 9);
      const turn = rotationAbout(pose[joint], pose[joint + 1], pose[joint + 2], ORIGIN);
      for (let row = 0; row < 3; row++) {
        for (let column = 0; column < 3; column++) {
          half[3 * row + column] = 0;
          for (let k = 0; k < 3; k++) half[3 * row + column] += this.#before[at + 3 * row + k] * turn[4 * k + column];
        }
      }
      for (let row = 0; row < 3; row++) {
        for (let column = 0; column < 3; column++) {
          let value = row === column ? -1 : 0;
          for (let k = 0; k < 3; k++) value += half[3 * row + k] * this.#after[at + 3 * k + column];
          features[at + 3 * row + column] = value;
        }
      }
    }
    return features;
  }
}

/** out += row matrix, with as many columns as `out`. */
function addProduct(row: Float64Array, matrix: Float32Array, out: Float64Array): void {
  for (let n = 0, at = 0; n < row.length; n++) {
    const value = row[n];
    for (let column = 0; column < out.length; column++, at++) out[column] += value * matrix[at];
  }
}

/** Its numbers, viewed; where they have a stride, with what lies between them. */
function accessor(glb: ArrayBuffer, start: number, document: any, number: number): ArrayLike<number> {
  const { bufferView, byteOffset = 0, componentType, count, type } = document.accessors[number];
  const view = document.bufferViews[bufferView];
  const kind = KINDS[componentType as number];
  const width = { SCALAR: 1, VEC3: 3, VEC4: 4 }[type as string];
  if (!kind || !width) throw new Error(`accessor ${number} has an unexpected type`);
  const step = view.byteStride ? view.byteStride / kind.BYTES_PER_ELEMENT : width;
  return new kind(glb, start + (view.byteOffset ?? 0) + byteOffset, step * count);
}

/** The nodes stand in the canonical pose, each at its place in the T-pose as seen from its parent. */
function skeletonOf(document: any): { parents: number[]; rest_joints: number[][]; canonical_pose: number[][] } {
  const nodes: number[] = document.skins[0].joints;
  const parents = nodes.map((node) => nodes.findIndex((other) => document.nodes[other].children?.includes(node)));
  const rest: number[][] = [];
  nodes.forEach((node, joint) => {
    const place: number[] = document.nodes[node].translation;
    rest.push(parents[joint] < 0 ? place : place.map((x, axis) => x + rest[parents[joint]][axis]));
  });
  const pose = nodes.map((node) => axisAngle(document.nodes[node].rotation));
  return { parents, rest_joints: rest, canonical_pose: pose };
}

/** Of a unit quaternion x y z w. */
function axisAngle([x, y, z, w]: number[]): number[] {
  const sine = Math.hypot(x, y, z);
  const scale = sine > 1e-12 ? (2 * Math.atan2(Math.sign(w || 1) * sine, Math.abs(w)) / sine) : 2;
  return [x * scale, y * scale, z * scale];
}

/**
 * The SMPL tree of one avatar, and plain linear blend skinning: what a motion looks like without the networks.
 * Frames: y up, metres, right-handed; matrices are 3 x 4, row by row, twelve numbers each, acting on column vectors.
 */

import { inverted, product, rotationAbout, type Transform } from "./transforms.js";

/** The members of `GET /avatars/{id}` that say how the avatar's bones lie. */
export interface SkeletonRecord {
  parents: number[];
  rest_joints: number[][];
  canonical_pose: number[][];
}

export class Skeleton {
  readonly joints: number;
  readonly #parents: number[];
  readonly #rest: number[][];
  /** Canonical pose -> T-pose, for each joint. */
  readonly #toRest: Transform[];

  constructor(record: SkeletonRecord) {
    this.#parents = record.parents;
    this.#rest = record.rest_joints;
    this.joints = record.parents.length;
    this.#toRest = this.#posed(Float64Array.from(record.canonical_pose.flat())).map(inverted);
  }

  /**
   * B_j: canonical -> deformed, in the world or as seen from the pelvis.
   * @param pose axis-angle of each joint, 3 J numbers, radians.
   * @param translation of the root, metres; null leaves root rotation and translation out.
   * @returns J x 12.
   */
  boneTransforms(pose: ArrayLike<number>, translation: ArrayLike<number> | null): Float32Array {
    const local = Float64Array.from(pose);
    local.fill(0, 0, 3);
    const root = translation ? this.#root(pose, translation) : null;
    const bones = new Float32Array(12 * this.joints);
    this.#posed(local).forEach((posed, joint) => {
      const bone = product(posed, this.#toRest[joint]);
      bones.set(root ? product(root, bone) : bone, 12 * joint);
    });
    return bones;
  }

  /** Turns about the pelvis joint, then moves. */
  #root(pose: ArrayLike<number>, translation: ArrayLike<number>): Transform {
    const root = rotationAbout(pose[0], pose[1], pose[2], this.#rest[0]);
    for (let axis = 0; axis < 3; axis++) root[4 * axis + 3] += translation[axis];
    return root;
  }

  /** A_j: carries a point of the T-pose rigidly with joint j. */
  #posed(pose: ArrayLike<number>): Transform[] {
    const posed: Transform[] = [];
    this.#parents.forEach((parent, joint) => {
      const at = 3 * joint;
      const local = rotationAbout(pose[at], pose[at + 1], pose[at + 2], this.#rest[joint]);
      posed.push(parent < 0 ? local : product(posed[parent], local));
    });
    return posed;
  }
}

/**
 * Linear blend skinning: x_d = (sum_j w_j B_j) x_c.
 * @param canonical x y z of each vertex, metres.
 * @param bones J x 12, of `Skeleton.boneTransforms`.
 * @param joints four bones of each vertex. @param weights theirs, summing to 1.
 * @param out x y z of each vertex.
 */
export function linearBlendSkinning(
  canonical: ArrayLike<number>,
  bones: ArrayLike<number>,
  joints: ArrayLike<number>,
  weights: ArrayLike<number>,
  out: Float32Array = new Float32Array(canonical.length),
): Float32Array {
  const vertices = canonical.length / 3;
  for (let v = 0; v < vertices; v++) {
    const x = canonical[3 * v];
    const y = canonical[3 * v + 1];
    const z = canonical[3 * v + 2];
    let px = 0;
    let py = 0;
    let pz = 0;
    for (let k = 4 * v; k < 4 * v + 4; k++) {
      const w = weights[k];
      if (w === 0) continue;
      const b = 12 * joints[k];
      px += w * (bones[b] * x + bones[b + 1] * y + bones[b + 2] * z + bones[b + 3]);
      py += w * (bones[b + 4] * x + bones[b + 5] * y + bones[b + 6] * z + bones[b + 7]);
      pz += w * (bones[b + 8] * x + bones[b + 9] * y + bones[b + 10] * z + bones[b + 11]);
    }
    out[3 * v] = px;
    out[3 * v + 1] = py;
    out[3 * v + 2] = pz;
  }
  return out;
}

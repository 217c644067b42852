/** Poses as the service takes them. */

export type Rotation = "axis_angle" | "matrix" | "quat_wxyz" | "6d";

export const JOINTS = 24;
export const POSE_BYTES = 316;
const MAGIC = 0x31505641; // "AVP1" read as a little-endian u32
const ROWS = [21, 22, 23, 24, 52, 55]; // joints in a row that the service takes
const NUMBERS = { axis_angle: 3, matrix: 9, quat_wxyz: 4, "6d": 6 }; // of one joint

/**
 * The binary pose message of a stream.
 * @param seq u32, rising with every pose.
 * @param pose 72 numbers: axis-angle of the 24 SMPL joints, radians.
 * @param translation x y z of the root, in the units of the stream.
 * @param clientUs the client's clock, microseconds; comes back unread in the frame.
 */
export function encodePose(
  seq: number,
  pose: ArrayLike<number>,
  translation: ArrayLike<number>,
  clientUs: bigint,
): ArrayBuffer {
  if (pose.length !== 3 * JOINTS) throw new RangeError(`expected 72 numbers, got ${pose.length}`);
  if (translation.length !== 3) throw new RangeError(`expected 3 numbers, got ${translation.length}`);
  const message = new ArrayBuffer(POSE_BYTES);
  const view = new DataView(message);
  view.setUint32(0, MAGIC, true);
  view.setUint32(4, seq, true);
  view.setBigUint64(8, clientUs, true);
  for (let n = 0; n < 3 * JOINTS; n++) view.setFloat32(16 + 4 * n, pose[n], true);
  for (let n = 0; n < 3; n++) view.setFloat32(304 + 4 * n, translation[n], true);
  return message;
}

/**
 * The pose message of a stream: binary where that can carry the pose, else JSON.
 * @param pose one row: 3 numbers a joint in axis-angle, 4 in quaternions w x y z, 6 in 6d, 9 in matrices row by row;
 *   of 21, 22, 23, 24, 52 or 55 joints.
 */
export function poseMessage(
  seq: number,
  pose: ArrayLike<number>,
  translation: ArrayLike<number>,
  clientUs: bigint,
  rotation: Rotation = "axis_angle",
): ArrayBuffer | string {
  if (rotation === "axis_angle" && pose.length === 3 * JOINTS) return encodePose(seq, pose, translation, clientUs);
  const widths = ROWS.map((joints) => joints * NUMBERS[rotation]);
  if (!widths.includes(pose.length)) throw new RangeError(`expected ${widths.join(", ")} numbers, got ${pose.length}`);
  if (translation.length !== 3) throw new RangeError(`expected 3 numbers, got ${translation.length}`);
  const numbers = { pose: Array.from(pose), trans: Array.from(translation) };
  return JSON.stringify({ type: "pose", seq, t: Number(clientUs), ...numbers });
}

/** Poses as the service takes them. */

export const JOINTS = 24;
export const POSE_BYTES = 316;
const MAGIC = 0x31505641; // "AVP1" read as a little-endian u32

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

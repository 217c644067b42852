/**
 * One frame on the wire: a header of 48 bytes, then its vertices; little-endian, metres, y up, right-handed.
 * `docs/protocol.md` and `service/frames.py` have the layout, byte for byte.
 */
import { decompress } from "fzstd";

export type Codec = "f32" | "q16" | "q16d";
/** By the number that the header holds. */
export const CODECS: readonly Codec[] = ["f32", "q16", "q16d"];
export const HEADER_BYTES = 48;
const MAGIC = 0x31465641; // "AVF1" read as a little-endian u32
const MAX_VERTICES = 1 << 24;
const KEY = 1;
const LAST = 2;
const DROPPED = 4;

/** The bytes are not a whole frame, or not one that can be read now. */
export class FrameError extends Error {
  override name = "FrameError";
}

export interface Frame {
  codec: Codec;
  /** Stands alone: nothing of the frame before is needed. */
  key: boolean;
  last: boolean;
  /** Poses before this one got no frame. */
  dropped: boolean;
  seq: number;
  frame: number;
  /** The client's time of the pose, microseconds. */
  clientUs: bigint;
  serverUs: number;
  vertexCount: number;
  /** Position of the pelvis. */
  pelvis: [number, number, number];
  /** Half the edge of the box around the pelvis that a quantised frame spans. */
  halfExtent: number;
  /**
   * x y z of each vertex: Float32Array in metres, or Uint16Array q with vertex = pelvis - h + q 2h / 65535.
   * A view of the message (`f32`, `q16`) or of the decoder's memory (`q16d`: read only, valid until the next frame).
   */
  values: Float32Array | Uint16Array;
}

/** Reads the frames of one connection or answer, in order: a `q16d` frame is a difference from the one before. */
export class FrameDecoder {
  #previous = new Uint16Array(0);
  #planes = new Uint8Array(0);
  #halfExtent = 0;

  /**
   * Bytes of the frame that begins at `offset`, or null while too few are there to say.
   * @throws FrameError where no frame begins.
   */
  size(data: Uint8Array, offset = 0): number | null {
    if (data.byteLength - offset < HEADER_BYTES) return null;
    const view = new DataView(data.buffer, data.byteOffset + offset);
    const { codec, vertexCount } = start(view);
    if (codec === "f32") return HEADER_BYTES + 12 * vertexCount;
    if (codec === "q16") return HEADER_BYTES + padded(6 * vertexCount);
    if (view.byteLength < HEADER_BYTES + 4) return null;
    return HEADER_BYTES + padded(4 + packedBytes(view, vertexCount));
  }

  /**
   * One whole frame.  `data` must begin at a multiple of four in its buffer, as a WebSocket message does.
   * @throws FrameError where it is not one whole frame, or a difference from a frame that is not there.
   */
  decode(data: ArrayBuffer | Uint8Array): Frame {
    const bytes = data instanceof Uint8Array ? data : new Uint8Array(data);
    const size = this.size(bytes);
    if (size !== bytes.byteLength) {
      throw new FrameError(`expected one frame of ${size ?? `${HEADER_BYTES} or more`} bytes, got ${bytes.byteLength}`);
    }
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const { codec, vertexCount } = start(view);
    const flags = view.getUint16(6, true);
    const halfExtent = view.getFloat32(44, true);
    const pelvis = [32, 36, 40].map((at) => view.getFloat32(at, true)) as [number, number, number];
    if (![...pelvis, halfExtent].every(Number.isFinite) || halfExtent < 0) {
      throw new FrameError("the box around the frame is not finite");
    }
    const payload = bytes.byteOffset + HEADER_BYTES;
    let values: Float32Array | Uint16Array;
    if (codec === "f32") values = new Float32Array(bytes.buffer, payload, 3 * vertexCount);
    else if (codec === "q16") values = new Uint16Array(bytes.buffer, payload, 3 * vertexCount);
    else values = this.#undoDifference(bytes, view, vertexCount, halfExtent, (flags & KEY) !== 0);
    return {
      codec,
      key: (flags & KEY) !== 0,
      last: (flags & LAST) !== 0,
      dropped: (flags & DROPPED) !== 0,
      seq: view.getUint32(8, true),
      frame: view.getUint32(12, true),
      clientUs: view.getBigUint64(16, true),
      serverUs: view.getUint32(24, true),
      vertexCount,
      pelvis,
      halfExtent,
      values,
    };
  }

  #undoDifference(bytes: Uint8Array, view: DataView, count: number, halfExtent: number, key: boolean): Uint16Array {
    if (!key && (this.#previous.length !== 3 * count || this.#halfExtent !== halfExtent)) {
      throw new FrameError("the difference from a frame that is not there");
    }
    if (this.#previous.length !== 3 * count) {
      this.#previous = new Uint16Array(3 * count);
      this.#planes = new Uint8Array(6 * count);
    }
    const packed = packedBytes(view, count);
    const planes = unpack(bytes.subarray(HEADER_BYTES + 4, HEADER_BYTES + 4 + packed), this.#planes);
    // Typed arrays of u16 keep the sums modulo 65536.
    const q = this.#previous;
    if (key) q.fill(0);
    for (let axis = 0; axis < 3; axis++) {
      let residual = 0;
      for (let vertex = 0, low = axis * count, high = low + 3 * count; vertex < count; vertex++, low++, high++) {
        const zigzag = planes[low] | (planes[high] << 8);
        residual += (zigzag >> 1) ^ -(zigzag & 1);
        q[3 * vertex + axis] += residual;
      }
    }
    this.#halfExtent = halfExtent;
    return q;
  }
}

/** Positions in metres, x y z of each vertex; written to `out` where one is given. */
export function positions(frame: Frame, out: Float32Array = new Float32Array(3 * frame.vertexCount)): Float32Array {
  const { values, halfExtent } = frame;
  if (values instanceof Float32Array) {
    out.set(values);
    return out;
  }
  const step = (2 * halfExtent) / 65535;
  const [x, y, z] = frame.pelvis.map((centre) => centre - halfExtent);
  for (let n = 0; n < values.length; n += 3) {
    out[n] = x + values[n] * step;
    out[n + 1] = y + values[n + 1] * step;
    out[n + 2] = z + values[n + 2] * step;
  }
  return out;
}

/**
 * Frames from pieces of any size (the body of `POST /avatars/{id}/repose`), each as soon as its last byte is there.
 * @throws FrameError where the stream is damaged or ends before its last frame.
 */
export async function* decodeStream(chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Frame> {
  const decoder = new FrameDecoder();
  let buffer = new Uint8Array(1 << 16);
  let filled = 0;
  let last = false;
  for await (const chunk of chunks) {
    if (filled + chunk.length > buffer.length) {
      const larger = new Uint8Array(Math.max(2 * buffer.length, filled + chunk.length));
      larger.set(buffer.subarray(0, filled));
      buffer = larger;
    }
    buffer.set(chunk, filled);
    filled += chunk.length;
    let begin = 0;
    while (begin < filled) {
      if (last) throw new FrameError("bytes after the last frame");
      const size = decoder.size(buffer.subarray(0, filled), begin);
      if (size === null || filled - begin < size) break;
      // A copy: the buffer is reused, the frame may be kept.
      const frame = decoder.decode(buffer.slice(begin, begin + size));
      begin += size;
      last = frame.last;
      yield frame;
    }
    buffer.copyWithin(0, begin, filled);
    filled -= begin;
  }
  if (filled > 0 || !last) throw new FrameError("the stream ends before its last frame");
}

function start(view: DataView): { codec: Codec; vertexCount: number } {
  const codec = CODECS[view.getUint8(5)];
  if (view.getUint32(0, true) !== MAGIC || view.getUint8(4) !== 1 || codec === undefined) {
    throw new FrameError("expected AVF1, version 1, codec 0 to 2");
  }
  const vertexCount = view.getUint32(28, true);
  if (vertexCount === 0 || vertexCount > MAX_VERTICES) {
    throw new FrameError(`expected 1 to ${MAX_VERTICES} vertices, got ${vertexCount}`);
  }
  return { codec, vertexCount };
}

function packedBytes(view: DataView, count: number): number {
  const packed = view.getUint32(HEADER_BYTES, true);
  // zstd adds a few bytes to what it cannot shorten.
  if (packed > 6 * count + 1024) throw new FrameError(`expected about ${6 * count} bytes at most, got ${packed}`);
  return packed;
}

function unpack(packed: Uint8Array, planes: Uint8Array): Uint8Array {
  let unpacked: Uint8Array;
  try {
    unpacked = decompress(packed, planes);
  } catch (error) {
    throw new FrameError("the compressed planes are damaged", { cause: error });
  }
  if (unpacked.length !== planes.length) throw new FrameError("the compressed planes have the wrong size");
  return unpacked;
}

function padded(size: number): number {
  return size + (-size & 3);
}

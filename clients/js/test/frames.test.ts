/** The decoder against the golden vectors. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { FrameDecoder, FrameError, decodeStream, encodePose, positions, type Frame } from "../src/index.js";
import { distance, goldenBytes, goldenJson } from "./golden.js";

const protocol = goldenJson("protocol/expected.json");

for (const codec of ["f32", "q16", "q16d"]) {
  test(`the messages of a ${codec} stream decode to what was sent`, () => {
    const decoder = new FrameDecoder();
    const names = Object.keys(protocol).filter((name) => name.startsWith(`${codec}-`));
    assert.ok(names.length > 0);
    for (const name of names) {
      const wanted = protocol[name];
      const frame = decoder.decode(goldenBytes(`protocol/${name}`));
      for (const member of ["codec", "key", "last", "dropped", "seq", "frame", "pelvis"] as const) {
        assert.deepEqual(frame[member], wanted[member], `${name}: ${member}`);
      }
      assert.deepEqual([String(frame.clientUs), frame.serverUs], [wanted.t, wanted.server_us]);
      assert.ok(distance(positions(frame), wanted.vertices.flat()) <= wanted.tolerance_m, name);
    }
  });

  test(`a ${codec} answer decodes from pieces of any size`, async () => {
    const wanted = goldenJson(`frames/${codec}.json`);
    for (const size of [1, 7, 48, 1 << 20]) {
      const frames: { frame: Frame; vertices: Float32Array }[] = [];
      for await (const frame of decodeStream(pieces(goldenBytes(`frames/${codec}.bin`), size))) {
        frames.push({ frame, vertices: positions(frame) });
      }
      assert.deepEqual(
        frames.map(({ frame }) => [frame.seq, frame.key, frame.dropped, frame.last, frame.halfExtent, frame.clientUs]),
        wanted.map((w: any) => [w.seq, w.key, w.dropped, w.last, w.half_extent, BigInt(w.client_us)]),
      );
      frames.forEach(({ vertices }, n) => assert.ok(distance(vertices, wanted[n].vertices.flat()) <= 1e-6));
    }
  });
}

test("pose.bin is what encodePose writes", () => {
  const wanted = protocol["pose.bin"];
  const written = encodePose(wanted.seq, wanted.pose, wanted.trans, BigInt(wanted.t));
  assert.deepEqual(new Uint8Array(written), goldenBytes("protocol/pose.bin"));
});

test("f32 and q16 payloads are views of the message, not copies", () => {
  for (const codec of ["f32", "q16"]) {
    const message = goldenBytes(`protocol/${codec}-0.bin`);
    assert.equal(new FrameDecoder().decode(message).values.buffer, message.buffer);
  }
});

test("whatever is cut off or foreign is refused", () => {
  for (const codec of ["f32", "q16", "q16d"]) {
    const message = goldenBytes(`protocol/${codec}-0.bin`);
    for (const size of [0, 47, 48, message.length - 4]) {
      assert.throws(() => new FrameDecoder().decode(message.slice(0, size)), FrameError);
    }
    for (const [at, value] of [[0, 0], [4, 2], [5, 3], [31, 0xff], [47, 0x7f], [28, 0]]) {
      const changed = message.slice();
      changed[at] = value;
      if (at === 47) changed[46] = 0x80; // half the edge is infinite
      assert.throws(() => new FrameDecoder().decode(changed), FrameError, `${codec}: byte ${at}`);
    }
  }
});

test("a damaged or lonely difference is refused", () => {
  const message = goldenBytes("protocol/q16d-0.bin");
  for (let at = 52; at < 60; at++) message[at] ^= 0xff;
  assert.throws(() => new FrameDecoder().decode(message), FrameError);
  assert.throws(() => new FrameDecoder().decode(goldenBytes("protocol/q16d-1.bin")), FrameError);
});

test("an answer that ends early, or goes on after its last frame, is refused", async () => {
  const whole = goldenBytes("frames/q16.bin");
  for (const data of [whole.subarray(0, -1), whole.subarray(0, 48), new Uint8Array([...whole, 0])]) {
    await assert.rejects(async () => {
      for await (const _ of decodeStream(pieces(data, 100)));
    }, FrameError);
  }
});

async function* pieces(data: Uint8Array, size: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < data.length; at += size) yield data.subarray(at, at + size);
}

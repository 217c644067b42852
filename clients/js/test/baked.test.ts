/** The evaluator of baked avatars against `service/bake.py`. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { readFileSync } from "node:fs";
import wabt from "wabt";
import { BakedAvatar } from "../src/index.js";
import { DOT_WASM, Shapes } from "../src/shapes.js";
import { distance, goldenBytes, goldenJson } from "./golden.js";

const golden = goldenJson("baked/expected.json");
const avatar = new BakedAvatar(goldenBytes("baked/small.glb").buffer);

test("shapes are weighed as the service's evaluator weighs them", () => {
  golden.poses.forEach((pose: number[], n: number) => {
    assert.ok(distance(avatar.shapeWeights(pose), golden.weights[n]) < 1e-4, `pose ${n}`);
  });
});

test("the surface is the service's evaluator's within 10 micrometres", () => {
  golden.poses.forEach((pose: number[], n: number) => {
    const vertices = avatar.vertices(pose, golden.translations[n]);
    assert.ok(distance(vertices, golden.vertices[n].flat()) < 1e-5, `pose ${n}`);
  });
});

test("shapes are added up as in plain JavaScript, whatever their number", () => {
  let seed = 1;
  const random = () => ((seed = (seed * 16807) % 2147483647) / 2147483647) * 2 - 1;
  for (const count of [1, 7, 8, 240, 512]) {
    const shapes = Array.from({ length: count }, () => Int8Array.from({ length: 4 * 50 }, () => Math.round(127 * random())));
    const weights = Float64Array.from({ length: count }, () => 0.3 * random());
    const out = Float32Array.from({ length: 3 * 50 }, (_, n) => n / 100);
    const expected = out.map((value, n) => {
      const at = n + Math.floor(n / 3);
      return shapes.reduce((sum, shape, k) => sum + (weights[k] * shape[at]) / 127, value);
    });
    new Shapes(shapes).addTo(out, weights);
    // Each weight is off by half a 32767th of the largest at most, now up, now down.
    assert.ok(distance(out, [...expected]) < (4 * Math.sqrt(count) * 0.3) / 65534 + 1e-6, `${count} shapes`);
  }
});

test("the sums of the largest shapes and weights do not overflow", () => {
  const out = new Float32Array(3);
  new Shapes(Array.from({ length: 512 }, () => new Int8Array(4).fill(-127))).addTo(out, new Float64Array(512).fill(1));
  assert.deepEqual([...out], [-512, -512, -512]);
});

test("the module is what shapes.wat says", async () => {
  const source = readFileSync("src/shapes.wat", "utf8");
  const { buffer } = (await wabt()).parseWat("shapes.wat", source, { simd: true }).toBinary({});
  assert.equal(Buffer.from(buffer).toString("base64"), DOT_WASM);
});

test("what is no baked avatar is refused", () => {
  assert.throws(() => new BakedAvatar(new ArrayBuffer(40)), /expected a .glb/);
});

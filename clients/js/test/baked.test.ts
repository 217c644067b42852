/** The evaluator of baked avatars against `service/bake.py`. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { BakedAvatar } from "../src/index.js";
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

test("what is no baked avatar is refused", () => {
  assert.throws(() => new BakedAvatar(new ArrayBuffer(40)), /expected a .glb/);
});

/** Bones and plain skinning against `service/bundle/skeleton.py`. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { Skeleton, linearBlendSkinning } from "../src/index.js";
import { distance, goldenJson } from "./golden.js";

const golden = goldenJson("skeleton/expected.json");
const skeleton = new Skeleton(golden.skeleton);
const [canonical, joints, weights] = [golden.canonical, golden.joints, golden.weights].map((rows) => rows.flat());

test("bones and skin agree with the service's within 10 micrometres", () => {
  golden.poses.forEach((pose: number[], n: number) => {
    const bones = skeleton.boneTransforms(pose, golden.translations[n]);
    assert.ok(distance(bones, golden.bones[n]) < 1e-5, `bones of pose ${n}`);
    const skinned = linearBlendSkinning(canonical, bones, joints, weights);
    assert.ok(distance(skinned, golden.skinned[n].flat()) < 1e-5, `skin of pose ${n}`);
  });
});

test("the canonical pose leaves every vertex where it is", () => {
  const bones = skeleton.boneTransforms(golden.skeleton.canonical_pose.flat(), [0, 0, 0]);
  assert.ok(distance(linearBlendSkinning(canonical, bones, joints, weights), canonical) < 1e-6);
});

test("seen from the pelvis, root rotation is left out", () => {
  const pose = golden.poses[1].slice();
  const before = skeleton.boneTransforms(pose, null);
  pose.splice(0, 3, 0.3, -2, 1);
  assert.deepEqual(skeleton.boneTransforms(pose, null), before);
});

/** What the REST half asks the service for. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { FrameError, Reposer, type PoseSequence, type ReposeOptions } from "../src/index.js";

/** A client whose requests are kept instead of sent. */
function recorder(): { reposer: Reposer; requests: Request[] } {
  const requests: Request[] = [];
  const kept: typeof fetch = async (input, init) => {
    requests.push(new Request(input, init));
    return new Response(new Uint8Array());
  };
  return { reposer: new Reposer("http://it/prefix", { key: "key", fetch: kept }), requests };
}

const queryOf = (request: Request) => Object.fromEntries(new URL(request.url).searchParams);

test("every option of repose is said by its name in the query", async () => {
  const { reposer, requests } = recorder();
  const options: Required<ReposeOptions> = {
    lod: "preview",
    upAxis: "z",
    units: "cm",
    frame: "camera",
    rotation: "6d",
    normalize: true,
    fps: 120,
    targetFps: 29.97,
    every: 2, // the service would refuse the two together
    signal: new AbortController().signal,
  };
  await reposer.repose("a b", new Uint8Array(3), "application/x-npz", options);
  const [request] = requests;
  assert.deepEqual(queryOf(request), {
    lod: "preview", up_axis: "z", units: "cm", frame: "camera", rotation: "6d", normalize: "true",
    fps: "120", target_fps: "29.97", every: "2",
  });
  assert.equal(new URL(request.url).pathname, "/prefix/avatars/a%20b/repose");
  assert.equal(request.headers.get("Authorization"), "Bearer key");
  assert.equal(request.headers.get("Content-Type"), "application/x-npz");
});

test("what is not said is not in the query, and a sequence says itself how it is meant", async () => {
  const { reposer, requests } = recorder();
  const poses: PoseSequence = { poses: [[[1, 0, 0, 0]]], rotation: "quat_wxyz", frame: "camera" };
  const frames = reposer.frames("open", poses, { codec: "f32", normalize: undefined, targetFps: 25 });
  await assert.rejects(frames.next(), FrameError); // nothing came
  assert.deepEqual(queryOf(requests[0]), { target_fps: "25" });
  assert.equal(requests[0].headers.get("Accept"), "application/vnd.reposer.frames; codec=f32");
  assert.deepEqual(await requests[0].json(), poses);
});

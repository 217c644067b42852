// The JavaScript client before the real service: `node tests/viewer/client.mjs http://127.0.0.1:8000`.
// Prints, for each codec, how far the stream's and the answer's vertices are from the float32 answer, metres.
import WebSocket from "ws";
import { Reposer, positions } from "reposer-client";

const reposer = new Reposer(process.argv[2]);
const FRAMES = 6;
const poses = Array.from({ length: FRAMES }, (_, n) => Array.from({ length: 72 }, (_, k) => 0.3 * Math.sin(k + 0.2 * n)));
const lod = "preview";

async function answered(codec) {
  const vertices = [];
  for await (const frame of reposer.frames("open", { poses }, { lod, codec })) vertices.push(positions(frame));
  return vertices;
}

function streamed(codec) {
  return new Promise((done, failed) => {
    const vertices = [];
    const stream = reposer.stream(
      { avatar: "open", lod, mode: "complete", codecs: [codec], WebSocket },
      {
        onFrame(frame) {
          vertices.push(positions(frame));
          if (vertices.length === FRAMES) done(vertices);
        },
        onProblem: failed,
        onState: (state, { problem, code }) => state === "closed" && failed(problem ?? new Error(`closed ${code}`)),
      },
    );
    for (const pose of poses) stream.send(pose);
    stream.end();
  });
}

const farthest = (a, b) => Math.max(...a.map((frame, n) => frame.reduce((most, x, k) => Math.max(most, Math.abs(x - b[n][k])), 0)));

const exact = await answered("f32");
const result = { vertices: exact[0].length / 3, moved: farthest(exact.slice(1), exact), mesh: (await reposer.mesh("open", lod)).byteLength };
for (const codec of ["f32", "q16", "q16d"]) {
  result[codec] = { answer: farthest(await answered(codec), exact), stream: farthest(await streamed(codec), exact) };
}
result.refused = await reposer.avatar("nobody").catch((problem) => [problem.name, problem.status, problem.code]);
console.log(JSON.stringify(result));
process.exit(0);

// Frames a second of a baked avatar on one core: `node clients/js/bench/baked.mjs open.baked.glb`.
import { readFileSync } from "node:fs";
import { BakedAvatar } from "../dist/index.js";

const avatar = new BakedAvatar(new Uint8Array(readFileSync(process.argv[2])).buffer);
const out = new Float32Array(avatar.canonical.length);
const pose = new Float32Array(72);
// Time of the processor, not of the clock: what else runs on the machine does not count.
const times = Array.from({ length: 300 }, (_, n) => {
  for (let k = 3; k < 72; k++) pose[k] = 0.3 * Math.sin(k + 0.1 * n);
  const began = process.cpuUsage();
  avatar.vertices(pose, [0, 0, 0], out);
  const { user, system } = process.cpuUsage(began);
  return (user + system) / 1000;
});
times.sort((a, b) => a - b);
const median = times[times.length >> 1];
console.log(`${out.length / 3} vertices: median ${median.toFixed(2)} ms, ${(1000 / median).toFixed(0)} frames a second`);

/** The stream before a server that plays its part of the protocol, and breaks off when the test says so. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type Server } from "node:http";
import { after, afterEach, test } from "node:test";
import WebSocketClient, { WebSocketServer, type WebSocket as Peer } from "ws";
import { AvatarStream, HEADER_BYTES, POSE_BYTES, type Hello, type StreamHandlers, type StreamOptions, type StreamState } from "../src/index.js";

const HELLO = { type: "hello", avatar: "open", bundle: "b1", resumed: false, lod: "standard", vertices: 1, codec: "f32", max_fps: 120, window: 2, credits: 3, heartbeat_s: 0.05, silence_s: 0.4 };

interface Connection {
  peer: Peer;
  query: URLSearchParams;
  protocols: string;
  messages: any[];
  poses: number[];
}

let http: Server;
let connections: Connection[] = [];
let streams: AvatarStream[] = [];
/** What the server answers where it refuses, by path. */
let refusal: { status: number; body: string } | undefined;

async function serve(onPose: (connection: Connection, seq: number) => void, hello: object = HELLO): Promise<string> {
  http = createServer((_, answer) => {
    const { status, body } = refusal ?? { status: 200, body: "{}" };
    answer.writeHead(status, { "Content-Type": "application/problem+json" }).end(body);
  });
  const sockets = new WebSocketServer({ noServer: true, handleProtocols: (offered) => [...offered][0] });
  http.on("upgrade", (request, socket, head) => {
    if (refusal) return socket.end(`HTTP/1.1 ${refusal.status} No\r\n\r\n`);
    sockets.handleUpgrade(request, socket, head, (peer) => {
      const query = new URL(request.url!, "http://x").searchParams;
      const connection: Connection = { peer, query, protocols: request.headers["sec-websocket-protocol"] ?? "", messages: [], poses: [] };
      connections.push(connection);
      peer.on("message", (data, binary) => {
        if (!binary) {
          const message = JSON.parse(String(data));
          connection.messages.push(message);
          if (message.type === "pose") onPose(connection, message.seq);
          return;
        }
        assert.equal((data as Buffer).length, POSE_BYTES);
        const seq = (data as Buffer).readUInt32LE(4);
        connection.poses.push(seq);
        onPose(connection, seq);
      });
      peer.send(JSON.stringify(hello));
    });
  });
  http.listen(0, "127.0.0.1");
  await once(http, "listening");
  return `http://127.0.0.1:${(http.address() as { port: number }).port}`;
}

/** A frame of one vertex. */
function frame(seq: number): Buffer {
  const bytes = Buffer.alloc(HEADER_BYTES + 12);
  bytes.write("AVF1");
  bytes.writeUInt8(1, 4);
  bytes.writeUInt16LE(1, 6);
  bytes.writeUInt32LE(seq, 8);
  bytes.writeUInt32LE(1, 28);
  return bytes;
}

function open(base: string, options: Partial<StreamOptions>, handlers: Partial<StreamHandlers>): AvatarStream {
  const WebSocket = WebSocketClient as unknown as StreamOptions["WebSocket"];
  const stream = new AvatarStream(base, { avatar: "open", WebSocket, ...options }, { onFrame() {}, ...handlers });
  streams.push(stream);
  return stream;
}

async function until(condition: () => boolean): Promise<void> {
  for (let n = 0; n < 2000 && !condition(); n++) await new Promise((done) => setTimeout(done, 5));
  assert.ok(condition(), condition.toString());
}

const pose = new Float32Array(72);
const seen: number[] = [];

afterEach(async () => {
  streams.forEach((stream) => stream.close());
  connections.forEach(({ peer }) => peer.terminate());
  http.close();
  [streams, connections, refusal] = [[], [], undefined];
  seen.length = 0;
});
after(() => http.closeAllConnections());

test("every frame is acknowledged, once it is used", async () => {
  const base = await serve(({ peer }, seq) => peer.send(frame(seq)));
  let use = () => {};
  const stream = open(base, {}, { onFrame: () => new Promise<void>((done) => (use = done)) });
  await until(() => stream.state === "open");
  stream.send(pose);
  await until(() => stream.unanswered === 0);
  assert.deepEqual(connections[0].messages.filter(({ type }) => type === "ack"), []);
  use();
  await until(() => connections[0].messages.some(({ type, seq }) => type === "ack" && seq === 0));
});

test("subprotocols, key and options are said as the protocol wants them", async () => {
  const base = await serve(() => {});
  const stream = open(base, { codecs: ["q16d", "f32"], key: "sécret?", lod: "preview", mode: "complete", maxFps: 30 }, {});
  await until(() => stream.state === "open");
  assert.equal(connections[0].protocols.replaceAll(" ", ""), "reposer.v1.q16d,reposer.v1.f32,bearer.c8OpY3JldD8");
  assert.deepEqual(Object.fromEntries(connections[0].query), { lod: "preview", mode: "complete", max_fps: "30" });
});

test("how the poses are meant is said, and a row that no binary pose can carry goes as JSON", async () => {
  const base = await serve(({ peer }, seq) => peer.send(frame(seq)));
  const options = { rotation: "quat_wxyz", frame: "camera", normalize: true, upAxis: "y", units: "cm" } as const;
  const stream = open(base, options, { onFrame: ({ seq }) => void seen.push(seq) });
  await until(() => stream.state === "open");
  const query = { rotation: "quat_wxyz", frame: "camera", normalize: "true", up_axis: "y", units: "cm" };
  assert.deepEqual(Object.fromEntries(connections[0].query), query);
  const turned = Float32Array.from({ length: 96 }, (_, n) => Number(n % 4 === 0));
  assert.equal(stream.send(turned, [0.5, 0, 0]), 0);
  await until(() => seen.length === 1);
  const { t, ...sent } = connections[0].messages.find(({ type }) => type === "pose");
  assert.ok(Number.isSafeInteger(t) && t > 0);
  assert.deepEqual(sent, { type: "pose", seq: 0, pose: Array.from(turned), trans: [0.5, 0, 0] });
  assert.deepEqual(connections[0].poses, []);
  assert.throws(() => stream.send(pose), RangeError); // 72 numbers are no quaternions
});

test("live: after a broken connection only the newest pose is sent again, and the new one resumes", async () => {
  let answer = true;
  const base = await serve(({ peer }, seq) => answer && peer.send(frame(seq)));
  const states: StreamState[] = [];
  const stream = open(base, {}, { onFrame: ({ seq }) => void seen.push(seq), onState: (state) => states.push(state) });
  await until(() => stream.state === "open");
  stream.send(pose);
  await until(() => seen.length === 1);
  answer = false;
  connections[0].peer.terminate();
  await until(() => stream.state === "waiting");
  stream.send(pose);
  stream.send(pose);
  answer = true;
  await until(() => seen.length === 2);
  assert.deepEqual(seen, [0, 2]);
  assert.deepEqual(Object.fromEntries(connections[1].query), { last_seq: "0", bundle: "b1" });
  assert.deepEqual(states, ["connecting", "open", "waiting", "connecting", "open"]);
});

test("complete: every pose gets its frame once, within the credits, over a broken connection", async () => {
  let most = 0;
  let answered = 0;
  const base = await serve((connection, seq) => {
    most = Math.max(most, connection.poses.length - answered);
    setTimeout(() => {
      if (connection.peer.readyState !== connection.peer.OPEN) return;
      if (seq === 4 && connections.length === 1) return connection.peer.terminate();
      answered++;
      connection.peer.send(frame(seq));
    }, 2);
    if (connection !== connections[0] && connection.poses.length === 1) answered = 0;
  });
  const stream = open(base, { mode: "complete" }, { onFrame: ({ seq }) => void seen.push(seq) });
  for (let n = 0; n < 10; n++) stream.send(pose);
  stream.end();
  await until(() => seen.length === 10);
  assert.deepEqual(seen, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  assert.ok(most <= HELLO.credits, `${most} unanswered`);
  await until(() => connections[1].messages.some(({ type }) => type === "end"));
});

test("a server that falls silent is left", async () => {
  const base = await serve(() => {});
  const stream = open(base, {}, {});
  await until(() => connections.length >= 1 && connections[0].messages.some(({ type }) => type === "ping"));
  await until(() => stream.state === "waiting");
});

test("ping is answered with its own time, and statistics are passed on", async () => {
  const base = await serve(() => {});
  let stats: unknown;
  open(base, {}, { onStats: (given) => (stats = given) });
  await until(() => connections.length === 1);
  connections[0].peer.send(JSON.stringify({ type: "ping", t: 81234 }));
  await until(() => connections[0].messages.some(({ type, t }) => type === "pong" && t === 81234));
  connections[0].peer.send(JSON.stringify({ type: "pong", t: 1, stats: { poses: 3, frames: 2, dropped: 1, refused: 0 } }));
  await until(() => stats !== undefined);
});

test("a refused pose is reported and the stream goes on", async () => {
  const base = await serve(({ peer }, seq) => {
    if (seq === 0) peer.send(JSON.stringify({ type: "error", code: "pose-not-finite", title: "No", status: 422, seq }));
    else peer.send(frame(seq));
  });
  const refused: unknown[] = [];
  const stream = open(base, { mode: "complete" }, {
    onFrame: ({ seq }) => void seen.push(seq),
    onProblem: (problem, seq) => refused.push([problem.code, seq]),
  });
  stream.send(pose);
  stream.send(pose);
  await until(() => seen.length === 1);
  assert.deepEqual([refused, seen, stream.unanswered], [[["pose-not-finite", 0]], [1], 0]);
});

for (const code of [1003, 4401, 4404, 4422]) {
  test(`close ${code} is final`, async () => {
    const base = await serve(({ peer }) => peer.close(code));
    const stream = open(base, {}, {});
    await until(() => stream.state === "open");
    stream.send(pose);
    await until(() => stream.state === "closed");
    assert.throws(() => stream.send(pose));
    assert.equal(connections.length, 1);
  });
}

test("a handshake that is refused for good says why and is not tried again", async () => {
  const base = await serve(() => {});
  refusal = { status: 404, body: JSON.stringify({ status: 404, code: "avatar-not-found", title: "No such avatar" }) };
  let code: string | undefined;
  const stream = open(base, {}, { onState: (_, { problem }) => (code ??= problem?.code) });
  await until(() => stream.state === "closed");
  assert.equal(code, "avatar-not-found");
});

test("a busy service is tried again, not before it said", async () => {
  const base = await serve(() => {});
  refusal = { status: 503, body: "{}" };
  const waits: number[] = [];
  const stream = open(base, {}, { onState: (_, { retryInS }) => retryInS !== undefined && waits.push(retryInS) });
  await until(() => stream.state === "waiting");
  refusal = undefined;
  stream.retry();
  await until(() => stream.state === "open");
  assert.ok(waits[0] >= 0.125 && waits[0] <= 0.25, String(waits));
});

test("a damaged frame breaks the connection off and is asked for anew", async () => {
  const base = await serve(({ peer }, seq) => peer.send(connections.length === 1 ? frame(seq).subarray(0, 50) : frame(seq)));
  const codes: string[] = [];
  const stream = open(base, {}, { onFrame: ({ seq }) => void seen.push(seq), onProblem: ({ code }) => codes.push(code) });
  await until(() => stream.state === "open");
  stream.send(pose);
  await until(() => seen.length === 1);
  assert.deepEqual([codes, seen, connections.length], [["frame-damaged"], [0], 2]);
});

test("the hello is handed on", async () => {
  const base = await serve(() => {});
  let hello: Hello | undefined;
  open(base, {}, { onHello: (given) => (hello = given) });
  await until(() => hello !== undefined);
  assert.equal(hello!.bundle, "b1");
});

/** The page: what its controls do. */
import { Problem, Reposer, type AvatarDetail, type StreamState } from "reposer-client";
import { App } from "./app";
import { element, fillSelect, toast } from "./dom";
import { JointSliders } from "./joints";
import { readMotion } from "./motion";
import { MAX_FRAMES, RECORD_FPS, download } from "./recorder";
import { Stage } from "./stage";
import { RAMP_END_M, VIEWS, type View } from "./views";

const SAMPLES = Object.fromEntries(
  Object.entries(import.meta.glob<string>("../../assets/*.npz", { query: "?url", import: "default", eager: true })).map(
    ([path, url]) => [path.split("/").at(-1)!.replace(".npz", "").replaceAll("-", " "), url],
  ),
);
const KEY = "reposer-key";
const SERVICE = new URL(".", location.href);
const STATES: Record<StreamState, string> = {
  connecting: "Connecting",
  open: "Live",
  waiting: "No connection",
  closed: "Stopped",
};

const avatars = element<HTMLSelectElement>("avatar");
const lods = element<HTMLSelectElement>("lod");
const samples = element<HTMLSelectElement>("sample");
const upAxis = element<HTMLSelectElement>("up");
const time = element<HTMLInputElement>("time");
const play = element<HTMLButtonElement>("play");
const record = element<HTMLButtonElement>("record");
const compare = element<HTMLInputElement>("compare");
const notice = element("notice");
let view: View = "texture";
let sliders: JointSliders | undefined;
let lastFile: { name: string; file: Blob } | undefined;
let retryAt = 0;
let wasLost = false;

function connect(): Reposer {
  return new Reposer(SERVICE, { key: sessionStorage.getItem(KEY) ?? undefined });
}

const stage = makeStage();
const app = new App(connect(), stage, {
  connection: showConnection,
  problem: showProblem,
  loaded: showAvatar,
  played: showTime,
  moved: showLegend,
  recorded(frames, full) {
    record.firstElementChild!.textContent = `${(frames / RECORD_FPS).toFixed(1)} s`;
    if (full) void stopRecording();
  },
});

function makeStage(): Stage {
  try {
    return new Stage(element<HTMLCanvasElement>("view"));
  } catch (error) {
    showNotice("This browser shows no WebGL 2, which the viewer needs.", false);
    throw error;
  }
}

async function start(): Promise<void> {
  try {
    const list = (await app.reposer.avatars()).filter((avatar) => Object.keys(avatar.levels_of_detail).length > 0);
    if (list.length === 0) return showNotice("The service has no avatar that can be shown.", true);
    hideNotice();
    const wanted = new URLSearchParams(location.search);
    const first = list.find(({ id }) => id === wanted.get("avatar")) ?? list[0];
    fillSelect(avatars, list.map(({ id }) => id), first.id);
    fillLods(Object.keys(first.levels_of_detail), wanted.get("lod"));
    await app.load(avatars.value, lods.value);
    fillSelect(samples, Object.keys(SAMPLES));
    await openSample();
    app.player.playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    showTime();
  } catch (error) {
    showProblem(error);
    if (!(error instanceof Problem)) retryStart();
  }
}

function retryStart(): void {
  retryAt = performance.now() + 3000;
  showNotice("The service does not answer.", true);
  setTimeout(() => void start(), 3000);
}

function fillLods(names: string[], wanted: string | null): void {
  fillSelect(lods, names, names.includes(wanted ?? "") ? wanted! : names.includes("standard") ? "standard" : names[0]);
}

function showAvatar(avatar: AvatarDetail): void {
  document.title = `${avatar.id} · Reposer`;
  sliders = new JointSliders(element("joints"), avatar.joint_names, (index, radians) => app.turn(index, radians));
  sliders.show(app.pose);
}

// --- motions

async function openSample(): Promise<void> {
  const url = SAMPLES[samples.value];
  if (url) await open(`${samples.value}.npz`, await (await fetch(new URL(url, location.href))).blob());
}

async function open(name: string, file: Blob): Promise<void> {
  if (!app.avatar) return;
  try {
    const motion = await readMotion(app.reposer, app.avatar.id, name, file, upAxis.value);
    lastFile = { name, file };
    time.max = String(motion.frames - 1);
    element("applied").textContent = motion.applied;
    app.play(motion);
  } catch (error) {
    showProblem(error);
  }
}

samples.addEventListener("change", () => void openSample());
upAxis.addEventListener("change", () => lastFile && void open(lastFile.name, lastFile.file));
element("open").addEventListener("click", () => element("file").click());
element<HTMLInputElement>("file").addEventListener("change", ({ target }) => {
  const input = target as HTMLInputElement;
  const [file] = input.files ?? [];
  if (file) void open(file.name, file);
  input.value = ""; // the same file can be chosen again
});
const drop = element("drop");
window.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.hidden = false;
});
window.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.hidden = true;
});
window.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.hidden = true;
  const file = event.dataTransfer?.files[0];
  if (file) void open(file.name, file);
});

// --- playback

function showTime(): void {
  const { motion, frame, playing } = app.player;
  play.toggleAttribute("data-playing", playing);
  play.setAttribute("aria-label", playing ? "Pause" : "Play");
  if (motion) {
    time.value = String(frame);
    element("clock").textContent = `${(frame / motion.fps).toFixed(1)} / ${(motion.frames / motion.fps).toFixed(1)} s`;
  }
  sliders?.show(app.pose);
}

function togglePlaying(): void {
  app.player.playing = !app.player.playing && app.player.motion !== undefined;
  showTime();
}

play.addEventListener("click", togglePlaying);
time.addEventListener("input", () => {
  app.player.playing = false;
  app.seek(Number(time.value));
});
element<HTMLSelectElement>("speed").addEventListener("change", ({ target }) => {
  app.player.speed = Number((target as HTMLSelectElement).value);
});
element("rest").addEventListener("click", () => app.rest());

// --- recording

async function stopRecording(): Promise<void> {
  const { avatar } = app;
  if (!avatar || !app.recorder.recording) return;
  record.setAttribute("aria-pressed", "false");
  record.firstElementChild!.textContent = "Record";
  record.setAttribute("disabled", "");
  toast("Writing the .glb…");
  try {
    const frames = app.recorder.frames;
    download(await app.recorder.finish(app.reposer, avatar.id, app.lod), `${avatar.id}.glb`);
    toast(`${avatar.id}.glb: ${frames} frames`);
  } catch (error) {
    showProblem(error);
  }
  record.removeAttribute("disabled");
}

function toggleRecording(): void {
  if (app.recorder.recording) return void stopRecording();
  app.recorder.start(performance.now());
  record.setAttribute("aria-pressed", "true");
  toast(`Recording, up to ${MAX_FRAMES / RECORD_FPS} seconds`);
}

record.addEventListener("click", toggleRecording);

// --- views

function chooseView(chosen: View): void {
  view = chosen;
  element<HTMLInputElement>(`view-${view}`).checked = true;
  showView();
}

function showView(): void {
  app.show(view, compare.checked);
  document.querySelectorAll<HTMLElement>(".side").forEach((label) => (label.hidden = !compare.checked));
  element("legend").hidden = view !== "displacement";
}

function showLegend(largest: number | undefined): void {
  if (largest === undefined) return;
  const [caption, scale] = document.querySelectorAll("#legend figcaption, #legend span:last-child");
  caption.textContent = `Distance from plain skinning, now up to ${(1000 * largest).toFixed(0)} mm`;
  scale.textContent = `${1000 * RAMP_END_M} mm`;
}

for (const [name, title] of Object.entries(VIEWS)) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "view", id: `view-${name}` });
  const text = document.createElement("span");
  text.textContent = title;
  input.addEventListener("change", () => chooseView(name as View));
  label.append(input, text);
  element("views").append(label);
}
compare.addEventListener("change", showView);

// --- avatars

avatars.addEventListener("change", async () => {
  const { levels_of_detail } = await app.reposer.avatar(avatars.value);
  fillLods(Object.keys(levels_of_detail), lods.value);
  await app.load(avatars.value, lods.value);
});
lods.addEventListener("change", () => void app.load(avatars.value, lods.value));

// --- the connection

function showConnection(state: StreamState, why: { retryInS?: number; problem?: Problem }): void {
  const place = element("connection");
  place.dataset.state = state;
  place.textContent = STATES[state];
  if (state === "open") {
    if (wasLost) toast("Connected again");
    wasLost = false;
    hideNotice();
  } else if (state === "waiting") {
    wasLost = true;
    retryAt = performance.now() + 1000 * (why.retryInS ?? 0);
    showNotice(why.problem?.title ?? "The service has gone away.", true);
  } else if (state === "closed" && why.problem) {
    showProblem(why.problem);
  }
}

function showProblem(error: unknown): void {
  if (error instanceof Problem && error.status === 401) return void askForKey();
  const text = error instanceof Problem ? error.message : "The service does not answer.";
  toast(text[0].toUpperCase() + text.slice(1), true);
}

function showNotice(text: string, retry: boolean): void {
  notice.hidden = false;
  notice.dataset.text = text;
  notice.querySelector("p")!.textContent = text;
  element("retry").hidden = !retry;
}

function hideNotice(): void {
  notice.hidden = true;
}

async function askForKey(): Promise<void> {
  const dialog = element<HTMLDialogElement>("key");
  if (dialog.open) return;
  dialog.showModal();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
  sessionStorage.setItem(KEY, dialog.querySelector("input")!.value);
  app.reposer = connect();
  await start();
}

element("retry").addEventListener("click", () => (app.live ? app.live.retry() : void start()));

// --- keyboard and sheet

const TURN = 0.12;
element("view").addEventListener("keydown", (event) => {
  const act: Record<string, () => void> = {
    ArrowLeft: () => stage.orbit(-TURN, 0),
    ArrowRight: () => stage.orbit(TURN, 0),
    ArrowUp: () => stage.orbit(0, -TURN),
    ArrowDown: () => stage.orbit(0, TURN),
    "+": () => stage.orbit(0, 0, 1.1),
    "=": () => stage.orbit(0, 0, 1.1),
    "-": () => stage.orbit(0, 0, 1 / 1.1),
    Home: () => stage.home(),
  };
  if (!act[event.key]) return;
  event.preventDefault();
  act[event.key]();
});
window.addEventListener("keydown", (event) => {
  const typing = event.target instanceof Element && event.target.matches("select, input, textarea, button, summary");
  if (event.ctrlKey || event.metaKey || event.altKey || element<HTMLDialogElement>("key").open) return;
  const names = Object.keys(VIEWS) as View[];
  if (event.key === " " && !typing) {
    event.preventDefault();
    togglePlaying();
  } else if (names[Number(event.key) - 1]) chooseView(names[Number(event.key) - 1]);
  else if (event.key === "c") compare.click();
  else if (event.key === "r") toggleRecording();
});

const toggle = element("panel-toggle");
function openPanel(open: boolean): void {
  document.body.classList.toggle("open", open);
  toggle.setAttribute("aria-expanded", String(open));
}
toggle.addEventListener("click", () => openPanel(!document.body.classList.contains("open")));
openPanel(window.innerWidth > 760);

// --- go

function tick(nowMs: number): void {
  app.tick(nowMs);
  requestAnimationFrame(tick);
}

setInterval(() => {
  const { rate, delayMs } = app.live?.meter.read() ?? { rate: 0, delayMs: undefined };
  element("rate").textContent = String(rate);
  element("delay").textContent = delayMs === undefined ? "–" : `${delayMs.toFixed(0)} ms`;
  element("dropped").textContent = String(app.live?.meter.dropped ?? 0);
  if (!notice.hidden && retryAt) {
    const left = Math.max(0, Math.ceil((retryAt - performance.now()) / 1000));
    notice.querySelector("p")!.textContent = `${notice.dataset.text} Trying again${left ? ` in ${left} s` : "…"}`;
  }
}, 500);

chooseView(view);
requestAnimationFrame(tick);
void start();

/** One avatar on the stage, posed by a motion or by hand through the service's stream. */
import {
  Problem,
  Reposer,
  Skeleton,
  linearBlendSkinning,
  positions,
  type AvatarDetail,
  type Frame,
  type StreamState,
} from "reposer-client";
import { Live, type Asked } from "./live";
import { Player, poseAt, type Motion } from "./motion";
import { Recorder } from "./recorder";
import type { Stage } from "./stage";
import { readCanonicalMesh, type CanonicalMesh } from "./surface";
import type { View } from "./views";

const FLOOR_SAMPLES = 12;

export interface AppEvents {
  connection(state: StreamState, why: { retryInS?: number; problem?: Problem }): void;
  problem(error: unknown): void;
  loaded(avatar: AvatarDetail): void;
  /** A motion was loaded, or the clock went on. */
  played(): void;
  /** @param largest displacement on screen, metres. */
  moved(largest: number | undefined): void;
  recorded(frames: number, full: boolean): void;
}

export class App {
  readonly player = new Player();
  readonly recorder = new Recorder();
  pose: Float32Array = new Float32Array(72);
  translation: Float32Array = new Float32Array(3);
  live: Live | undefined;
  avatar: AvatarDetail | undefined;
  lod = "standard";
  #mesh: CanonicalMesh | undefined;
  #skeleton: Skeleton | undefined;
  #bundle: string | undefined;
  #asked: Asked | undefined;
  /** The pose that is on screen; the surface beside it is computed from it. */
  #shown: Asked | undefined;
  #posed = true;
  #lastTick = performance.now();
  #loads = 0;

  constructor(
    public reposer: Reposer,
    private readonly stage: Stage,
    private readonly events: AppEvents,
  ) {}

  /** Show an avatar; keeps motion and pose. */
  async load(id: string, lod: string): Promise<void> {
    const load = ++this.#loads;
    this.live?.close();
    this.live = undefined;
    try {
      const [avatar, glb] = await Promise.all([this.reposer.avatar(id), this.reposer.mesh(id, lod)]);
      const mesh = await readCanonicalMesh(glb);
      if (load !== this.#loads) return; // another was chosen meanwhile
      [this.avatar, this.lod, this.#mesh] = [avatar, lod, mesh];
      this.#skeleton = new Skeleton(avatar);
      this.#bundle = avatar.bundle_digest;
      this.#shown = undefined;
      this.stage.load(mesh);
      this.#stand();
      this.#posed = true;
      this.live = new Live(
        this.reposer,
        id,
        lod,
        {
          onState: (state, why) => load === this.#loads && this.events.connection(state, why),
          onProblem: (problem) => this.events.problem(problem),
          // The avatar was replaced: its mesh is another now.
          onHello: ({ bundle }) => bundle !== this.#bundle && void this.load(id, lod),
        },
        (frame, asked) => this.#show(frame, asked),
      );
      this.events.loaded(avatar);
    } catch (error) {
      if (load === this.#loads) this.events.problem(error);
    }
  }

  /** Pose one number of the pose by hand; what plays stops. */
  turn(index: number, radians: number): void {
    this.player.playing = false;
    this.pose[index] = radians;
    this.#posed = true;
    this.events.played();
  }

  rest(): void {
    this.player.playing = false;
    this.pose.fill(0);
    this.#posed = true;
    this.events.played();
  }

  play(motion: Motion): void {
    this.player.load(motion);
    this.player.playing = true;
    this.#stand();
    this.#take();
  }

  seek(frame: number): void {
    this.player.frame = frame;
    this.#take();
  }

  show(view: View, compare: boolean): void {
    this.stage.show(view, compare);
    this.#compare();
  }

  /** Once for each picture. */
  tick(nowMs: number): void {
    const seconds = Math.min(0.5, (nowMs - this.#lastTick) / 1000);
    this.#lastTick = nowMs;
    const before = this.player.frame;
    this.player.advance(seconds);
    if (this.player.playing && this.player.frame !== before) this.#take();
    if (this.#posed && this.live) {
      this.#posed = false;
      this.#asked = { pose: this.pose.slice(), translation: this.translation.slice() };
      this.live.ask(this.#asked);
    }
    if (this.recorder.recording) {
      const room = this.recorder.tick(nowMs, this.pose, this.translation);
      this.events.recorded(this.recorder.frames, !room);
    }
    this.stage.draw();
  }

  /** The floor is where the lowest foot of the motion stands; plain skinning is near enough. */
  #stand(): void {
    const [mesh, skeleton] = [this.#mesh, this.#skeleton];
    if (!mesh?.joints || !mesh.weights || !skeleton) return;
    const heights = (pose: ArrayLike<number>, translation: ArrayLike<number>): [number, number] => {
      const bones = skeleton.boneTransforms(pose, translation);
      const vertices = linearBlendSkinning(mesh.positions, bones, mesh.joints!, mesh.weights!);
      let [lowest, highest] = [Infinity, -Infinity];
      for (let y = 1; y < vertices.length; y += 3) {
        lowest = Math.min(lowest, vertices[y]);
        highest = Math.max(highest, vertices[y]);
      }
      return [lowest, highest];
    };
    const [feet, head] = heights(new Float32Array(72), [0, 0, 0]);
    let floor = feet;
    const { motion } = this.player;
    if (motion) {
      const some = Array.from({ length: FLOOR_SAMPLES }, (_, n) => Math.floor((n * motion.frames) / FLOOR_SAMPLES));
      const lowest = some.map((n) => heights(...poseAt(motion, n))[0]);
      floor = Math.min(...lowest);
    }
    this.stage.stand(floor, head - feet);
  }

  #take(): void {
    const taken = this.player.pose;
    if (!taken) return;
    [this.pose, this.translation] = taken;
    this.#posed = true;
    this.events.played();
  }

  #show(frame: Frame, asked: Asked): void {
    const { surface } = this.stage;
    if (!surface || surface.vertexCount !== frame.vertexCount) return;
    positions(frame, surface.positions);
    surface.updated();
    this.#shown = asked;
    this.#compare(frame.pelvis);
  }

  /** Plain skinning of the pose that is on screen, where it is looked at. */
  #compare(pelvis?: readonly number[]): void {
    const { plain } = this.stage;
    if (!this.#shown || !this.avatar) return;
    const { pose, translation } = this.#shown;
    if (this.stage.needsPlain && plain && this.#skeleton && this.#mesh?.joints && this.#mesh.weights) {
      const bones = this.#skeleton.boneTransforms(pose, translation);
      linearBlendSkinning(this.#mesh.positions, bones, this.#mesh.joints, this.#mesh.weights, plain.positions);
      plain.updated();
    }
    const root = this.avatar.rest_joints[0];
    this.events.moved(this.stage.moved(pelvis ?? root.map((x, axis) => x + translation[axis])));
  }
}

/** The picture: light, floor, camera, the avatar and, beside it, plain skinning. */
import {
  CanvasTexture,
  Color,
  DirectionalLight,
  DoubleSide,
  GridHelper,
  Group,
  HemisphereLight,
  Mesh,
  MeshBasicMaterial,
  MeshStandardMaterial,
  PCFShadowMap,
  PerspectiveCamera,
  PlaneGeometry,
  SRGBColorSpace,
  Scene,
  ShadowMaterial,
  Vector3,
  WebGLRenderer,
  type BufferAttribute,
} from "three";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";
import { Surface, type CanonicalMesh } from "./surface";
import { displacementColors, paintDisplacement, weightColors, type View } from "./views";

const EYE = new Vector3(1.2, 0.35, 3.1);
/** Room for the avatar, arms outstretched, metres. */
const [TALL_M, WIDE_M] = [1.95, 1.95];
/** Height of what floats over the picture, above and below the avatar. */
const CARDS_PX = 190;

/** One of the two surfaces: a filled mesh and, over it, its edges. */
class Figure {
  readonly group = new Group();
  readonly #fill: Mesh;
  readonly #edges: Mesh;

  constructor(readonly surface: Surface) {
    this.#fill = new Mesh(surface.geometry);
    this.#fill.castShadow = true;
    this.#edges = new Mesh(surface.geometry);
    // The bounds are those of the canonical pose; the surface is seldom out of sight anyway.
    this.#fill.frustumCulled = this.#edges.frustumCulled = false;
    this.group.add(this.#fill, this.#edges);
  }

  dress(fill: MeshStandardMaterial, edges: MeshBasicMaterial, colors: BufferAttribute | undefined, wired: boolean): void {
    this.#fill.material = fill;
    this.#edges.material = edges;
    this.#edges.visible = wired;
    if (colors) this.surface.geometry.setAttribute("color", colors);
    else this.surface.geometry.deleteAttribute("color");
  }
}

export class Stage {
  readonly #renderer: WebGLRenderer;
  readonly #scene = new Scene();
  readonly #camera = new PerspectiveCamera(32, 1, 0.05, 60);
  readonly #controls: OrbitControls;
  readonly #sun = new DirectionalLight(0xffffff, 2.2);
  readonly #floor = new Group();
  readonly #shade = new ShadowMaterial({ opacity: 0.22 });
  readonly #cloth = new MeshStandardMaterial({ roughness: 0.85, side: DoubleSide });
  readonly #painted = new MeshStandardMaterial({ roughness: 0.9, side: DoubleSide, vertexColors: true });
  readonly #textured = new MeshStandardMaterial({ roughness: 0.85, side: DoubleSide });
  readonly #hidden = new MeshStandardMaterial({ side: DoubleSide, polygonOffset: true, polygonOffsetFactor: 1, polygonOffsetUnits: 1 });
  readonly #wire = new MeshBasicMaterial({ wireframe: true });
  #mesh: CanonicalMesh | undefined;
  #avatar: Figure | undefined;
  #plain: Figure | undefined;
  #weights: BufferAttribute | undefined;
  #heat: BufferAttribute | undefined;
  #view: View = "shaded";
  #compare = false;
  #dirty = true;
  /** Where the pelvis is, above the floor. */
  readonly #goal = new Vector3();

  /** @throws where the browser has no WebGL 2. */
  constructor(private readonly canvas: HTMLCanvasElement) {
    this.#renderer = new WebGLRenderer({ canvas, antialias: true });
    this.#renderer.setPixelRatio(Math.min(window.devicePixelRatio, 2));
    this.#renderer.shadowMap.enabled = true;
    this.#renderer.shadowMap.type = PCFShadowMap;
    this.#controls = new OrbitControls(this.#camera, canvas);
    Object.assign(this.#controls, { enableDamping: true, dampingFactor: 0.12, minDistance: 0.5, maxDistance: 12 });
    this.#controls.addEventListener("change", () => this.redraw());
    this.#sun.castShadow = true;
    this.#sun.shadow.mapSize.set(1024, 1024);
    this.#sun.shadow.radius = 4;
    this.#sun.shadow.bias = -0.0005;
    this.#sun.shadow.normalBias = 0.02;
    Object.assign(this.#sun.shadow.camera, { left: -1.6, right: 1.6, top: 1.6, bottom: -1.6, near: 0.5, far: 8 });
    const fill = new DirectionalLight(0xdfe9ff, 0.7);
    fill.position.set(-3, 1.5, -2);
    this.#scene.add(new HemisphereLight(0xffffff, 0x8a8f8c, 1.5), this.#sun, this.#sun.target, fill, this.#floor);
    this.home();
    new ResizeObserver(() => this.#resize()).observe(canvas.parentElement!);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
    this.#paint();
  }

  get surface(): Surface | undefined {
    return this.#avatar?.surface;
  }

  get plain(): Surface | undefined {
    return this.#plain?.surface;
  }

  /** Whether the plain surface is needed for what is on screen. */
  get needsPlain(): boolean {
    return this.#compare || this.#view === "displacement";
  }

  load(mesh: CanonicalMesh): void {
    for (const figure of [this.#avatar, this.#plain]) {
      figure?.group.removeFromParent();
      figure?.surface.geometry.dispose();
    }
    this.#mesh = mesh;
    this.#avatar = new Figure(new Surface(mesh));
    this.#plain = new Figure(new Surface(mesh));
    this.#weights = weightColors(mesh);
    this.#heat = displacementColors(this.#avatar.surface.vertexCount);
    this.#textured.map = mesh.texture ?? null;
    this.#textured.vertexColors = !mesh.texture && mesh.colors !== undefined;
    this.#textured.needsUpdate = true;
    this.#scene.add(this.#avatar.group, this.#plain.group);
    this.#dress();
  }

  /** Where the floor is and how tall the avatar is, metres; the camera looks at the middle. */
  stand(floorY: number, height: number): void {
    this.#floor.position.y = floorY;
    const step = floorY + 0.5 * height - this.#controls.target.y;
    this.#controls.target.y += step;
    this.#camera.position.y += step;
    this.redraw();
  }

  show(view: View, compare: boolean): void {
    this.#view = view;
    if (this.#compare !== compare) {
      this.#compare = compare;
      this.#resize();
    }
    this.#dress();
  }

  /**
   * Call after new positions; keeps the pelvis in the middle.
   * @returns the largest displacement, metres, where that is on screen.
   */
  moved(pelvis: readonly number[]): number | undefined {
    this.#goal.set(pelvis[0], 0, pelvis[2]);
    this.#sun.target.position.set(pelvis[0], pelvis[1], pelvis[2]);
    this.#sun.position.copy(this.#sun.target.position).add(new Vector3(1.4, 3.4, 2.2));
    this.redraw();
    if (this.#view !== "displacement" || !this.surface || !this.plain || !this.#heat) return undefined;
    return paintDisplacement(this.surface.positions, this.plain.positions, this.#heat);
  }

  /** Turn by angles in radians, and zoom. */
  orbit(azimuth: number, polar: number, zoom = 1): void {
    const { target } = this.#controls;
    const offset = this.#camera.position.clone().sub(target);
    const radius = Math.min(12, Math.max(0.5, offset.length() / zoom));
    const theta = Math.atan2(offset.x, offset.z) + azimuth;
    const phi = Math.min(3.0, Math.max(0.14, Math.acos(offset.y / offset.length()) + polar));
    this.#camera.position.copy(target).add(new Vector3().setFromSphericalCoords(radius, phi, theta));
    this.redraw();
  }

  home(): void {
    const { target } = this.#controls;
    this.#camera.position.copy(target).add(EYE);
    this.#resize();
  }

  redraw(): void {
    this.#dirty = true;
  }

  /** Draws if anything has changed. */
  draw(): void {
    this.#follow();
    this.#controls.update();
    if (!this.#dirty) return;
    this.#dirty = false;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const half = Math.floor(width / 2);
    this.#renderer.setScissorTest(this.#compare);
    this.#half(0, this.#compare ? half : width, height, "avatar");
    if (this.#compare) this.#half(half, width - half, height, "plain");
  }

  /** Goes after the avatar: softly, but with a jump where it is far away. */
  #follow(): void {
    const { target } = this.#controls;
    const step = this.#goal.clone().sub(target).setY(0);
    const away = step.length();
    if (away < 0.01) return;
    if (away < 1) step.multiplyScalar(0.15);
    target.add(step);
    this.#camera.position.add(step);
    this.redraw();
  }

  #half(left: number, width: number, height: number, who: "avatar" | "plain"): void {
    if (this.#avatar) this.#avatar.group.visible = who === "avatar";
    if (this.#plain) this.#plain.group.visible = who === "plain";
    this.#renderer.setViewport(left, 0, width, height);
    this.#renderer.setScissor(left, 0, width, height);
    this.#renderer.render(this.#scene, this.#camera);
  }

  #dress(): void {
    const cloth = { fill: this.#cloth, colors: undefined };
    const look = {
      shaded: cloth,
      texture: { fill: this.#textured, colors: this.#mesh?.texture ? undefined : this.#mesh?.colors },
      wireframe: { fill: this.#hidden, colors: undefined },
      weights: this.#weights ? { fill: this.#painted, colors: this.#weights } : cloth,
      displacement: { fill: this.#painted, colors: this.#heat },
    }[this.#view];
    const plain = this.#view === "displacement" ? cloth : look;
    const wired = this.#view === "wireframe";
    this.#avatar?.dress(look.fill, this.#wire, look.colors, wired);
    this.#plain?.dress(plain.fill, this.#wire, plain.colors, wired);
    this.redraw();
  }

  /** The colours of the page, light or dark. */
  #paint(): void {
    const style = getComputedStyle(document.documentElement);
    const color = (name: string) => new Color(style.getPropertyValue(name).trim());
    const back = color("--back");
    this.#scene.background = back;
    this.#cloth.color = color("--body");
    this.#hidden.color = back;
    this.#wire.color = color("--accent");
    this.#floor.clear();
    const shadow = new Mesh(new PlaneGeometry(8, 8), this.#shade);
    shadow.rotation.x = -Math.PI / 2;
    shadow.receiveShadow = true;
    const grid = new GridHelper(8, 32, color("--floor"), color("--floor"));
    Object.assign(grid.material, { transparent: true, opacity: 0.7, alphaMap: null });
    this.#floor.add(fading(back), grid, shadow);
    this.redraw();
  }

  #resize(): void {
    const { clientWidth: width, clientHeight: height } = this.canvas.parentElement!;
    if (!width || !height) return;
    this.#renderer.setSize(width, height, false);
    const aspect = width / height / (this.#compare ? 2 : 1);
    this.#camera.aspect = aspect;
    const shown = Math.max((TALL_M * height) / Math.max(height - CARDS_PX, height / 3), WIDE_M / aspect);
    this.#camera.fov = Math.min(75, (360 / Math.PI) * Math.atan(shown / 2 / EYE.length()));
    this.#camera.updateProjectionMatrix();
    this.redraw();
  }
}

/** Covers the far end of the grid with the background, so that it has no edge. */
function fading(back: Color): Mesh {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 256;
  const context = canvas.getContext("2d")!;
  const ramp = context.createRadialGradient(128, 128, 40, 128, 128, 128);
  ramp.addColorStop(0, `#${back.getHexString()}00`);
  ramp.addColorStop(1, `#${back.getHexString()}ff`);
  context.fillStyle = ramp;
  context.fillRect(0, 0, 256, 256);
  const map = new CanvasTexture(canvas);
  map.colorSpace = SRGBColorSpace;
  const material = new MeshBasicMaterial({ map, transparent: true, depthWrite: false, toneMapped: false });
  const cover = new Mesh(new PlaneGeometry(8.2, 8.2), material);
  cover.rotation.x = -Math.PI / 2;
  cover.position.y = 0.002;
  cover.renderOrder = 1;
  return cover;
}

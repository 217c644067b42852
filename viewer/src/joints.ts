/** Sliders that turn the joints: for each joint the three numbers of its axis-angle, in degrees. */

const GROUPS: Record<string, string[]> = {
  Torso: ["pelvis", "spine1", "spine2", "spine3", "neck", "head"],
  "Left arm": ["left_collar", "left_shoulder", "left_elbow", "left_wrist", "left_hand"],
  "Right arm": ["right_collar", "right_shoulder", "right_elbow", "right_wrist", "right_hand"],
  "Left leg": ["left_hip", "left_knee", "left_ankle", "left_foot"],
  "Right leg": ["right_hip", "right_knee", "right_ankle", "right_foot"],
};
const DEGREES = 180 / Math.PI;
const MOST = 150;

interface Slider {
  input: HTMLInputElement;
  output: HTMLOutputElement;
  group: HTMLDetailsElement;
}

export class JointSliders {
  readonly #sliders: Slider[] = [];

  /** @param onTurn a slider was moved: the place in the pose, and its new value in radians. */
  constructor(parent: HTMLElement, names: string[], onTurn: (index: number, radians: number) => void) {
    parent.querySelectorAll("details").forEach((old) => old.remove());
    for (const [title, joints] of Object.entries(GROUPS)) {
      const group = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = title;
      group.append(summary);
      for (const name of joints) group.append(this.#joint(name, names.indexOf(name), group, onTurn));
      parent.append(group);
    }
  }

  /** Show a pose of 72 numbers, in the groups that are open. */
  show(pose: ArrayLike<number>): void {
    this.#sliders.forEach(({ input, output, group }, index) => {
      if (!group.open || input === document.activeElement) return;
      write(input, output, pose[index]);
    });
  }

  #joint(name: string, joint: number, group: HTMLDetailsElement, onTurn: (index: number, radians: number) => void): HTMLElement {
    const field = document.createElement("fieldset");
    field.className = "joint";
    const legend = document.createElement("legend");
    const said = name.replace(/_/g, " ").replace(/(\d)/, " $1");
    legend.textContent = said;
    field.append(legend);
    ["x", "y", "z"].forEach((axis, n) => {
      const input = document.createElement("input");
      Object.assign(input, { type: "range", min: -MOST, max: MOST, step: 1, value: 0, name: `${name}.${axis}` });
      input.setAttribute("aria-label", `${said} ${axis}, degrees`);
      const output = document.createElement("output");
      output.textContent = "0°";
      const label = document.createElement("span");
      label.className = "quiet";
      label.textContent = axis;
      input.addEventListener("input", () => {
        output.textContent = `${input.value}°`;
        onTurn(3 * joint + n, Number(input.value) / DEGREES);
      });
      field.append(label, input, output);
      this.#sliders[3 * joint + n] = { input, output, group };
    });
    return field;
  }
}

function write(input: HTMLInputElement, output: HTMLOutputElement, radians: number): void {
  const degrees = String(Math.round(radians * DEGREES));
  if (input.value === degrees) return;
  input.value = degrees;
  output.textContent = `${degrees}°`;
}

/** Corrective shapes and their weighted sum: nearly all the work of a baked avatar, so it is done in WebAssembly. */

/** `shapes.wat`, assembled: `npx -p wabt wat2wasm --enable-simd`; its test assembles it again. */
export const DOT_WASM =
  "AGFzbQEAAAABCQFgBX9/f39/AAMCAQAFAwEAAAcQAgZtZW1vcnkCAANkb3QAAAqJAQGGAQIBfwF7A0D9DAAAAAAAAAAAAAAAAAAAAAAhBkEAIQUD" +
  "QCAGIAAgBWr9AQMAIAEgBUEBdGr9AAQA/boB/a4BIQYgBUEIaiEFIAUgAkkNAAsgAyAG/RsAIAb9GwFqIAb9GwIgBv0bA2pqNgIAIAAgAmohACAD" +
  "QQRqIQMgBEEBayEEIAQNAAsL";
const PAGE_BYTES = 65536;
const FULL = 32767;

export class Shapes {
  readonly #dot: (shapes: number, factors: number, width: number, sums: number, count: number) => void;
  readonly #width: number;
  readonly #factors: Int16Array;
  readonly #sums: Int32Array;

  /**
   * @param shapes of up to 512, the signed bytes of each: x, y, z and a byte that is nothing, for every vertex.
   * @throws Error without WebAssembly SIMD, which browsers have since 2023, or where the page's policy forbids it
   *   (`script-src 'wasm-unsafe-eval'` allows it).
   */
  constructor(shapes: Int8Array[]) {
    const numbers = (3 * shapes[0].length) / 4;
    // What the shapes add to the first number of the surface lies side by side, then what they add to the second.
    this.#width = 8 * Math.ceil(shapes.length / 8);
    const factorsAt = 16 * Math.ceil((this.#width * numbers) / 16);
    const sumsAt = factorsAt + 2 * this.#width;
    const { memory, dot } = instance();
    memory.grow(Math.ceil((sumsAt + 4 * numbers) / PAGE_BYTES));
    const all = new Int8Array(memory.buffer, 0, this.#width * numbers);
    shapes.forEach((shape, k) => {
      for (let n = 0; n < numbers; n++) all[n * this.#width + k] = shape[n + Math.floor(n / 3)];
    });
    this.#dot = dot;
    this.#factors = new Int16Array(memory.buffer, factorsAt, this.#width);
    this.#sums = new Int32Array(memory.buffer, sumsAt, numbers);
  }

  /** out += sum_k weights[k] shapes[k], in 127ths; weights are rounded to 32767ths of the largest. */
  addTo(out: Float32Array, weights: ArrayLike<number>): void {
    let largest = 1e-12;
    for (let k = 0; k < weights.length; k++) largest = Math.max(largest, Math.abs(weights[k]));
    for (let k = 0; k < weights.length; k++) this.#factors[k] = Math.round((FULL / largest) * weights[k]);
    const sums = this.#sums;
    this.#dot(0, this.#factors.byteOffset, this.#width, sums.byteOffset, sums.length);
    const unit = largest / FULL / 127;
    for (let n = 0; n < out.length; n++) out[n] += unit * sums[n];
  }
}

function instance(): { memory: WebAssembly.Memory; dot: (...numbers: number[]) => void } {
  const bytes = Uint8Array.from(atob(DOT_WASM), (letter) => letter.charCodeAt(0));
  try {
    return new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports as any;
  } catch (error) {
    throw new Error("a baked avatar needs WebAssembly with SIMD, which is not there or not allowed", { cause: error });
  }
}

/** Rigid transforms: 3 x 4, row by row, acting on column vectors. */

export type Transform = Float64Array;

/** Rotation by the axis-angle (x, y, z) about the point `centre` (Rodrigues). */
export function rotationAbout(x: number, y: number, z: number, centre: ArrayLike<number>): Transform {
  const angle = Math.hypot(x, y, z);
  const half = angle / 2;
  // sin(t) / t and (1 - cos t) / t^2, finite at 0.
  const first = angle > 1e-6 ? Math.sin(angle) / angle : 1;
  const second = angle > 1e-6 ? 0.5 * (Math.sin(half) / half) ** 2 : 0.5;
  const xx = second * x * x;
  const yy = second * y * y;
  const zz = second * z * z;
  const [xy, xz, yz] = [second * x * y, second * x * z, second * y * z];
  const r = [
    1 - yy - zz, xy - first * z, xz + first * y,
    xy + first * z, 1 - xx - zz, yz - first * x,
    xz - first * y, yz + first * x, 1 - xx - yy,
  ];
  const transform = new Float64Array(12);
  for (let row = 0; row < 3; row++) {
    let moved = centre[row];
    for (let column = 0; column < 3; column++) {
      transform[4 * row + column] = r[3 * row + column];
      moved -= r[3 * row + column] * centre[column];
    }
    transform[4 * row + 3] = moved;
  }
  return transform;
}

export function product(a: Transform, b: Transform): Transform {
  const out = new Float64Array(12);
  for (let row = 0; row < 12; row += 4) {
    for (let column = 0; column < 4; column++) {
      out[row + column] = a[row] * b[column] + a[row + 1] * b[4 + column] + a[row + 2] * b[8 + column];
    }
    out[row + 3] += a[row + 3];
  }
  return out;
}

/** Of a rigid transform. */
export function inverted(a: Transform): Transform {
  const out = new Float64Array(12);
  for (let row = 0; row < 3; row++) {
    for (let column = 0; column < 3; column++) {
      out[4 * row + column] = a[4 * column + row];
      out[4 * row + 3] -= a[4 * column + row] * a[4 * column + 3];
    }
  }
  return out;
}

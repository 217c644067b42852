/** Client of the Reposer service. */
export * from "./baked.js";
export * from "./frames.js";
export * from "./poses.js";
export * from "./problem.js";
export * from "./rest.js";
export * from "./skeleton.js";
export * from "./stream.js";

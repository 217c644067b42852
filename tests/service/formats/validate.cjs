// Prints the Khronos validator's report of each GLB named on the command line, one JSON line a file.
const { readFileSync } = require("node:fs");
const validator = require("gltf-validator");

(async () => {
  for (const file of process.argv.slice(2)) {
    const report = await validator.validateBytes(new Uint8Array(readFileSync(file)), { maxIssues: 20 });
    console.log(JSON.stringify(report.issues));
  }
})();

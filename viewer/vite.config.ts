import { defineConfig } from "vite";

export default defineConfig({
  // Relative addresses: the page works below any path of a reverse proxy.
  base: "./",
  build: {
    target: "es2022",
    assetsDir: "viewer", // what the service hands out without a key
    // The page forbids inline scripts.
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    license: { fileName: "viewer/licenses.md" }, // of what is bundled: three and fzstd, both MIT
    chunkSizeWarningLimit: 1000,
  },
  // `npm run dev` with a service running beside it.
  server: { proxy: { "/avatars": { target: "http://127.0.0.1:8000", ws: true } } },
});

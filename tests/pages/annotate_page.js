// Runs the script of `pytc annotate` on a page without a browser: one click of the brush, and what is drawn and sent.
// node annotate_page.js SCRIPT STATE WIDTH HEIGHT X Y
"use strict";
const fs = require("fs");
const [script, state, width, height, x, y] = process.argv.slice(2);
const { shape, margin, classes } = JSON.parse(state);
const bytes = { raw: new Uint8Array((shape[1] + 2 * margin[1]) * (shape[2] + 2 * margin[2])), labels: new Uint8Array(shape[1] * shape[2]) };
const found = { images: [], strokes: [] };
const handlers = {};
const context = () => new Proxy({}, {
  get: (_, name) => (...given) => { if (name === "drawImage") found.images.push(given.slice(1)); },
  set: () => true,
});
const element = (id) => ({
  id, value: { size: "9", low: "0", high: "255", alpha: "50" }[id] ?? "1", checked: true, width: 128, height: 128,
  clientWidth: Number(width), clientHeight: Number(height), textContent: id === "state" ? state : "", children: [], style: {},
  classList: { toggle() {} }, append() {}, setPointerCapture() {}, getContext: context, addEventListener(kind, act) { handlers[`${id} ${kind}`] = act; },
});
const elements = {};
const get = (id) => (elements[id] ??= element(id));
Object.assign(globalThis, {
  document: {
    getElementById: get, createElement: () => element(""), activeElement: null,
    querySelector: (name) => (name.includes("[name=draws]") ? { value: "class" } : name.includes("[name=tool]") ? { value: "brush" } : element("")),
  },
  OffscreenCanvas: class { getContext() { return context(); } },
  ImageData: class { constructor(w, h) { this.data = new Uint8Array(4 * w * h); } },
  ResizeObserver: class { constructor(act) { this.act = act; } observe() { this.act(); } },
  location: { pathname: "/", hash: "" }, history: { replaceState() {} }, devicePixelRatio: 1, addEventListener() {},
  requestAnimationFrame: (act) => setTimeout(act, 0),
  fetch: async (address, how) => {
    if (how) found.strokes.push({ address, values: [...how.body] });
    return { ok: true, arrayBuffer: async () => bytes[address.startsWith("/raw") ? "raw" : "labels"].slice().buffer };
  },
});
(0, eval)(fs.readFileSync(script, "utf8"));
setTimeout(() => {
  found.images.length = 0;
  const event = { pointerId: 1, button: 0, offsetX: Number(x), offsetY: Number(y), preventDefault() {} };
  for (const kind of ["pointerdown", "pointerup"]) handlers[`view ${kind}`](event);
  setTimeout(() => { console.log(JSON.stringify(found)); process.exit(0); }, 100);
}, 300);

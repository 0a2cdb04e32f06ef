// Decodes Draco fragments with neuroglancer's own decoder: node decode_draco.mjs DECODER.wasm < requests > answers
import { readFileSync } from "node:fs";

let mesh;
let parts = 1;
const env = {
  emscripten_notify_memory_growth: () => {},
  neuroglancer_draco_receive_decoded_mesh: (faces, vertices, indices, positions, offsets) => {
    const memory = instance.exports.memory.buffer;
    mesh = {
      faces: [...new Uint32Array(memory, indices, 3 * faces)],
      vertices: [...new Uint32Array(memory, positions, 3 * vertices)],
      offsets: [...new Uint32Array(memory, offsets, parts + 1)],
    };
  },
};
const wasi = { proc_exit: (code) => { throw new Error(`exit ${code}`); } };
const module = await WebAssembly.compile(readFileSync(process.argv[2]));
const instance = await WebAssembly.instantiate(module, { env, wasi_snapshot_preview1: wasi });
instance.exports._initialize();

const answers = JSON.parse(readFileSync(0, "utf8")).map(({ data, partition }) => {
  const bytes = Buffer.from(data, "base64");
  const at = instance.exports.malloc(bytes.length);
  new Uint8Array(instance.exports.memory.buffer).set(bytes, at);
  parts = partition ? 8 : 1;
  mesh = undefined;
  const code = instance.exports.neuroglancer_draco_decode(at, bytes.length, partition, 16, true);
  return code === 0 ? mesh : { code };
});
console.log(JSON.stringify(answers));

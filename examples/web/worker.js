// The network, beside the page so that the page stays responsive.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

// Threads need a page that is served with COOP and COEP headers; onnxruntime-web takes one otherwise.
ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;

async function open() {
  const answer = await fetch("engine.onnx");
  if (!answer.ok) throw new Error("engine.onnx is missing: see README.md for the command that makes it.");
  const bytes = new Uint8Array(await answer.arrayBuffer());
  // The manifest is JSON in the metadata, at the end of the file.
  const tail = new TextDecoder("latin1").decode(bytes.subarray(-65536));
  const said = (name) => tail.match(new RegExp(`"${name}": "?([^",}]+)`))?.[1];
  if (said("input") !== "any size" || said("output") !== "float32") {
    throw new Error("engine.onnx does not scale by itself: make it with trace-sdk export ENGINE -o engine.onnx --any-size");
  }
  return [await ort.InferenceSession.create(bytes), Number(said("threshold"))];
}

const opened = open();
opened.then(
  ([, threshold]) => postMessage({ ready: true, threshold }),
  (error) => postMessage({ error: error.message }),
);

onmessage = async ({ data: { turn, rgb, height, width } }) => {
  try {
    const [session] = await opened;
    const start = performance.now();
    const image = new ort.Tensor("uint8", new Uint8Array(rgb), [1, height, width, 3]);
    const { edge_probability: edges } = await session.run({ image });
    postMessage({ turn, edges: edges.data, milliseconds: performance.now() - start });
  } catch (error) {
    postMessage({ error: error.message });
  }
};

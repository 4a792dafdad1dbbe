// Instance edges of a PNG with an engine of trace-sdk, without Python: node detect.js ENGINE.onnx PHOTO.png EDGES.png
import { readFileSync, writeFileSync } from "node:fs";
import ort from "onnxruntime-node";
import { PNG } from "pngjs";

const [engine, photo, out] = process.argv.slice(2);
if (!out) {
  console.error("usage: node detect.js ENGINE.onnx PHOTO.png EDGES.png");
  process.exit(2);
}

const { width, height, data } = PNG.sync.read(readFileSync(photo)); // RGBA
const rgb = data.filter((_, index) => index % 4 < 3);
const session = await ort.InferenceSession.create(engine);
const image = new ort.Tensor("uint8", rgb, [1, height, width, 3]);
const { edge_probability: edges } = await session.run({ image });
if (edges.dims[1] !== height || edges.type !== "uint8") {
  console.error(`${engine}: make it with trace-sdk export ENGINE -o OUT --any-size --output uint8`);
  process.exit(1);
}

const grey = new PNG({ width, height });
edges.data.forEach((value, index) => grey.data.set([value, value, value, 255], 4 * index));
writeFileSync(out, PNG.sync.write(grey));
console.log(`${out}: ${width}x${height}`);

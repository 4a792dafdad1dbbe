// Instance edges of a PNG with an engine of trace-sdk, without Python: node detect.js ENGINE.onnx PHOTO.png EDGES.png
import { readFileSync, writeFileSync } from "node:fs";
import ort from "onnxruntime-node";
import { PNG } from "pngjs";

const [engine, photo, out] = process.argv.slice(2);
if (!out) {
  console.error("usage: node detect.js ENGINE.onnx PHOTO.png EDGES.png");
  process.exit(2);
}

const STEP = 8; // multiple_of and min_size of the pixel engines' manifests (trace-sdk info ENGINE)
const SMALLEST = 64;
const padded = (length) => Math.max(Math.ceil(length / STEP) * STEP, SMALLEST);

const { width, height, data } = PNG.sync.read(readFileSync(photo)); // RGBA
const [rows, columns] = [padded(height), padded(width)];
const pixels = new Uint8Array(rows * columns * 3);
for (let row = 0; row < rows; row++) {
  for (let column = 0; column < columns; column++) {
    // Beyond the photo its border is repeated, so that it makes no edge.
    const from = 4 * (Math.min(row, height - 1) * width + Math.min(column, width - 1));
    pixels.set(data.subarray(from, from + 3), 3 * (row * columns + column));
  }
}

const session = await ort.InferenceSession.create(engine);
const image = new ort.Tensor("uint8", pixels, [1, rows, columns, 3]);
const { edge_probability: edges } = await session.run({ image });

const grey = new PNG({ width, height });
for (let row = 0; row < height; row++) {
  for (let column = 0; column < width; column++) {
    const value = Math.round(255 * Math.min(1, Math.max(0, edges.data[row * columns + column])));
    grey.data.set([value, value, value, 255], 4 * (row * width + column));
  }
}
writeFileSync(out, PNG.sync.write(grey));
console.log(`${out}: ${width}x${height}`);

// The page: a photo goes to the worker as RGB bytes, its edge probability comes back and is drawn over it.
const find = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let photo; // ImageData
let edges; // of this photo: Float32Array, one probability a pixel
let next; // ImageData of the photo that the worker has
let turn = 0; // how many files were chosen; what belongs to an earlier one comes too late

worker.onmessage = ({ data }) => {
  if (data.error) {
    find("status").textContent = data.error;
  } else if (data.ready) {
    find("threshold").value = data.threshold;
    find("status").textContent = "Ready.";
  } else if (data.turn === turn) {
    [photo, edges] = [next, data.edges];
    globalThis.edges = edges; // for the console
    find("status").textContent = `${photo.width}×${photo.height}, ${data.milliseconds.toFixed(0)} ms`;
    find("answer").hidden = false;
    draw();
  }
};
worker.onerror = (event) => (find("status").textContent = `The engine does not start: ${event.message}`);

async function show(file) {
  const mine = ++turn;
  let picture;
  try {
    picture = await createImageBitmap(file); // upright, as EXIF says
  } catch {
    if (mine === turn) find("status").textContent = `${file.name} is not a picture that this browser reads.`;
    return;
  }
  if (mine !== turn) return;
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, 0, 0);
  next = context.getImageData(0, 0, canvas.width, canvas.height);
  find("status").textContent = "Looking …";
  const rgb = next.data.filter((_, index) => index % 4 < 3);
  worker.postMessage({ turn, rgb, height: next.height, width: next.width });
}

function draw() {
  const threshold = Number(find("threshold").value);
  find("value").textContent = threshold.toFixed(3);
  const shown = new ImageData(photo.width, photo.height);
  for (let pixel = 0; pixel < edges.length; pixel++) {
    const edge = edges[pixel] >= threshold;
    for (let channel = 0; channel < 3; channel++) {
      const level = photo.data[4 * pixel + channel];
      shown.data[4 * pixel + channel] = edge ? (channel === 0 ? 255 : 40) : 128 + level / 2;
    }
    shown.data[4 * pixel + 3] = 255;
  }
  const view = find("view");
  [view.width, view.height] = [photo.width, photo.height];
  view.getContext("2d").putImageData(shown, 0, 0);
}

find("threshold").oninput = draw;
find("file").onchange = (event) => event.target.files[0] && show(event.target.files[0]);
find("drop").ondragover = (event) => (event.preventDefault(), find("drop").classList.add("over"));
find("drop").ondragleave = () => find("drop").classList.remove("over");
find("drop").ondrop = (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) show(event.dataTransfer.files[0]);
};

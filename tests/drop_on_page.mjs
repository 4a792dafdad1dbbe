// node drop_on_page.mjs URL PHOTO CHROMIUM OUT: drop a photo on examples/web as a person would, and tell what came of it.
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";

const { chromium } = createRequire(`${process.cwd()}/`)("playwright-core");
const [url, photo, executablePath, out] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args: [...args, "--disable-component-update", "--disable-sync"] });
const page = await browser.newPage({ viewport: { width: 900, height: 1000 } });
const requests = [];
const said = [];
page.on("request", (request) => requests.push(`${request.method()} ${request.url()}`));
page.on("console", (message) => message.type() === "error" && said.push(message.text()));
page.on("pageerror", (error) => said.push(String(error)));
const status = () => page.locator("#status").textContent();
const settled = (start) => page.waitForFunction((text) => !document.getElementById("status").textContent.startsWith(text), start, { timeout: 90_000 });

await page.goto(url);
await settled("Loading");
const loaded = { status: await status(), requests: requests.length };
const result = { loaded: loaded.status };
if (loaded.status === "Ready.") {
  result.threshold = await page.locator("#threshold").inputValue();
  const transfer = await page.evaluateHandle((bytes) => {
    const files = new DataTransfer();
    files.items.add(new File([new Uint8Array(bytes)], "photo.png"));
    return files;
  }, [...readFileSync(photo)]);
  await page.dispatchEvent("#drop", "drop", { dataTransfer: transfer });
  await page.waitForFunction(() => document.getElementById("status").textContent.endsWith("ms"), null, { timeout: 200_000 });
  result.status = await status();
  result.edges = await page.evaluate(() => Array.from(globalThis.edges));
  result.sent = requests.slice(loaded.requests);
  const red = () =>
    page.evaluate(() => {
      const view = document.getElementById("view");
      const { data } = view.getContext("2d").getImageData(0, 0, view.width, view.height);
      return data.filter((value, index) => index % 4 === 1 && value === 40 && data[index - 1] === 255).length;
    });
  result.red = {};
  for (const threshold of ["0.10", "0.30", "0.60"]) {
    await page.locator("#threshold").fill(threshold);
    result.red[threshold] = await red();
  }
  await page.locator("#threshold").fill(result.threshold);
  await page.screenshot({ path: `${out}.png` });
  // Another photo, and this one before that has its answer: the worker gets both when both were sent.
  result.shown = await page.evaluate(async (bytes) => {
    const [send, held, shown, status] = [Worker.prototype.postMessage, [], [], document.getElementById("status")];
    Worker.prototype.postMessage = function (message) {
      held.push(() => send.call(this, message));
    };
    const until = async (done) => {
      while (!done()) await new Promise((resolve) => setTimeout(resolve, 10));
    };
    new MutationObserver(() => shown.push([status.textContent, globalThis.edges.length])).observe(status, { childList: true });
    const canvas = new OffscreenCanvas(64, 48);
    canvas.getContext("2d").fillRect(0, 0, 32, 48);
    const other = await canvas.convertToBlob();
    for (const [number, file] of [other, new Blob([new Uint8Array(bytes)])].entries()) {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([file], "photo.png"));
      document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer }));
      await until(() => held.length > number);
    }
    Worker.prototype.postMessage = send;
    held.forEach((go) => go());
    await until(() => status.textContent.startsWith("301") && shown.at(-1)[1] === 301 * 175);
    return shown.filter(([text]) => text.endsWith("ms"));
  }, [...readFileSync(photo)]);
  await page.locator("#file").setInputFiles({ name: "x.txt", mimeType: "text/plain", buffer: Buffer.from("text") });
  await page.waitForFunction(() => document.getElementById("status").textContent.includes("not a picture"));
}
result.requests = requests;
result.errors = said;
writeFileSync(out, JSON.stringify(result));
await browser.close();

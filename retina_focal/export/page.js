"use strict";
// The page of an exported model; `#metadata`, `#library`, `#wasm` and `#model` lie in it.

const byId = id => document.getElementById(id);
const metadata = JSON.parse(byId("metadata").textContent);
const state = { found: [], picture: null, width: 0, height: 0, number: 0 };

/** The bytes of what lies gzipped, as base64, in an element; its text is let go. */
async function unpack(id) {
  const text = byId(id).textContent;
  byId(id).remove();
  const packed = Uint8Array.from(atob(text), x => x.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** onnxruntime-web and a session of the model, both from this file. */
async function open() {
  const source = new Blob([await unpack("library")], { type: "text/javascript" });
  const ort = await import(URL.createObjectURL(source));
  ort.env.wasm.wasmBinary = await unpack("wasm");
  ort.env.wasm.numThreads = 1;  // more need a server that sets headers
  const options = { executionProviders: ["wasm"] };
  const session = await ort.InferenceSession.create(new Uint8Array(await unpack("model")), options);
  return { ort, session };
}

/** Width and height for the model, as detectron2's ResizeShortestEdge has them. */
function modelSize(width, height) {
  const { kind, min, max } = metadata.resize;
  if (kind === "none") return [width, height];
  const short = Math.min(width, height);
  const sides = [width, height].map(x => x === short ? min : min / short * x);
  const longest = Math.max(...sides);
  const scale = longest > max ? max / longest : 1;
  return sides.map(x => Math.floor(x * scale + 0.5));
}

/** Pillow's weights of each output pixel: a triangle as wide as the scale, in units of 2^-22. */
function weights(from, to) {
  const scale = from / to, support = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const last = Math.min(from, Math.trunc(center + support + 0.5));
    const values = [];
    for (let x = first; x < last; x++) {
      values.push(Math.max(0, 1 - Math.abs((x - center + 0.5) * (1 / support))));
    }
    const sum = values.reduce((a, b) => a + b, 0);
    return { first, values: values.map(x => Math.floor(0.5 + x / sum * (1 << 22))) };
  });
}

/** `lines` lines of RGB resampled along one side, each rounded to 8 bits. */
function resample(pixels, from, to, lines, along, across, newAlong, newAcross) {
  const out = new Uint8ClampedArray(lines * to * 3);
  weights(from, to).forEach(({ first, values }, i) => {
    for (let line = 0; line < lines; line++) {
      const start = line * across + first * along, target = line * newAcross + i * newAlong;
      for (let c = 0; c < 3; c++) {
        let sum = 1 << 21;
        for (let k = 0; k < values.length; k++) sum += pixels[start + k * along + c] * values[k];
        out[target + c] = sum >> 22;
      }
    }
  });
  return out;
}

/** RGB of (height, width) resized as Pillow does with BILINEAR: exactly, unlike a canvas. */
function resize(rgb, width, height, newWidth, newHeight) {
  const across = (pixels, rows) => newWidth === width ? pixels
    : resample(pixels, width, newWidth, rows, 3, width * 3, 3, newWidth * 3);
  const down = (pixels, columns) => newHeight === height ? pixels
    : resample(pixels, height, newHeight, columns, columns * 3, 3, columns * 3, 3);
  // Each pass rounds, so their order counts: it is that of Pillow 13.
  const isDownFirst = height - newHeight > Math.max(0, 2 * (width - newWidth));
  return isDownFirst ? across(down(rgb, width), newHeight) : down(across(rgb, height), newWidth);
}

/** Width and height that the first bytes of a PNG, GIF, BMP or JPEG tell; null: others. */
async function sizeOf(file) {
  const view = new DataView(await file.slice(0, 1 << 20).arrayBuffer());
  const at = (type, offset, little) => offset + 4 <= view.byteLength ? view[type](offset, little) : 0;
  const head = at("getUint32", 0);
  if (head === 0x89504e47) return [at("getUint32", 16), at("getUint32", 20)];
  if (head === 0x47494638) return [at("getUint16", 6, true), at("getUint16", 8, true)];
  if (head >>> 16 === 0x424d) return [at("getInt32", 18, true), Math.abs(at("getInt32", 22, true))];
  if (head >>> 16 !== 0xffd8) return null;
  for (let i = 2; i + 9 < view.byteLength; i += 2 + at("getUint16", i + 2)) {
    const marker = at("getUint16", i);
    if (marker >>> 8 !== 0xff) return null;
    const isFrame = marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker);
    if (isFrame) return [at("getUint16", i + 7), at("getUint16", i + 5)];
  }
  return null;
}

/** Refuse what would freeze the page: decoding asks for 4 bytes per pixel, several times. */
function expectFew(width, height) {
  if (width * height <= 178956970) return;  // as Pillow
  throw new Error(`its ${width} x ${height} pixels are more than 178 million; make it smaller`);
}

/** The pixels of a picture file, turned by its EXIF orientation, its colours as they are stored. */
async function read(file) {
  expectFew(...(await sizeOf(file) ?? [0, 0]));
  const bitmap = await createImageBitmap(file, {
    imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none",
  });
  expectFew(bitmap.width, bitmap.height);
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, bitmap.width, bitmap.height).data;
  const rgb = new Uint8ClampedArray(rgba.length / 4 * 3);
  for (let i = 0, j = 0; i < rgba.length; i += 4, j += 3) {
    rgb[j] = rgba[i];
    rgb[j + 1] = rgba[i + 1];
    rgb[j + 2] = rgba[i + 2];
  }
  return { bitmap, rgb };
}

/** What the model reads: as its metadata says. */
function tensor(ort, rgb, width, height) {
  const order = metadata.input.format === "BGR" ? [2, 1, 0] : [0, 1, 2];
  const area = width * height;
  if (metadata.input.dtype === "uint8") {
    const values = Uint8Array.from(rgb, (_, i) => rgb[i - i % 3 + order[i % 3]]);
    return new ort.Tensor("uint8", values, [1, height, width, 3]);
  }
  const values = new Float32Array(3 * area);
  order.forEach((channel, c) => {
    for (let i = 0; i < area; i++) values[c * area + i] = rgb[3 * i + channel];
  });
  return new ort.Tensor("float32", values, [1, 3, height, width]);
}

function iou(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  const both = Math.max(0, width) * Math.max(0, height);
  const area = x => (x[2] - x[0]) * (x[3] - x[1]);
  return both / Math.max(area(a) + area(b) - both, 1e-9);
}

/** What non-maximum suppression keeps, where the model leaves it to its user. */
function suppress(rows) {
  const kept = [];
  for (const row of rows.sort((a, b) => b.score - a.score)) {
    if (kept.length === metadata.detections_per_image) break;
    const rivals = kept.filter(x => metadata.class_agnostic_nms || x.label === row.label);
    if (rivals.every(x => iou(x.box, row.box) <= metadata.nms_thresh)) kept.push(row);
  }
  return kept;
}

/** {box, score, label} of each object in a picture file, boxes in its pixels, by falling score. */
async function detect(opened, file) {
  const { ort, session } = opened;
  const { bitmap, rgb } = await read(file);
  const { width, height } = bitmap;
  const [newWidth, newHeight] = modelSize(width, height);
  if (!newWidth || !newHeight) throw new Error(`it has ${width} x ${height} pixels`);
  const input = tensor(ort, resize(rgb, width, height, newWidth, newHeight), newWidth, newHeight);
  const { boxes, scores, classes } = await session.run({ image: input });
  let rows = Array.from(scores.data, (score, i) => (
    { score, label: Number(classes.data[i]), box: boxes.data.slice(4 * i, 4 * i + 4) }
  )).filter(x => x.label >= 0);
  if (metadata.nms === "outside") rows = suppress(rows);
  const sides = [width, height, width, height];
  const scales = [width / newWidth, height / newHeight, width / newWidth, height / newHeight];
  const found = rows.map(x => ({
    ...x, box: Array.from(x.box, (y, i) => Math.min(Math.max(y * scales[i], 0), sides[i])),
  })).filter(({ box }) => box[2] > box[0] && box[3] > box[1]);
  return { picture: bitmap, width, height, found };
}

const color = label => `hsl(${(label * 137.5 + 10) % 360} 85% 45%)`;

/** The picture with the boxes whose score is high enough, and the table of their classes. */
function draw() {
  const least = Number(byId("score").value);
  byId("shown").textContent = least.toFixed(2);
  if (!state.picture) return;
  const shown = state.found.filter(x => x.score >= least);
  const scale = Math.min(1, 2000 / Math.max(state.width, state.height));
  const canvas = byId("canvas"), context = canvas.getContext("2d");
  canvas.width = Math.round(state.width * scale);
  canvas.height = Math.round(state.height * scale);
  context.drawImage(state.picture, 0, 0, canvas.width, canvas.height);
  const unit = Math.max(1, canvas.width / Math.max(canvas.clientWidth, 1));  // of a screen's pixel
  context.lineWidth = 2 * unit;
  context.font = `${13 * unit}px system-ui, sans-serif`;
  context.textBaseline = "bottom";
  for (const { box, score, label } of [...shown].reverse()) {
    const [x0, y0, x1, y1] = box.map(x => x * scale);
    const text = `${metadata.classes[label]} ${score.toFixed(2)}`;
    context.strokeStyle = context.fillStyle = color(label);
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    const top = Math.max(y0, 16 * unit);
    context.fillRect(x0 - unit, top - 16 * unit, context.measureText(text).width + 6 * unit, 16 * unit);
    context.fillStyle = "white";
    context.fillText(text, x0 + 2 * unit, top);
  }
  const rows = metadata.classes.map((name, label) => (
    { name, label, scores: shown.filter(x => x.label === label).map(x => x.score) }
  )).filter(x => x.scores.length);
  byId("found").hidden = !rows.length;
  byId("found").tBodies[0].replaceChildren(...rows.map(({ name, label, scores }) => {
    const row = document.createElement("tr"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = color(label);
    for (const text of [name, scores.length, Math.max(...scores).toFixed(2)]) {
      row.insertCell().textContent = text;
    }
    row.cells[0].prepend(swatch);
    return row;
  }));
  byId("status").textContent = `${shown.length} of ${state.found.length} boxes, found in ${state.seconds} s`;
}

/** Nothing of the picture before stays beside the message about this one. */
function clear() {
  Object.assign(state, { found: [], picture: null });
  byId("canvas").width = byId("canvas").height = 0;
  byId("found").hidden = true;
}

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
  return new Promise(done => setTimeout(done, 30));  // so that it is seen before the work
}

const opened = open();
let busy = opened.then(() => say("Ready"), error => say(`This browser can't run the model: ${error.message}`, true));

/** Find what is in a file, after those that came before it. */
function take(file) {
  if (!file) return;
  busy = busy.then(async () => {
    await say(`Looking at ${file.name}`);
    try {
      const start = performance.now();
      const result = await detect(await opened, file);
      Object.assign(state, result, { seconds: ((performance.now() - start) / 1000).toFixed(1) });
      draw();
    } catch (error) {
      clear();
      await say(`${file.name} can't be used: ${error.message}`, true);
    }
    state.number += 1;
  });
}

byId("about").textContent = `${metadata.classes.join(", ")}; ${metadata.producer}`;
byId("score").addEventListener("input", draw);
byId("file").addEventListener("change", event => {
  take(event.target.files[0]);
  event.target.value = "";  // so that the same file can be chosen again
});
addEventListener("dragover", event => event.preventDefault());
addEventListener("drop", event => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
for (const [name, over] of [["dragenter", true], ["dragleave", false], ["drop", false]]) {
  byId("drop").addEventListener(name, () => byId("drop").classList.toggle("over", over));
}

// Sample media: coloured shapes, drawn here, of the kind that the demo model was trained on.

const CANVAS = 64; // units of a scene
const SIZE = 192; // pixels of a picture
const COLOURS = { red: "#d72323", green: "#28a03c", blue: "#2846dc", yellow: "#f0e132", purple: "#822da5", orange: "#f58719", cyan: "#3cd2e1", pink: "#fa96be" };
const SHAPES = ["circle", "square", "triangle", "star", "cross"];
const BACKGROUNDS = ["#f5f5f5", "#787878", "#0f0f0f"];
const DIRECTIONS = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1] };
const NUM_FRAMES = 16;
const FRAMES_PER_SECOND = 8;

/** Return {blob, thumb, name, question} of a random picture. */
export async function drawImage() {
  const [first, second] = twoThings();
  const canvas = paint([first, second], pick(BACKGROUNDS));
  return { blob: await toBlob(canvas, "image/png"), thumb: canvas.toDataURL("image/png"), name: "drawing.png", question: `what colour is the ${first.shape}?` };
}

/** Return the same for a clip: Motion JPEG in AVI, which every worker reads. */
export async function drawClip() {
  const [thing] = twoThings();
  const direction = pick(Object.keys(DIRECTIONS));
  const [dx, dy] = DIRECTIONS[direction];
  const background = pick(BACKGROUNDS);
  const frames = [];
  let middle;
  for (let i = 0; i < NUM_FRAMES; i += 1) {
    const way = 36 * (i / (NUM_FRAMES - 1) - 0.5);
    const canvas = paint([{ ...thing, x: CANVAS / 2 + dx * way, y: CANVAS / 2 + dy * way }], background);
    frames.push(new Uint8Array(await (await toBlob(canvas, "image/jpeg", 0.95)).arrayBuffer()));
    if (i === NUM_FRAMES / 2) middle = canvas;
  }
  const blob = new Blob([avi(frames, SIZE, FRAMES_PER_SECOND)], { type: "video/x-msvideo" });
  return { blob, thumb: middle.toDataURL("image/jpeg"), name: "drawing.avi", question: `which way does the ${thing.shape} move?` };
}

function twoThings() {
  const colours = shuffled(Object.keys(COLOURS));
  const shapes = shuffled(SHAPES);
  const places = shuffled([[17, 32], [47, 32]]);
  return places.map(([x, y], i) => ({ shape: shapes[i], colour: colours[i], x, y: y + between(-3, 3), radius: between(9, 11.5) }));
}

function paint(things, background) {
  const canvas = Object.assign(document.createElement("canvas"), { width: SIZE, height: SIZE });
  const pen = canvas.getContext("2d");
  pen.scale(SIZE / CANVAS, SIZE / CANVAS);
  pen.fillStyle = background;
  pen.fillRect(0, 0, CANVAS, CANVAS);
  for (const thing of things) {
    pen.fillStyle = COLOURS[thing.colour];
    pen.beginPath();
    outline(pen, thing);
    pen.fill();
  }
  return canvas;
}

function outline(pen, { shape, x, y, radius }) {
  const box = (w, h) => pen.rect(x - w * radius, y - h * radius, 2 * w * radius, 2 * h * radius);
  const polygon = (corners) => corners.forEach(([dx, dy], i) => pen[i ? "lineTo" : "moveTo"](x + dx * radius, y + dy * radius));
  if (shape === "circle") pen.arc(x, y, 0.95 * radius, 0, 2 * Math.PI);
  else if (shape === "square") box(0.85, 0.85);
  else if (shape === "cross") (box(1, 0.32), box(0.32, 1));
  else if (shape === "triangle") polygon([[0, -1], [1, 0.8], [-1, 0.8]]);
  else polygon([...Array(10).keys()].map((i) => [i % 2 ? 0.45 : 1.1, -Math.PI / 2 + (i * Math.PI) / 5]).map(([r, a]) => [r * Math.cos(a), r * Math.sin(a)]));
}

function toBlob(canvas, type, quality) {
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error(`no ${type}`))), type, quality));
}

/** Put JPEG frames into an AVI file: header, frames, index. */
function avi(frames, size, rate) {
  const largest = Math.max(...frames.map((frame) => frame.length));
  const head = list("hdrl", [
    chunk("avih", words(Math.round(1e6 / rate), largest * rate, 0, 0x10, frames.length, 0, 1, largest, size, size, 0, 0, 0, 0)),
    list("strl", [
      chunk("strh", [...ascii("vidsMJPG"), ...words(0, 0, 0, 1, rate, 0, frames.length, largest, 0xffffffff, 0), ...halves(0, 0, size, size)]),
      chunk("strf", [...words(40, size, size), ...halves(1, 24), ...ascii("MJPG"), ...words(3 * size * size, 0, 0, 0, 0)]),
    ]),
  ]);
  const index = [];
  let offset = 4;
  const body = frames.map((frame) => {
    index.push(...ascii("00dc"), ...words(0x10, offset, frame.length));
    const bytes = chunk("00dc", frame);
    offset += bytes.length;
    return bytes;
  });
  return riff("RIFF", "AVI ", [head, list("movi", body), chunk("idx1", index)]);
}

const ascii = (text) => [...text].map((character) => character.charCodeAt(0));
const words = (...numbers) => numbers.flatMap((n) => [n & 255, (n >>> 8) & 255, (n >>> 16) & 255, (n >>> 24) & 255]);
const halves = (...numbers) => numbers.flatMap((n) => [n & 255, (n >>> 8) & 255]);
const list = (type, parts) => riff("LIST", type, parts);
const riff = (name, type, parts) => chunk(name, joined([Uint8Array.from(ascii(type)), ...parts]));

function chunk(name, data) {
  const pad = data.length % 2 ? [0] : [];
  return joined([Uint8Array.from([...ascii(name), ...words(data.length)]), Uint8Array.from(data), Uint8Array.from(pad)]);
}

function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

const between = (low, high) => low + Math.random() * (high - low);
const pick = (items) => items[Math.floor(Math.random() * items.length)];
const shuffled = (items) => items.map((item) => [Math.random(), item]).sort((a, b) => a[0] - b[0]).map(([, item]) => item);

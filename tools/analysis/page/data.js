// What the page shows: reading the packed numbers, and saying them.

const parsed = JSON.parse(document.getElementById("data").textContent);

// A table is bytes, deflated and in base64: row by row a share of the way from the row's lowest value to its highest,
// in 254 steps that are equal (or equal in the logarithm); 255 is a missing value.
async function unpack(table) {
  const packed = Uint8Array.from(atob(table.bytes), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const [rows, columns] = table.shape,
    found = [];
  for (let row = 0; row < rows; row++) {
    const [low, high] = table.ranges[row],
      values = new Float32Array(columns);
    const from = table.log ? Math.log(low) : low,
      to = table.log ? Math.log(high) : high;
    for (let column = 0; column < columns; column++) {
      const step = bytes[row * columns + column],
        value = from + ((to - from) * step) / 254;
      values[column] = step === 255 ? NaN : table.log ? Math.exp(value) : value;
    }
    found.push(values);
  }
  return found;
}

async function unpackAll(node) {
  if (node === null || typeof node !== "object") return node;
  if (node.bytes !== undefined) return unpack(node);
  if (Array.isArray(node)) return Promise.all(node.map(unpackAll));
  const pairs = await Promise.all(Object.entries(node).map(async ([key, value]) => [key, await unpackAll(value)]));
  return Object.fromEntries(pairs);
}

const number = (value) => value.toLocaleString("en-US");

function short(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5))
    return value.toExponential(Math.max(digits - 2, 0)).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

const visible = (text) =>
  text
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f\u007f]/g, "·");

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "rect", "text", "circle"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"].map((code) =>
  [0, 2, 4].map((at) => parseInt(code.slice(at, at + 2), 16)),
);

function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1),
    low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return VIRIDIS[low].map((from, index) => Math.round(from + (VIRIDIS[low + 1][index] - from) * (place - low)));
}

// Okabe and Ito's colours, which colour-blind readers tell apart; a line's dashes say the same once more
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "12 4"];

const look = (index, dash = index) => ({ colour: COLOURS[index % COLOURS.length], dash: DASHES[dash % DASHES.length] });

// The page: what is chosen, the figures, and how they answer to each other.

const QUANTITIES = {
  surprise: {
    name: "Surprise",
    axis: "surprise (norm of the gradient)",
    says: "Surprise is the norm of the gradient that a token's key and value would send through the memory, before clipping: how badly the memory predicted this token.",
  },
  error: {
    name: "Error",
    axis: "error |M(k) − v|²",
    says: "The squared distance between what the memory answered to the token's key and the token's value.",
  },
  step: {
    name: "Step size",
    axis: "step size θ",
    says: "How far the memory goes along the token's gradient: 0 means that the token was not written.",
  },
  momentum: {
    name: "Momentum",
    axis: "momentum η",
    says: "The share of past surprise that carries on to this token: near 1, an event goes on being written for long.",
  },
  forgetting: {
    name: "Forgetting",
    axis: "forgetting α",
    says: "The share of the memory's weights that is dropped at this token: 0.01 halves what was there in 69 tokens.",
  },
};

const chosen = {
  memory: -1,
  head: -1,
  quantity: "surprise",
  kind: "max",
  scale: "shared",
  metric: "kept",
  drift: "distance",
  gate: 0,
  low: 0,
  high: 0,
  cursor: null,
};
const figures = [],
  byId = (id) => document.getElementById(id);
let data;

// -- what is chosen ---------------------------------------------------------------------------------------------------

const heads = () =>
  data.memories.flatMap((memory, m) =>
    Array.from({ length: memory.heads }, (_, h) => ({ m, h, offset: memory.offset + h })),
  );
const visibleHeads = () =>
  heads().filter(({ m, h }) => (chosen.memory < 0 || m === chosen.memory) && (chosen.head < 0 || h === chosen.head));
const headName = ({ m, h }) =>
  chosen.memory < 0 && data.memories.length > 1 ? `${data.memories[m].label} · head ${h}` : `head ${h}`;

// a head has its colour and a memory its dashes; more heads than colours are a ramp
function lineOf({ m, h }) {
  const many = data.memories[m].heads,
    dash = DASHES[(chosen.memory < 0 ? m : 0) % DASHES.length];
  return { colour: many <= COLOURS.length ? COLOURS[h] : `rgb(${viridis(0.2 + (0.65 * h) / (many - 1))})`, dash };
}

const values = (quantity, kind, offset) => (data.tokens[quantity][kind] || data.tokens[quantity].mean)[offset];

function choose(change) {
  Object.assign(chosen, change);
  const most =
    chosen.memory < 0 ? Math.max(...data.memories.map((memory) => memory.heads)) : data.memories[chosen.memory].heads;
  if (chosen.head >= most) chosen.head = -1;
  byId("memory").value = chosen.memory;
  fill(byId("head"), [["-1", "All heads"], ...Array.from({ length: most }, (_, h) => [h, `Head ${h}`])], chosen.head);
  draw();
}

function zoom(low, high) {
  const least = Math.min(16 * data.text.bin, data.text.shown),
    long = Math.min(Math.max(high - low, least), data.text.shown);
  chosen.low = Math.min(Math.max(low + (high - low - long) / 2, 0), data.text.shown - long);
  chosen.high = chosen.low + long;
  draw();
}

function zoomBy(factor) {
  const long = chosen.high - chosen.low,
    at = chosen.cursor === null ? (chosen.low + chosen.high) / 2 : chosen.cursor;
  zoom(at - (at - chosen.low) * factor, at - (at - chosen.low) * factor + long * factor);
}

function point(position) {
  chosen.cursor = position === null ? null : Math.min(Math.max(Math.floor(position), 0), data.text.shown - 1);
  for (const each of figures) each.point && each.point();
  const where = byId("where"),
    shown = `tokens ${number(Math.floor(chosen.low))} to ${number(Math.ceil(chosen.high))}`;
  where.textContent =
    chosen.cursor === null
      ? shown
      : `${shown} · at ${number(chosen.cursor)}: ${visible(excerptAt(chosen.cursor)) || "·"}`;
}

const excerptAt = (position) => data.text.excerpts[Math.floor(position / data.text.bin)] || "";

function draw() {
  for (const each of figures) each.draw();
  point(chosen.cursor);
}

// -- building blocks --------------------------------------------------------------------------------------------------

function fill(select, options, value) {
  select.replaceChildren(...options.map(([key, name]) => make("option", { value: key }, name)));
  select.value = value;
}

function select(name, label, options) {
  const element = make("select", { id: `${name}-choice` });
  fill(element, options, chosen[name]);
  element.addEventListener("change", () => choose({ [name]: element.value }));
  return make("label", {}, `${label} `, element);
}

function figure(id, title, caption, controls = []) {
  const plot = make("div", { class: "plot", id: `${id}-plot` }),
    keys = make("div", { class: "legend" });
  const said = make("figcaption", {}, caption),
    place = make("figure", { id });
  place.append(make("h2", {}, title));
  if (controls.length) place.append(make("div", { class: "bar" }, ...controls));
  place.append(keys, plot, said);
  byId("main").append(place);
  return { place, plot, keys, said };
}

function tip(plot, x, nodes) {
  plot.querySelector(".tip")?.remove();
  if (x === null) return;
  const box = make("div", { class: "tip" }, ...nodes);
  plot.append(box);
  const left = x + 14 + box.offsetWidth > plot.clientWidth ? x - 14 - box.offsetWidth : x + 14;
  box.style.left = `${Math.max(Math.min(left, plot.clientWidth - box.offsetWidth), 0)}px`;
  box.style.top = "24px";
}

function row(colour, name, value) {
  const line = make("div"),
    key = make("span", { class: "key" });
  if (colour) {
    key.style.background = colour;
    line.append(key);
  }
  line.append(`${name}: ${value}`);
  return line;
}

function around(position) {
  const bin = Math.floor(position / data.text.bin),
    few = data.text.bin === 1 ? 18 : 1;
  const part = (from, to) =>
    visible(data.text.excerpts.slice(Math.max(from, 0), to).join(data.text.bin === 1 ? "" : " "));
  return make(
    "div",
    { class: "around" },
    part(bin - few, bin),
    make("b", {}, part(bin, bin + 1) || "·"),
    part(bin + 1, bin + 1 + few),
  );
}

// a figure along the text: cursor, dragging, keys. `state()` is what its drawing returned, `tell(position)` its tip
function alongText(plot, state, tell, extra = {}) {
  plot.tabIndex = 0;
  let start = null,
    brush = null,
    over = false;
  const pixel = (event) => event.clientX - plot.getBoundingClientRect().left;
  plot.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" && event.button === 0) start = pixel(event);
    over = true;
    point(state().back(pixel(event)));
  });
  plot.addEventListener("pointermove", (event) => {
    over = true;
    point(state().back(pixel(event)));
    if (start === null || Math.abs(pixel(event) - start) < 5) return;
    if (!brush) {
      brush = make("rect", { class: "brush" });
      state().svg.append(brush);
      plot.setPointerCapture(event.pointerId);
    }
    const { box } = state(),
      [low, high] = [start, pixel(event)].map((x) => Math.min(Math.max(x, box.left), box.right)).sort((a, b) => a - b);
    for (const [name, value] of Object.entries({ x: low, width: high - low, y: box.top, height: box.bottom - box.top }))
      brush.setAttribute(name, value);
  });
  plot.addEventListener("pointerup", (event) => {
    const from = start,
      moved = brush !== null;
    start = brush = null;
    if (moved) zoom(...[from, pixel(event)].map((x) => state().back(x)).sort((a, b) => a - b));
    else if (extra.click) extra.click(event.clientY - plot.getBoundingClientRect().top);
  });
  plot.addEventListener("pointerleave", () => {
    over = false;
    start = null;
    brush?.remove();
    brush = null;
    point(chosen.cursor);
  });
  plot.addEventListener("blur", () => {
    over = false;
    point(chosen.cursor);
  });
  plot.addEventListener("dblclick", () => zoom(0, data.text.shown));
  plot.addEventListener("keydown", (event) => {
    const by = data.text.bin * (event.shiftKey ? 10 : 1),
      at = chosen.cursor ?? Math.floor(chosen.low);
    const actions = {
      ArrowLeft: () => point(at - by),
      ArrowRight: () => point(at + by),
      Home: () => point(chosen.low),
      End: () => point(chosen.high),
      "+": () => zoomBy(0.5),
      "=": () => zoomBy(0.5),
      "-": () => zoomBy(2),
      0: () => zoom(0, data.text.shown),
      Escape: () => {
        over = false;
        point(null);
      },
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    over = event.key !== "Escape";
    actions[event.key]();
    if (chosen.cursor !== null && (chosen.cursor < chosen.low || chosen.cursor > chosen.high)) {
      const long = chosen.high - chosen.low;
      zoom(chosen.cursor - long / 2, chosen.cursor + long / 2);
    }
  });
  return () => {
    const { svg, box, scale } = state();
    svg.querySelector(".cursor")?.remove();
    const at = chosen.cursor,
      inside = at !== null && at >= chosen.low && at <= chosen.high;
    if (inside) {
      const x = scale(at + 0.5 * (data.text.bin === 1));
      svg.append(make("line", { class: "cursor", x1: x, x2: x, y1: box.top, y2: box.bottom }));
    }
    tip(plot, inside && over ? scale(at) : null, inside && over ? tell(at) : []);
  };
}

const textAxis = () => ({ title: `position in the text (${data.text.unit}s)`, low: chosen.low, high: chosen.high });
const middle = (positions, count) => positions.map((at, index) => (at + (positions[index + 1] ?? count)) / 2);
const nearest = (positions, at) =>
  positions.reduce((best, value, index) => (Math.abs(value - at) < Math.abs(positions[best] - at) ? index : best), 0);
const centres = () => Array.from({ length: data.text.excerpts.length }, (_, bin) => (bin + 0.5) * data.text.bin);

// A chart of lines over a common axis, with a cursor; and what it shares with the heat map.

const LEFT = 58,
  RIGHT = 10,
  BELOW = 40;

function ticks(low, high, most) {
  const rough = (high - low) / Math.max(most, 1),
    power = 10 ** Math.floor(Math.log10(rough || 1));
  const step = [1, 2, 5, 10].map((times) => times * power).find((size) => size >= rough) || 1,
    found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step)
    found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high) + 1e-9; power++) {
    for (const times of [1, 2, 5]) {
      const value = times * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  const tens = found.filter((value) => Number.isInteger(Math.round(Math.log10(value) * 1e6) / 1e6));
  return found.length > 7 && tens.length > 1 ? tens : found;
}

function extent(series, from, to) {
  let low = Infinity,
    high = -Infinity;
  for (const line of series) {
    line.y.forEach((value, index) => {
      if (line.x[index] < from || line.x[index] > to || !Number.isFinite(value)) return;
      const spread = line.spread ? line.spread[index] || 0 : 0;
      low = Math.min(low, value - spread);
      high = Math.max(high, value + spread);
    });
  }
  return low <= high ? [low, high] : [0, 1];
}

function frame(plot, width, height, label) {
  plot.replaceChildren();
  const svg = make("svg", { width, height, role: "img", "aria-label": label });
  plot.append(svg);
  return svg;
}

function axisBelow(svg, box, scale, values, title, say = short) {
  for (const value of values) {
    const x = scale(value);
    svg.append(make("line", { class: "axis", x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4 }));
    const text = make("text", { x: Math.min(x, box.right - 8), y: box.bottom + 17, "text-anchor": "middle" });
    text.textContent = say(value);
    svg.append(text);
  }
  const name = make("text", {
    class: "title",
    x: (box.left + box.right) / 2,
    y: box.bottom + 34,
    "text-anchor": "middle",
  });
  name.textContent = title;
  svg.append(name);
}

// spec: series [{name, x, y, spread?, colour, dash, faint?}], x {title, low, high, log?}, y {title, log?, zero?}, tip(index of x)
function drawLines(plot, spec) {
  const width = Math.max(plot.clientWidth, 220),
    height = spec.height || (width < 520 ? 220 : 250);
  const box = { left: LEFT, right: width - RIGHT, top: 22, bottom: height - BELOW };
  const svg = frame(plot, width, height, spec.label);
  let [low, high] = spec.y.range || extent(spec.series, spec.x.low, spec.x.high);
  const log = spec.y.log && low > 0;
  if (spec.y.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  if (!spec.y.range && !log) {
    const pad = (high - low) * 0.06;
    low -= spec.y.zero && low === 0 ? 0 : pad;
    high += pad;
  }
  const bend = (value) => (spec.x.log ? Math.log2(value + 1) : value);
  const from = bend(spec.x.low),
    to = bend(spec.x.high);
  const sx = (value) => box.left + ((bend(value) - from) / (to - from || 1)) * (box.right - box.left);
  const grow = (value) => (log ? Math.log(value) : value);
  const sy = (value) => box.bottom - ((grow(value) - grow(low)) / (grow(high) - grow(low))) * (box.bottom - box.top);
  for (const value of log ? logTicks(low, high) : ticks(low, high, Math.floor((box.bottom - box.top) / 38))) {
    const y = sy(value),
      text = make("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" });
    text.textContent = short(value);
    svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }), text);
  }
  const title = make("text", { class: "title", x: 0, y: 12 });
  title.textContent = spec.y.title;
  svg.append(title);
  const values = spec.x.ticks
    ? spec.x.ticks(width)
    : ticks(spec.x.low, spec.x.high, Math.floor((box.right - box.left) / 90));
  axisBelow(svg, box, sx, values, spec.x.title, number);
  if ((low < 0 && high > 0) || spec.y.zero)
    svg.append(make("line", { class: "zero", x1: box.left, x2: box.right, y1: sy(0), y2: sy(0) }));
  svg.append(make("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const inside = (at) => at >= spec.x.low && at <= spec.x.high;
  for (const line of spec.series) {
    let path = "",
      pen = false,
      upper = [],
      lower = [];
    line.y.forEach((value, index) => {
      const shown = inside(line.x[index]) || inside(line.x[index - 1]) || inside(line.x[index + 1]);
      if (!shown || !Number.isFinite(value) || (log && value <= 0)) {
        pen = false;
        return;
      }
      const x = Math.min(Math.max(sx(line.x[index]), box.left), box.right),
        y = Math.min(Math.max(sy(value), box.top), box.bottom);
      path += `${pen ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = true;
      if (line.spread) {
        upper.push(`${x.toFixed(1)} ${sy(value + (line.spread[index] || 0)).toFixed(1)}`);
        lower.unshift(`${x.toFixed(1)} ${sy(value - (line.spread[index] || 0)).toFixed(1)}`);
      }
    });
    if (upper.length > 1)
      svg.append(
        make("path", {
          d: `M${[...upper, ...lower].join("L")}Z`,
          fill: line.colour,
          opacity: line.faint ? 0.06 : 0.18,
        }),
      );
    svg.append(
      make("path", {
        class: "line",
        d: path,
        fill: "none",
        stroke: line.colour,
        "stroke-width": line.faint ? 1.2 : 2,
        "stroke-dasharray": line.dash || null,
        opacity: line.faint ? 0.35 : 1,
        "stroke-linejoin": "round",
      }),
    );
  }
  return {
    svg,
    box,
    scale: sx,
    back: (pixel) => {
      const at =
        from + ((Math.min(Math.max(pixel, box.left), box.right) - box.left) / (box.right - box.left)) * (to - from);
      return spec.x.log ? 2 ** at - 1 : at;
    },
  };
}

function drawBars(plot, spec) {
  const width = Math.max(plot.clientWidth, 220),
    height = 190,
    box = { left: LEFT, right: width - RIGHT, top: 22, bottom: height - BELOW };
  const svg = frame(plot, width, height, spec.label),
    most = Math.max(...spec.counts, 1),
    total = spec.counts.reduce((a, b) => a + b, 0) || 1;
  const sx = (share) => box.left + share * (box.right - box.left),
    wide = (box.right - box.left) / spec.counts.length;
  spec.counts.forEach((count, index) => {
    const tall = (count / most) * (box.bottom - box.top);
    const bar = make("rect", {
      class: "line",
      x: sx(index / spec.counts.length) + 0.5,
      y: box.bottom - tall,
      width: Math.max(wide - 1, 1),
      height: tall,
      fill: spec.colour,
    });
    bar.append(
      Object.assign(document.createElementNS("http://www.w3.org/2000/svg", "title"), {
        textContent: `${short(spec.edges[index])} to ${short(spec.edges[index + 1])}: ${short((count / total) * 100)}%`,
      }),
    );
    svg.append(bar);
  });
  for (const share of ticks(0, (most / total) * 100, 3)) {
    const y = box.bottom - (((share / 100) * total) / most) * (box.bottom - box.top),
      text = make("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" });
    text.textContent = `${short(share)}%`;
    svg.append(make("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }), text);
  }
  const title = make("text", { class: "title", x: 0, y: 12 });
  title.textContent = spec.y;
  svg.append(title, make("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const many = width < 520 ? 4 : 8,
    step = Math.ceil(spec.counts.length / many);
  const marks = spec.edges.map((_, index) => index).filter((index) => index % step === 0);
  axisBelow(
    svg,
    box,
    (index) => sx(index / spec.counts.length),
    marks,
    spec.x,
    (index) => short(spec.edges[index], 2),
  );
}

function legend(place, entries) {
  place.replaceChildren(
    ...entries.map((entry) => {
      const key = make("svg", { width: 26, height: 8 });
      key.append(
        make("line", {
          x1: 0,
          x2: 26,
          y1: 4,
          y2: 4,
          stroke: entry.colour,
          "stroke-width": 2.5,
          "stroke-dasharray": entry.dash || null,
        }),
      );
      return make("span", {}, key, entry.name);
    }),
  );
}

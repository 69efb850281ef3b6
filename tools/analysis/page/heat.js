// The heat map: a row for each head, a column of pixels for the tokens under it.

// kind "max" shows the largest value under a pixel, "mean" their mean
function drawHeat(plot, spec) {
  const width = Math.max(plot.clientWidth, 220),
    rows = spec.rows.length;
  const tall = Math.min(Math.max(Math.floor(360 / rows), 5), 26),
    height = 8 + tall * rows + BELOW;
  const left = spec.rows.some((row) => row.label) ? spec.gutter : 8;
  const box = { left, right: width - RIGHT, top: 4, bottom: 4 + tall * rows };
  const svg = frame(plot, width, height, spec.label),
    pixels = Math.max(Math.floor(box.right - box.left), 1);
  const canvas = make("canvas", { width: pixels, height: rows });
  Object.assign(canvas.style, {
    left: `${box.left}px`,
    top: `${box.top}px`,
    width: `${box.right - box.left}px`,
    height: `${tall * rows}px`,
  });
  plot.prepend(canvas);
  const context = canvas.getContext("2d"),
    picture = context.createImageData(pixels, rows);
  const first = spec.low / spec.bin,
    count = (spec.high - spec.low) / spec.bin;
  spec.rows.forEach((row, index) => {
    const values = columns(spec.kind === "max" ? row.max : row.mean, first, count, pixels, spec.kind);
    values.forEach((value, column) => {
      const at = 4 * (index * pixels + column),
        share = row.share(value);
      const [red, green, blue] = Number.isFinite(share) ? viridis(share) : [128, 128, 128];
      picture.data.set([red, green, blue, Number.isFinite(share) ? 255 : 70], at);
    });
  });
  context.putImageData(picture, 0, 0);
  spec.rows.forEach((row, index) => {
    if (row.begins && index)
      svg.append(
        make("line", {
          x1: 0,
          x2: box.right,
          y1: box.top + index * tall,
          y2: box.top + index * tall,
          stroke: "var(--card)",
          "stroke-width": 2,
        }),
      );
    if (!row.label || tall * row.span < 11) return;
    const text = make("text", {
      x: box.left - 6,
      y: box.top + (index + row.span / 2) * tall + 4,
      "text-anchor": "end",
    });
    text.textContent = row.label;
    svg.append(text);
  });
  const scale = (position) => box.left + ((position - spec.low) / (spec.high - spec.low)) * (box.right - box.left);
  axisBelow(svg, box, scale, ticks(spec.low, spec.high, Math.floor((box.right - box.left) / 90)), spec.title, number);
  return {
    svg,
    box,
    scale,
    tall,
    back: (pixel) =>
      spec.low +
      ((Math.min(Math.max(pixel, box.left), box.right) - box.left) / (box.right - box.left)) * (spec.high - spec.low),
    row: (pixel) => Math.min(Math.max(Math.floor((pixel - box.top) / tall), 0), rows - 1),
  };
}

function columns(values, first, count, pixels, kind) {
  const found = new Float32Array(pixels);
  for (let column = 0; column < pixels; column++) {
    const from = Math.floor(first + (count * column) / pixels),
      to = Math.max(Math.ceil(first + (count * (column + 1)) / pixels), from + 1);
    let most = NaN,
      sum = 0,
      many = 0;
    for (let at = from; at < Math.min(to, values.length); at++) {
      if (!Number.isFinite(values[at])) continue;
      most = many ? Math.max(most, values[at]) : values[at];
      sum += values[at];
      many += 1;
    }
    found[column] = kind === "max" || !many ? most : sum / many;
  }
  return found;
}

// where a value stands between the lowest and the highest of some rows, in logarithms where these are far apart
function shares(rows, log) {
  let low = Infinity,
    high = -Infinity;
  for (const row of rows) {
    for (const value of row) {
      if (!Number.isFinite(value) || (log && value <= 0)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (!(low < high)) return { low, high, log: false, share: (value) => (Number.isFinite(value) ? 0.5 : NaN) };
  const bend = log ? (value) => Math.log(Math.max(value, low)) : (value) => value;
  return { low, high, log, share: (value) => (bend(value) - bend(low)) / (bend(high) - bend(low)) };
}

// What lasts: recall of planted pairs, and the drift of the weights.

const METRICS = {
  kept: {
    name: "what is left of the write",
    axis: "share of the write's effect",
    says: "What the write changed in the answer to its key, as a share of what it had changed right after the write. Momentum goes on writing, so the line may first rise; the distance at which it has fallen to half its height is how long the pair stays readable. A line that swings far to both sides is a head in which every small change grows: it recalls nothing.",
  },
  cosine: {
    name: "cosine to the value",
    axis: "cosine of answer and value",
    says: "The cosine between the memory's answer to the planted key and the planted value; thin lines show what a memory answers that was never told. Only what lies above the thin line of its colour was remembered.",
  },
  relative_error: {
    name: "relative error",
    axis: "|answer − value| / |value|",
    says: "How far the memory's answer to the planted key lies from the planted value; thin lines show a memory that was never told. Only what lies below the thin line of its colour was remembered.",
  },
};

function recallFigure() {
  if (!data.recall.memories.length) return;
  const made = figure("recall", "How long a planted pair stays readable", "", [
    select(
      "metric",
      "Shown",
      Object.entries(METRICS).map(([key, each]) => [key, each.name]),
    ),
  ]);
  const [{ distances }] = data.recall.memories;
  let state,
    lines,
    at = null;
  made.plot.tabIndex = 0;
  const show = (index) => {
    at = index;
    state.svg.querySelector(".cursor")?.remove();
    if (index === null) return tip(made.plot, null, []);
    const x = state.scale(distances[index]);
    state.svg.append(make("line", { class: "cursor", x1: x, x2: x, y1: state.box.top, y2: state.box.bottom }));
    tip(made.plot, x, [
      make("div", {}, `${number(distances[index])} tokens later`),
      ...lines
        .filter((line) => !line.faint)
        .slice(0, 12)
        .map((line) =>
          row(
            line.colour,
            line.name,
            `${short(line.y[index])}${line.spread ? ` ± ${short(line.spread[index])}` : ""}${line.without ? `, never told: ${short(line.without[index])}` : ""}`,
          ),
        ),
    ]);
  };
  made.plot.addEventListener("pointermove", (event) =>
    show(
      nearest(
        distances.map((d) => Math.log2(d + 1)),
        Math.log2(state.back(event.clientX - made.plot.getBoundingClientRect().left) + 1),
      ),
    ),
  );
  made.plot.addEventListener("pointerleave", () => show(null));
  made.plot.addEventListener("blur", () => show(null));
  made.plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    show(Math.min(Math.max((at ?? -1) + by, 0), distances.length - 1));
  });
  figures.push({
    draw() {
      const shown = visibleHeads(),
        metric = METRICS[chosen.metric],
        told = [],
        bare = [];
      shown.forEach((each) => {
        const recall = data.recall.memories[each.m],
          style = lineOf(each),
          without = recall[`${chosen.metric}_without`];
        const spread = recall[`${chosen.metric}_error`]?.[each.h];
        told.push({
          name: headName(each),
          x: distances,
          y: recall[chosen.metric][each.h].map((value) => value ?? NaN),
          spread: shown.length <= 6 ? spread : undefined,
          without: without?.[each.h],
          ...style,
        });
        if (without)
          bare.push({
            name: "never told",
            x: distances,
            y: without[each.h].map((value) => value ?? NaN),
            faint: true,
            ...style,
          });
      });
      lines = [...bare, ...told];
      state = drawLines(made.plot, {
        label: "Recall of a planted pair against distance",
        series: lines,
        x: {
          title: "tokens read since the pair was written",
          low: 0,
          high: distances[distances.length - 1],
          log: true,
          ticks: (width) => distances.filter((_, index) => width > 520 || index % 2 === 0),
        },
        y: { title: metric.axis, zero: chosen.metric === "kept" },
      });
      legend(made.keys, told.slice(0, 16));
      const lives = shown.map((each) => data.recall.memories[each.m].half_life[each.h]),
        most = distances[distances.length - 1];
      const lasting =
        shown.length <= 8
          ? ` Half of it is left after ${shown.map((each, index) => `${lives[index] === null ? `over ${number(most)}` : number(Math.round(lives[index]))} tokens (${headName(each)})`).join(", ")}.`
          : "";
      made.said.textContent = `Random pairs, distributed as real keys and values are, take a token's place and are written with its own gates; then the text goes on. ${metric.says}${chosen.metric === "kept" ? lasting : ""} ${shown.length <= 6 ? "Bands: one standard error over" : "Means over"} ${data.recall.planted} pairs.`;
    },
  });
}

function driftFigure() {
  const made = figure("drift", "How far the weights went", "", [
    select("drift", "Shown", [
      ["distance", "distance from the start"],
      ["norm", "norm of the weights"],
    ]),
  ]);
  let state, lines;
  const pointed = alongText(
    made.plot,
    () => state,
    (at) => [
      row("", `position ${number(at)}`, ""),
      ...lines.slice(0, 12).map((line) => row(line.colour, line.name, short(line.y[nearest(line.x, at)], 4))),
    ],
  );
  figures.push({
    draw() {
      const shown = visibleHeads();
      lines = shown.map((each) => ({
        name: headName(each),
        x: data.drift[each.m].positions,
        y: data.drift[each.m][chosen.drift][each.h],
        ...lineOf(each),
      }));
      const distance = chosen.drift === "distance";
      state = drawLines(made.plot, {
        label: "Drift of the weights",
        series: lines,
        x: textAxis(),
        y: { title: distance ? "|W − W₀| / |W₀|" : "|W|, all layers of the network", zero: distance },
      });
      legend(made.keys, lines.slice(0, 16));
      made.said.textContent = distance
        ? "The distance of a head's weights from those it began with, as a share of their norm. A line that levels off has writing and forgetting in balance; one that keeps climbing will leave what the model was trained on."
        : "The Frobenius norm of a head's weights. One that shrinks steadily is being forgotten faster than written; one that grows without end will overflow.";
    },
    point: pointed,
  });
}

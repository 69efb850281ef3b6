// The same values as lines, how they are spread, and the most surprising tokens.

function linesFigure() {
  const made = figure(
    "lines",
    "The same as lines",
    "The mean over the tokens under each point, for the heads chosen above.",
  );
  let state, lines;
  const pointed = alongText(
    made.plot,
    () => state,
    (at) => [
      row("", `position ${number(at)}`, QUANTITIES[chosen.quantity].axis),
      ...lines.slice(0, 12).map((line) => row(line.colour, line.name, short(line.y[Math.floor(nearest(line.x, at))]))),
    ],
  );
  figures.push({
    draw() {
      const shown = visibleHeads(),
        pixels = Math.max(Math.floor(made.plot.clientWidth / 3), 60);
      const bins = Math.max(Math.min(Math.ceil((chosen.high - chosen.low) / data.text.bin), pixels), 2),
        long = (chosen.high - chosen.low) / bins;
      const x = Array.from({ length: bins }, (_, index) => chosen.low + (index + 0.5) * long);
      lines = shown.map((each) => ({
        name: headName(each),
        x,
        y: Array.from(
          columns(
            values(chosen.quantity, "mean", each.offset),
            chosen.low / data.text.bin,
            (chosen.high - chosen.low) / data.text.bin,
            bins,
            "mean",
          ),
        ),
        ...lineOf(each),
      }));
      const [low, high] = extent(lines, chosen.low, chosen.high);
      state = drawLines(made.plot, {
        label: `${QUANTITIES[chosen.quantity].name} along the text`,
        series: lines,
        x: textAxis(),
        y: { title: QUANTITIES[chosen.quantity].axis, log: isLog(chosen.quantity) && low > 0 && high / low > 30 },
      });
      legend(made.keys, lines.slice(0, 16));
    },
    point: pointed,
  });
  const spread = figure("spread", "How the values are spread", "");
  figures.push({
    draw() {
      const shown = visibleHeads(),
        all = shown.flatMap((each) => Array.from(values(chosen.quantity, "mean", each.offset)).filter(Number.isFinite));
      let low = Infinity,
        high = -Infinity;
      for (const value of all) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
      if (!(high > low)) {
        high = low + (Math.abs(low) || 1);
      }
      const log = isLog(chosen.quantity) && low > 0 && high / low > 30,
        many = 48,
        bend = log ? Math.log : (value) => value,
        back = log ? Math.exp : (value) => value;
      const counts = new Array(many).fill(0),
        edges = Array.from({ length: many + 1 }, (_, index) =>
          back(bend(low) + ((bend(high) - bend(low)) * index) / many),
        );
      for (const value of all)
        counts[Math.min(Math.floor(((bend(value) - bend(low)) / (bend(high) - bend(low))) * many), many - 1)] += 1;
      drawBars(spread.plot, {
        label: `Spread of ${QUANTITIES[chosen.quantity].name}`,
        counts,
        edges,
        colour: look(0).colour,
        x: `${QUANTITIES[chosen.quantity].axis}${log ? ", logarithmic" : ""}`,
        y: `share of ${data.text.bin === 1 ? "tokens" : "bins"}`,
      });
      const mean = all.reduce((a, b) => a + b, 0) / (all.length || 1);
      spread.said.textContent = `Over the whole text and the heads chosen: mean ${short(mean)}, from ${short(low)} to ${short(high)}. A spread far from a single bar means that the quantity depends on what is read.`;
    },
  });
}

function peaks() {
  if (!data.peaks.length) return;
  const list = make(
    "ol",
    { class: "peaks" },
    ...data.peaks.map((peak) => {
      const text = make(
        "code",
        {},
        visible(peak.before),
        make("b", {}, visible(peak.token) || "·"),
        visible(peak.after),
      );
      const button = make(
        "button",
        { type: "button" },
        make("span", {}, `${number(peak.position)} · ${short(peak.surprise)}`),
        text,
      );
      button.addEventListener("click", () => {
        chosen.cursor = peak.position;
        zoom(peak.position - 60 * data.text.bin, peak.position + 60 * data.text.bin);
        byId("heat").scrollIntoView();
      });
      return make("li", {}, button);
    }),
  );
  const place = make(
    "figure",
    { id: "peaks" },
    make("h2", {}, "The most surprising tokens"),
    list,
    make("figcaption", {}, "Position and surprise, over the mean of all memories and heads; a click goes there."),
  );
  byId("main").append(place);
}

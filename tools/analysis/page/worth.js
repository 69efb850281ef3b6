// What the memory is worth: the verdict, and the losses along the text.

function verdict() {
  const { check } = data,
    marks = { good: "✓", bad: "✗", open: "–" };
  const judge = (difference) =>
    Math.abs(difference.mean) <= 2 * difference.error ? "open" : difference.mean > 0 ? "good" : "bad";
  const kinds = [check.changes ? "good" : "bad", judge(check.writing), judge(check.reaching_back)];
  const list = make(
    "ul",
    { class: "verdict" },
    ...check.verdict.map((line, index) => make("li", { class: kinds[index], "data-mark": marks[kinds[index]] }, line)),
  );
  const cells = (tag, ...words) => make("tr", {}, ...words.map((word) => make(tag, {}, word)));
  const loss = (name, value, difference) =>
    cells(
      "td",
      name,
      value.toFixed(4),
      difference
        ? `${difference.mean >= 0 ? "+" : "−"}${Math.abs(difference.mean).toFixed(4)} ± ${difference.error.toFixed(4)}`
        : "",
    );
  const table = make(
    "table",
    {},
    cells("th", "memory", "loss", "minus live"),
    loss("live", check.live),
    loss("frozen", check.frozen, check.writing),
    loss(`reset every ${number(check.reset_every)}`, check.reset, check.reaching_back),
  );
  byId("main").append(
    make(
      "section",
      { class: "card", id: "verdict" },
      make("h2", {}, "Does it learn while reading, and does that help?"),
      list,
      make("div", { class: "scroll" }, table),
      make("p", { class: "note" }),
    ),
  );
  byId("verdict").lastChild.replaceWith(
    make(
      "figcaption",
      {},
      `The text is read three times from a fresh state: with the memory live; frozen, so that it answers from its initial weights; and reset to these every so many tokens. Everything else goes on as ever. Losses are in ${check.unit}. Above zero in the last column, the live memory is better; a difference counts from two standard errors on, taken over stretches of the text.`,
    ),
  );
}

function lossFigures() {
  const { check } = data,
    styles = { live: look(0), frozen: look(4, 1), reset: look(2) };
  const names = { live: "live", frozen: "frozen", reset: `reset every ${number(check.reset_every)}` };
  const x = middle(check.positions, data.text.tokens);
  const losses = figure(
    "loss",
    "Loss along the text",
    "Each point is the mean over a stretch of the text. Where the live line lies below the frozen one, having written the text so far makes the next token easier to predict.",
  );
  const lines = Object.keys(names).map((key) => ({
    name: names[key],
    x,
    y: check.losses[key].map((value) => value ?? NaN),
    ...styles[key],
  }));
  let state;
  const pointed = alongText(
    losses.plot,
    () => state,
    (at) => [
      row("", `position ${number(at)}`, `loss in ${check.unit}`),
      ...lines.map((line) => row(line.colour, line.name, short(line.y[nearest(x, at)], 4))),
    ],
  );
  figures.push({
    draw() {
      state = drawLines(losses.plot, {
        label: "Loss along the text",
        series: lines,
        x: textAxis(),
        y: { title: `loss (${check.unit})` },
      });
      legend(losses.keys, lines);
    },
    point: pointed,
  });
  const gains = figure(
    "gain",
    "What a live memory saves",
    "Above zero, the live memory predicts better than the other. The band is one standard error over the stretch's own tokens.",
  );
  const differences = ["frozen", "reset"].map((key) => ({
    name: `${names[key]} minus live`,
    x,
    y: check.losses[key].map((value, index) => (value === null ? NaN : value - check.losses.live[index])),
    spread: check.errors[key],
    ...styles[key],
  }));
  let other;
  const told = alongText(
    gains.plot,
    () => other,
    (at) => [
      row("", `position ${number(at)}`, check.unit),
      ...differences.map((line) =>
        row(line.colour, line.name, `${short(line.y[nearest(x, at)])} ± ${short(line.spread[nearest(x, at)])}`),
      ),
    ],
  );
  figures.push({
    draw() {
      other = drawLines(gains.plot, {
        label: "What a live memory saves",
        series: differences,
        x: textAxis(),
        y: { title: `saved (${check.unit})`, zero: true },
      });
      legend(gains.keys, differences);
    },
    point: told,
  });
}

// What each head did with each token: the heat map, and the text in its colours.

const isLog = (quantity) => quantity !== "momentum";

function heatFigure() {
  const controls = [
    select(
      "quantity",
      "Shown",
      Object.entries(QUANTITIES).map(([key, each]) => [key, each.name]),
    ),
    select("scale", "Colours", [
      ["shared", "one scale for all rows"],
      ["row", "each row its own scale"],
    ]),
    select("kind", "Pooled by", [
      ["max", "maximum"],
      ["mean", "mean"],
    ]),
  ];
  const made = figure("heat", "What each head did with each token", "", controls),
    { plot } = made;
  const scale = make("div", { class: "scale" }),
    reading = make("div", { class: "reading", tabindex: 0, "aria-label": "The text around the cursor, coloured" });
  made.said.before(scale, reading);
  let state, rows;
  const pointed = alongText(
    plot,
    () => state,
    (at) => {
      const bin = Math.floor(at / data.text.bin),
        width = data.text.bin;
      const place =
        width === 1
          ? `position ${number(at)}`
          : `positions ${number(bin * width)} to ${number(Math.min((bin + 1) * width, data.text.shown) - 1)}, ${chosen.kind}`;
      const listed = rows
        .slice(0, 12)
        .map((each) =>
          row(`rgb(${viridis(each.share(each[chosen.kind][bin]))})`, headName(each), short(each[chosen.kind][bin])),
        );
      return [
        make("div", {}, place),
        around(at),
        row("", QUANTITIES[chosen.quantity].axis, ""),
        ...listed,
        ...(rows.length > 12 ? [make("div", {}, `and ${rows.length - 12} more`)] : []),
      ];
    },
    {
      click: (y) => {
        const at = rows[state.row(y)];
        choose({ memory: at.m, head: chosen.head === at.h && chosen.memory === at.m ? -1 : at.h });
      },
    },
  );
  figures.push({
    draw() {
      const log = isLog(chosen.quantity),
        all = visibleHeads().map((each) => ({
          ...each,
          max: values(chosen.quantity, "max", each.offset),
          mean: values(chosen.quantity, "mean", each.offset),
        }));
      const common = shares(
        all.map((each) => each[chosen.kind]),
        log && wide(all.map((each) => each[chosen.kind])),
      );
      rows = all.map((each, index) => {
        const own = chosen.scale === "row" ? shares([each[chosen.kind]], log && wide([each[chosen.kind]])) : common,
          begins = index === 0 || all[index - 1].m !== each.m;
        const span =
          chosen.memory < 0 && data.memories.length > 1 ? all.filter((other) => other.m === each.m).length : 1;
        const label =
          span > 1 || (data.memories.length > 1 && chosen.memory < 0)
            ? begins
              ? data.memories[each.m].label
              : ""
            : `head ${each.h}`;
        return { ...each, share: own.share, begins, span, label };
      });
      const gutter = Math.min(8 + 6.4 * Math.max(...rows.map((each) => each.label.length)), plot.clientWidth * 0.3);
      const quantity = QUANTITIES[chosen.quantity];
      state = drawHeat(plot, {
        label: `${quantity.name} of each head along the text`,
        rows,
        gutter,
        kind: chosen.kind,
        bin: data.text.bin,
        low: chosen.low,
        high: chosen.high,
        title: textAxis().title,
      });
      const bar = make("i");
      bar.style.background = `linear-gradient(to right, ${Array.from({ length: 9 }, (_, index) => `rgb(${viridis(index / 8)})`).join(", ")})`;
      const ends = chosen.scale === "row" ? ["lowest of the row", "highest"] : [short(common.low), short(common.high)];
      scale.replaceChildren(
        `${quantity.axis}: ${ends[0]}`,
        bar,
        `${ends[1]}${chosen.scale !== "row" && common.log ? " (logarithmic)" : ""}`,
      );
      const pooled =
        data.text.bin > 1
          ? ` A column stands for ${data.text.bin} tokens or more: their ${chosen.kind === "max" ? "maximum, so that no event is lost" : "mean"}.`
          : "";
      made.said.textContent = `${quantity.says} A row is a head; a click on it chooses it for all figures.${pooled} Below is the text around the cursor, each ${data.text.bin > 1 ? "part" : "token"} coloured by the mean of the rows shown, from the text's lowest to its highest.`;
      tint();
    },
    point() {
      pointed();
      tint();
    },
  });

  const wide = (lists) => {
    const { low, high } = shares(lists, true);
    return high / low > 30;
  };
  // the text has a scale of its own, from the lowest to the highest of the rows' mean: what stands out, stands out
  let shown = "",
    ranks = [];
  function rank() {
    const count = data.text.excerpts.length,
      means = new Float32Array(count);
    for (let bin = 0; bin < count; bin++) {
      let sum = 0,
        many = 0;
      for (const each of rows) {
        const share = each.share(each[chosen.kind][bin]);
        if (Number.isFinite(share)) {
          sum += share;
          many += 1;
        }
      }
      means[bin] = many ? sum / many : NaN;
    }
    const sorted = means.filter(Number.isFinite).sort(),
      low = sorted[Math.floor(sorted.length * 0.02)],
      high = sorted[Math.ceil(sorted.length * 0.98) - 1];
    ranks = means.map((value) => (high > low ? Math.min(Math.max((value - low) / (high - low), 0), 1) : 0.5));
  }

  function tint() {
    const few = Math.ceil(640 / Math.min(data.text.bin, 24)),
      all = data.text.excerpts.length;
    const at = Math.floor((chosen.cursor ?? chosen.low) / data.text.bin),
      key = [chosen.quantity, chosen.kind, chosen.scale, chosen.memory, chosen.head].join();
    let start = Number(reading.dataset.start);
    if (shown !== key) rank();
    if (shown !== key || !(at >= start && at < start + reading.children.length)) {
      start = Math.max(Math.min(at - Math.floor(few / 2), all - few), 0);
      reading.dataset.start = start;
      shown = key;
      reading.replaceChildren(
        ...data.text.excerpts.slice(start, start + few).map((text, index) => {
          const span = make("span", {}, text === "\n" ? "↵\n" : text || "·"),
            [red, green, blue] = viridis(ranks[start + index] || 0);
          span.style.background = `rgb(${red},${green},${blue})`;
          span.style.color = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
          span.addEventListener("click", () => point((start + index) * data.text.bin));
          return span;
        }),
      );
    }
    reading.querySelector(".here")?.classList.remove("here");
    const here = chosen.cursor === null ? null : reading.children[at - start];
    if (!here) return;
    here.classList.add("here");
    const top = here.offsetTop - reading.offsetTop;
    if (top < reading.scrollTop + 12 || top > reading.scrollTop + reading.clientHeight - 36)
      reading.scrollTop = top - reading.clientHeight / 2;
  }
}

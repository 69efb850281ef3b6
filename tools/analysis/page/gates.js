// How gates are used, and attention against memory.

function gateFigures() {
  if (!data.gates.length) return;
  const controls =
    data.gates.length > 1
      ? [
          select(
            "gate",
            "Gate",
            data.gates.map((gate, index) => [index, gate.label]),
          ),
        ]
      : [];
  const made = figure("gates", "Gate use", "", controls),
    share = figure("share", "Attention against memory", "");
  let state, other, gate, lines;
  const x = centres();
  const pooled = (list) => {
    const bins = Math.max(
        Math.min(
          Math.ceil((chosen.high - chosen.low) / data.text.bin),
          Math.max(Math.floor(made.plot.clientWidth / 3), 60),
        ),
        2,
      ),
      long = (chosen.high - chosen.low) / bins;
    return {
      x: Array.from({ length: bins }, (_, index) => chosen.low + (index + 0.5) * long),
      y: Array.from(
        columns(list, chosen.low / data.text.bin, (chosen.high - chosen.low) / data.text.bin, bins, "mean"),
      ),
    };
  };
  const pointed = alongText(
    made.plot,
    () => state,
    (at) => [
      row("", `position ${number(at)}`, ""),
      around(at),
      row(look(0).colour, "gate", short(gate.gate[nearest(x, at)])),
    ],
  );
  const told = alongText(
    share.plot,
    () => other,
    (at) => {
      const bin = nearest(x, at);
      return [
        row("", `position ${number(at)}`, ""),
        around(at),
        row(lines[0].colour, lines[0].name, short(gate.first[bin])),
        row(lines[1].colour, lines[1].name, short(gate.second[bin])),
        row("", `share of ${gate.branches[1]}`, `${short(100 * gate.share[bin])}%`),
      ];
    },
  );
  figures.push({
    draw() {
      gate = data.gates[chosen.gate];
      const series = [{ name: "gate, mean over features", ...pooled(gate.gate), ...look(0) }];
      state = drawLines(made.plot, {
        label: "Mean gate along the text",
        series,
        x: textAxis(),
        y: { title: "mean gate" },
      });
      legend(made.keys, series);
      const form =
        { sigmoid: "the sigmoid", silu: "SiLU", sum: "nothing but 1, as the branches are added," }[gate.form] ||
        "the gate";
      made.said.textContent = `${gate.label}: ${gate.branches[0]} is multiplied by ${form} of the normalised output of ${gate.branches[1]}. Mean over the text ${short(gate.mean_gate)}. A flat line at one half is a gate that does not choose.`;
      lines = [0, 1].map((index) => ({
        name: `norm of ${gate.branches[index]}`,
        ...pooled(index ? gate.second : gate.first),
        ...look(index ? 4 : 0, index),
      }));
      const [low, high] = extent(lines, chosen.low, chosen.high);
      other = drawLines(share.plot, {
        label: "Norms of both branches along the text",
        series: lines,
        x: textAxis(),
        y: {
          title: "norm of the branch's output",
          zero: !(low > 0 && high / low > 30),
          log: low > 0 && high / low > 30,
        },
      });
      legend(share.keys, lines);
      share.said.textContent = `The norms of what both branches give, before they are normalised and combined: ${gate.branches[1]} has ${short(100 * gate.mean_share)}% of their sum on the mean of the text. The gate normalises both, so this says how strongly each speaks, not what it is worth: that stands at the top.`;
    },
    point() {
      pointed();
      told();
    },
  });
}

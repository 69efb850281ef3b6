// The beginning: unpack, fill the choices, draw.

function dress() {
  const root = document.documentElement,
    dark = matchMedia("(prefers-color-scheme: dark)");
  const set = () => {
    root.dataset.theme = root.dataset.chosen || (dark.matches ? "dark" : "light");
  };
  dark.addEventListener("change", set);
  byId("theme").addEventListener("click", () => {
    root.dataset.chosen = root.dataset.theme === "dark" ? "light" : "dark";
    set();
  });
  set();
}

async function start() {
  dress();
  if (typeof DecompressionStream === "undefined")
    throw new Error("This browser cannot unpack the numbers (DecompressionStream): one from 2023 or later can.");
  data = await unpackAll(parsed);
  let offset = 0;
  for (const memory of data.memories) {
    memory.offset = offset;
    offset += memory.heads;
  }
  for (const gate of data.gates) for (const name of ["gate", "first", "second", "share"]) [gate[name]] = gate[name];
  chosen.high = data.text.shown;
  chosen.memory = data.memories.length > 1 ? -1 : 0;
  const { model, text } = data;
  byId("subject").textContent =
    `${model.name}, ${number(model.parameters)} parameters, on ${text.goes_on ? "the first " : ""}${number(text.tokens)} ${text.unit}s of ${text.name.split(/[\\/]/).pop()}${text.rows > 1 ? `, first of ${text.rows} rows` : ""}`;
  fill(
    byId("memory"),
    [
      ...(data.memories.length > 1 ? [["-1", "All memories"]] : []),
      ...data.memories.map((memory, index) => [index, memory.label]),
    ],
    chosen.memory,
  );
  byId("memory").addEventListener("change", (event) => choose({ memory: Number(event.target.value) }));
  byId("head").addEventListener("change", (event) => choose({ head: Number(event.target.value) }));
  byId("in").addEventListener("click", () => zoomBy(0.5));
  byId("out").addEventListener("click", () => zoomBy(2));
  byId("all").addEventListener("click", () => zoom(0, data.text.shown));
  verdict();
  lossFigures();
  heatFigure();
  linesFigure();
  peaks();
  recallFigure();
  driftFigure();
  gateFigures();
  choose({});
  let wide = byId("main").clientWidth;
  new ResizeObserver(() => {
    if (byId("main").clientWidth !== wide) {
      wide = byId("main").clientWidth;
      draw();
    }
  }).observe(byId("main"));
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("main").append(make("p", { class: "card", role: "alert" }, String(error.message || error)));
  throw error;
});

const CLASSES = [
  ["params", "parameters"],
  ["opt_state", "optimizer state"],
  ["extra", "mutable model state"],
  ["batch", "batch"],
  ["rest", "step counter and key"],
  ["padding", "padding of the arguments"],
  ["output", "outputs that reuse no input"],
  ["temp", "gradients, activations, scratch"],
];

function draw_memory() {
  const { memory } = report;
  const held = CLASSES.map(([name, title]) => ({ name, title, bytes: memory[name] }));
  const scale = Math.max(memory.total ?? 0, ...held.map((one) => one.bytes ?? 0));
  const all = sum(held, (one) => one.bytes ?? 0);
  const apart = memory.total !== null && all > memory.total;
  const share = (one) => (apart ? "" : percent(one.bytes ?? 0, all));
  const rows = held.map((one) =>
    el(
      "div",
      { class: "held", role: "row" },
      el("span", { role: "rowheader" }, one.title),
      bar(one.bytes ?? 0, scale, one.name),
      el("span", { class: "number", role: "cell" }, bytes(one.bytes)),
      el("span", { class: "number quiet", role: "cell" }, share(one)),
    ),
  );
  section(
    "memory",
    "Memory per device",
    ["compiled"],
    bound(memory.problems),
    against_capacity(memory),
    el("div", { class: "memory", role: "table", "aria-label": "Bytes per device by class" }, rows),
    apart
      ? el(
          "p",
          { class: "quiet" },
          `The classes add up to ${bytes(all)}: not all of them are alive at once.`,
        )
      : "",
    report.advice.length
      ? el(
          "div",
          {},
          el("h3", {}, "To fit"),
          el(
            "ul",
            {},
            report.advice.map((text) => el("li", {}, text)),
          ),
        )
      : "",
  );
}

function against_capacity(memory) {
  const kind = over(memory) ? "total bad" : "total";
  const whole = Math.max(memory.capacity ?? 0, memory.total ?? 0);
  const mark = memory.capacity !== null && over(memory) ? memory.capacity : null;
  return el(
    "div",
    { class: "capacity" },
    el(
      "p",
      {},
      el(
        "strong",
        {},
        memory.total === null
          ? "The compiler does not say how much is alive at once"
          : `${bytes(memory.total)} alive at once`,
      ),
      `, ${fits(memory)}.`,
    ),
    memory.capacity === null ? "" : bar(memory.total ?? 0, whole, kind, mark),
  );
}

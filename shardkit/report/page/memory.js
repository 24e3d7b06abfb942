const CLASSES = [
  ["params", "parameters"],
  ["opt_state", "optimizer state"],
  ["model_state", "mutable model state"],
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
      ? el("p.quiet", `The classes add up to ${bytes(all)}: not all of them are alive at once.`)
      : "",
    report.peak ? draw_history(report.peak) : "",
    at_peak(report.peak),
    report.memory_suggestions.length
      ? el("div", el("h3", "To fit"), list(report.memory_suggestions))
      : "",
  );
}

const held = (name, drawn, text, part, whole) =>
  el(
    "div.held",
    el("span", name),
    drawn,
    el("span.number", text),
    el("span.number.quiet", percent(part, whole)),
  );

const STATED = 0.1;

// How the schedule splits the one figure that the compiler reports for all its allocations.
function at_peak(peak) {
  if (!peak) {
    const why = "What is alive at the peak is unknown: the program has no schedule to follow.";
    return el("p.quiet", why);
  }
  const { classes, compiler_bytes, problems } = peak;
  const share = compiler_bytes ? peak.bytes / compiler_bytes : null;
  const close = share !== null && Math.abs(share - 1) <= STATED && !problems.length;
  const agreement =
    share === null
      ? "the compiler reports no figure"
      : `${percent(peak.bytes, compiler_bytes)} of the compiler's ${bytes(compiler_bytes)}`;
  const rough = close ? "" : "Rough: trust the shares, not the sizes. ";
  const rows = Object.entries(classes)
    .filter(([, n]) => n)
    .map(([name, n]) => held(name, bar(n, peak.bytes, `live ${name}`), bytes(n), n, peak.bytes));
  const when = [peak.phase, peak.scope].filter(Boolean).join(", ");
  const text =
    `At the peak (${when}) the schedule holds ${bytes(peak.bytes)} besides the arguments, ` +
    `${agreement}.`;
  return el(
    "div",
    el("h3", "Alive at the peak"),
    el("p", rough ? el("span.warn", rough) : "", text),
    problems.map((one) => el("p.warn", `Lower bound: ${one}`)),
    el("div.memory", rows),
    fold("The largest buffers, and scopes", buffers(peak)),
  );
}

function buffers({ largest, scopes }) {
  const size = amount("bytes", "bytes", bytes);
  const columns = [
    size,
    column("class", "kind"),
    column("type", "shape"),
    column("written", "phase"),
    column("source", (one) => at_line(one.source), { wide: true }),
    column("scope", (one) => one.scope || "(no scope)", { wide: true }),
    column("instruction", "name", { wide: true }),
  ];
  const made = filled(largest, columns, { caption: "Largest buffers at the peak", sort: size });
  const parts = Object.entries(scopes).map(([name, n]) => `${name || "(no scope)"} ${bytes(n)}`);
  return el("div", made, el("p.quiet", `By scope: ${parts.join("; ")}.`));
}

function against_capacity(memory) {
  const kind = over(memory) ? "total bad" : "total";
  const whole = Math.max(memory.capacity ?? 0, memory.total ?? 0);
  const mark = memory.capacity !== null && over(memory) ? memory.capacity : null;
  return el(
    "div.capacity",
    el(
      "p",
      el(
        "strong",
        memory.total === null
          ? "The compiler does not report the peak"
          : `${bytes(memory.total)} alive at once`,
      ),
      `, ${fits(memory)}.`,
    ),
    memory.capacity === null ? "" : bar(memory.total ?? 0, whole, kind, mark),
  );
}

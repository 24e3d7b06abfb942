function draw_traffic() {
  const { rows } = report.ledger;
  const axes = report.traffic.map((one) => ({ ...one, size: sizes.get(one.axis) ?? null }));
  const largest = Math.max(1, ...axes.map((one) => Math.max(one.sent, one.minimum ?? 0)));
  const columns = [
    { title: "mesh axis", value: (one) => one.axis, show: (one) => axis_name(one.axis) },
    { title: "size", value: (one) => one.size, number: true },
    { title: "collectives", value: (one) => one.collectives, number: true },
    { title: "sent", value: (one) => one.sent, number: true, show: (one) => bytes(one.sent) },
    {
      title: "",
      value: (one) => one.sent,
      show: (one) => sent_bar(one, largest),
      hint: "Sent, the optimizer's part hatched; the tick is the minimum",
    },
    {
      title: "optimizer",
      value: (one) => one.optimizer,
      number: true,
      show: (one) => bytes(one.optimizer),
      hint: "The part of it that the optimizer's own arithmetic sends; no minimum has it",
    },
    {
      title: "hidden",
      value: (one) => one.hidden,
      number: true,
      show: (one) => bytes(one.hidden),
      hint: "Sent while the device computes",
    },
    { title: "kind", value: (one) => one.kind },
    {
      title: "textbook minimum",
      value: (one) => one.minimum,
      number: true,
      show: (one) => (one.minimum === null ? "" : bytes(one.minimum)),
    },
    {
      title: "ratio",
      value: (one) => one.ratio,
      number: true,
      show: ratio,
      hint: "Sent without the optimizer's part ÷ minimum",
    },
    {
      title: "reductions",
      value: (one) => one.reductions,
      number: true,
      hint:
        "How often each gradient is reduced over it per step; ≥ where permutes may reduce some too",
      show: (one) =>
        one.reductions === null
          ? ""
          : `${one.reductions_complete ? "" : "≥ "}${+one.reductions.toPrecision(3)}`,
    },
  ];
  const made = table(columns, { caption: "Bytes sent per mesh axis" });
  made.fill(axes);
  section(
    "traffic",
    "Sent per device and step",
    ["compiled", "modelled"],
    el(
      "p",
      { class: "quiet" },
      `${least(report.ledger.problems)}${bytes(report.sent)} in all. What one device sends on a ` +
        "ring is compiled; a collective over several axes is divided among them; the minimum is " +
        "a textbook formula.",
    ),
    bound(report.ledger.problems),
    branched(report.ledger.rows),
    made.node,
    ...report.minima.filter((one) => one.excess.length || unexplained(one)).map(beyond),
    by_sets(rows),
  );
}

const beyond = (one) => {
  const parts = [...one.excess];
  if (unexplained(one)) parts.push(["for reasons unknown", unexplained(one)]);
  return el(
    "p",
    { class: "quiet" },
    `${one.axis} sends ${bytes(one.wire - one.bytes)} more than its minimum: ` +
      parts.map(([what, n]) => `${bytes(n)} ${what}`).join("; ") +
      ".",
  );
};

// As `Minimum.unexplained`.
function unexplained(one) {
  const rest = one.wire - one.bytes - sum(one.excess, ([, n]) => n);
  return rest > 0.02 * one.bytes ? rest : 0;
}

const ratio = (one) =>
  one.ratio === null
    ? ""
    : el("span", { class: one.ratio > 1.1 ? "warn" : "" }, one.ratio.toFixed(2));

// The collectives that the table divides among their axes, by the exact set of these.
function by_sets(rows) {
  const sets = new Map();
  for (const row of rows.filter((row) => row.axes.length > 1))
    sets.set(joined(row.axes), (sets.get(joined(row.axes)) ?? 0) + row.wire_bytes);
  if (!sets.size) return "";
  const parts = [...sets].sort((a, b) => b[1] - a[1]).map(([axes, n]) => `${axes} ${bytes(n)}`);
  return el("p", { class: "quiet" }, `Of it in collectives over several axes: ${parts.join("; ")}.`);
}

// The axis's color is that of every picture; the optimizer's part is hatched.
function sent_bar(one, whole) {
  const node = bar(one.sent, whole, "sent", one.minimum);
  const width = (n) => `${whole ? (100 * n) / whole : 0}%`;
  node.style.setProperty("--axis", report.colors[one.axis]);
  if (one.optimizer) {
    const style = { left: width(one.sent - one.optimizer), width: width(one.optimizer) };
    node.append(el("span", { class: "fill optimizer", style }));
  }
  return node;
}

function draw_traffic() {
  const { rows } = report.ledger;
  const axes = report.traffic.map((one) => ({ ...one, size: sizes.get(one.axis) ?? null }));
  const largest = Math.max(1, ...axes.map((one) => Math.max(one.sent, one.minimum ?? 0)));
  const reductions = {
    number: true,
    hint: "How often each gradient is reduced over it per step; ≥ where permutes may reduce some too",
    show: (one) =>
      one.reductions === null
        ? ""
        : `${one.reductions_complete ? "" : "≥ "}${+one.reductions.toPrecision(3)}`,
  };
  const columns = [
    column("mesh axis", "axis", { show: (one) => axis_name(one.axis) }),
    column("size", "size", { number: true }),
    column("collectives", "collectives", { number: true }),
    amount("sent", "sent", bytes),
    column("", "sent", {
      show: (one) => sent_bar(one, largest),
      hint: "Sent, the optimizer's part hatched; the tick is the minimum",
    }),
    amount("optimizer", "optimizer", bytes, {
      hint: "The part of it that the optimizer's own arithmetic sends; no minimum has it",
    }),
    amount("hidden", "hidden", bytes, { hint: "Sent while the device computes" }),
    column("kind"),
    amount("textbook minimum", "minimum", (n) => (n === null ? "" : bytes(n))),
    amount("ratio", "ratio", ratio, { hint: "Sent without the optimizer's part ÷ minimum" }),
    column("reductions", "reductions", reductions),
  ];
  section(
    "traffic",
    "Sent per device and step",
    ["compiled", "modelled"],
    el(
      "p.quiet",
      `${least(report.ledger.problems)}${bytes(report.sent)} in all. What one device sends on a ` +
        "ring is compiled; a collective over several axes is divided among them; the minimum is " +
        "a textbook formula.",
    ),
    bound(report.ledger.problems),
    branched(report.ledger.rows),
    filled(axes, columns, { caption: "Bytes sent per mesh axis" }),
    ...report.minima.filter((one) => one.excess.length || unexplained(one)).map(beyond),
    by_sets(rows),
  );
}

const beyond = (one) => {
  const parts = [...one.excess];
  if (unexplained(one)) parts.push(["for reasons unknown", unexplained(one)]);
  return el(
    "p.quiet",
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

const ratio = (n) => (n === null ? "" : el("span", { class: n > 1.1 ? "warn" : "" }, n.toFixed(2)));

// The collectives that the table divides among their axes, by the exact set of these.
function by_sets(rows) {
  const sets = new Map();
  for (const row of rows.filter((row) => row.axes.length > 1))
    sets.set(joined(row.axes), (sets.get(joined(row.axes)) ?? 0) + row.wire_bytes);
  if (!sets.size) return "";
  const parts = [...sets].sort((a, b) => b[1] - a[1]).map(([axes, n]) => `${axes} ${bytes(n)}`);
  return el("p.quiet", `Of it in collectives over several axes: ${parts.join("; ")}.`);
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

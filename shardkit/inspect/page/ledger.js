function draw_traffic() {
  const rows = report.ledger.rows;
  const wires = new Map(report.mesh.map(([axis]) => [axis, rows.filter((row) => row.axes.includes(axis))]));
  const minima = new Map(report.minima.map((one) => [one.axis, one]));
  const axes = report.mesh.map(([axis, size]) => {
    const hidden = sum(wires.get(axis).filter((row) => row.overlapped), (row) => row.wire_bytes);
    const least = minima.get(axis);
    const wire = least ? least.wire : sum(wires.get(axis), (row) => row.wire_bytes);
    return { axis, size, rows: wires.get(axis).length, wire, hidden, kind: least ? least.kind : "",
      least: least ? least.bytes : null, ratio: least && least.bytes ? least.wire / least.bytes : null,
      reductions: report.reductions[axis] ?? null };
  });
  const scale = Math.max(1, ...axes.map((one) => Math.max(one.wire, one.least ?? 0)));
  const columns = [
    { title: "mesh axis", value: (one) => one.axis },
    { title: "size", value: (one) => one.size, number: true, show: (one) => integer(one.size) },
    { title: "collectives", value: (one) => one.rows, number: true },
    { title: "sent", value: (one) => one.wire, number: true, show: (one) => bytes(one.wire) },
    { title: "", value: (one) => one.wire, show: (one) => bar(one.wire, scale, "sent", one.least), hint: "Sent; the tick is the minimum" },
    { title: "hidden", value: (one) => one.hidden, number: true, show: (one) => bytes(one.hidden), hint: "Sent while the device computes" },
    { title: "kind", value: (one) => one.kind },
    { title: "textbook minimum", value: (one) => one.least, number: true, show: (one) => (one.least === null ? "" : bytes(one.least)) },
    { title: "ratio", value: (one) => one.ratio, number: true, show: ratio },
    { title: "reductions", value: (one) => one.reductions, number: true, hint: "How often each gradient is reduced over it per step",
      show: (one) => (one.reductions === null ? "" : String(+one.reductions.toPrecision(4))) },
  ];
  const made = table(columns, { caption: "Bytes sent per mesh axis" });
  made.fill(axes);
  section("traffic", "Sent per device and step", ["compiled", "modelled"],
    el("p", { class: "quiet" }, "What one device sends on a ring, in every collective that spans the axis, is compiled; the minimum is a textbook formula."),
    bound(report.ledger.problems), made.node, by_sets(rows));
}

const ratio = (one) => (one.ratio === null ? "" : el("span", { class: one.ratio > 1.1 ? "warn" : "" }, one.ratio.toFixed(2)));

// Above, a collective over several axes is in several rows; here it is in one.
function by_sets(rows) {
  const sets = new Map();
  for (const row of rows) sets.set(joined(row.axes), (sets.get(joined(row.axes)) ?? 0) + row.wire_bytes);
  if (!rows.some((row) => row.axes.length > 1)) return "";
  const parts = [...sets].sort((a, b) => b[1] - a[1]).map(([axes, n]) => `${axes} ${bytes(n)}`);
  return el("p", { class: "quiet" }, "Of a collective over several axes, an axis with a minimum has its own share, any other the whole. " +
    `By the exact set of axes: ${parts.join("; ")}.`);
}

function draw_ledger() {
  const rows = report.ledger.rows;
  const total = sum(rows, (row) => row.wire_bytes);
  const some = (of) => [...new Set(rows.map(of))].sort();
  const filters = {
    axis: choice("axis", report.mesh.map(([axis]) => axis), redraw),
    kind: choice("kind", some((row) => row.kind), redraw),
    phase: choice("phase", some((row) => row.phase), redraw),
    text: searcher("scope, dtype, operand", redraw),
  };
  const said = el("p", { class: "said", "aria-live": "polite" });
  const wire = { title: "sent", value: (row) => row.wire_bytes, number: true, show: (row) => bytes(row.wire_bytes), hint: "Bytes one device sends per step" };
  const columns = [
    { title: "kind", value: (row) => row.kind, show: (row) => opener(row.kind, () => details(row), 9) },
    { title: "axes", value: (row) => joined(row.axes) },
    { title: "dtype", value: (row) => row.dtype },
    { title: "payload", value: (row) => row.payload_bytes, number: true, show: (row) => bytes(row.payload_bytes), hint: "Bytes of the whole array of one execution" },
    { title: "trips", value: (row) => row.trips, number: true, show: (row) => (row.trips === null ? el("span", { class: "warn" }, "?") : integer(row.trips)) },
    wire,
    { title: "phase", value: (row) => row.phase },
    { title: "scope", value: (row) => row.scope, wide: true },
    { title: "", value: marks, hint: "Sort by marks" },
  ];
  const made = table(columns, { caption: "Collectives", sort: wire, empty: "No collective is like that." });

  function redraw() {
    const kept = rows.filter((row) => matches(row, filters));
    said.textContent = `${integer(kept.length)} of ${plural(rows.length, "collective")}, ` +
      `${bytes(sum(kept, (row) => row.wire_bytes))} of ${least(report.ledger.problems)}${bytes(total)} sent`;
    made.fill(kept);
  }
  section("ledger", "Ledger", ["compiled"],
    el("div", { class: "filters" }, Object.values(filters).map((one) => one.node), said), made.node);
  redraw();
}

function matches(row, { axis, kind, phase, text }) {
  const all = () => [row.scope, row.dtype, row.name, row.op_name, ...row.operands].join(" ").toLowerCase();
  return (!axis.get() || row.axes.includes(axis.get())) && (!kind.get() || row.kind === kind.get()) &&
    (!phase.get() || row.phase === phase.get()) && (!text.get() || all().includes(text.get()));
}

function marks(row) {
  return [row.overlapped && "hidden", row.conditional && "branch", row.windowed && "windowed",
    !row.whole && "part of axes"].filter(Boolean).join(", ");
}

const details = (row) => definitions([
  ["operands", row.operands.join(", ")],
  ["devices in a group", integer(row.group)],
  ["instruction", `${row.name} in ${row.computation}`],
  ["JAX path", row.op_name],
]);

function draw_flops() {
  const { flops } = report;
  const target = section("flops", "FLOPs per step, all devices", ["traced"]);
  if (!flops) return target.append(el("p", { class: "quiet" }, "Not counted: the report was made without the traced program."));
  const all = flops.model + flops.recompute;
  const rows = flops.by_scope.map(([scope, phase, n]) => ({ scope: scope || "(no scope)", phase, n }));
  const largest = Math.max(1, ...rows.map((row) => row.n));
  const number = { title: "FLOPs", value: (row) => row.n, number: true, show: (row) => si(row.n) };
  const made = table([
    { title: "scope", value: (row) => row.scope, wide: true },
    { title: "phase", value: (row) => row.phase },
    number,
    { title: "share", value: (row) => row.n, number: true, show: (row) => percent(row.n, all) },
    { title: "", value: (row) => row.n, show: (row) => bar(row.n, largest, row.phase === "recompute" ? "again" : "flops"), hint: "Sort by FLOPs" },
  ], { caption: "FLOPs by scope and phase", sort: number });
  made.fill(rows);
  target.append(bound(flops.problems), el("p", {}, `${si(flops.model)} model FLOPs, ${si(flops.recompute)} recomputed; products only, two per multiply-add.`), made.node);
}

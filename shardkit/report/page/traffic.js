function draw_traffic() {
  const rows = report.ledger.rows;
  const wires = new Map(
    report.mesh.map(([axis]) => [axis, rows.filter((row) => row.axes.includes(axis))]),
  );
  const minima = new Map(report.minima.map((one) => [one.axis, one]));
  const axes = report.mesh.map(([axis, size]) => {
    const hidden = sum(
      wires.get(axis).filter((row) => row.overlapped),
      (row) => row.wire_bytes,
    );
    const least = minima.get(axis);
    const wire = least ? least.wire : sum(wires.get(axis), (row) => row.wire_bytes);
    return {
      axis,
      size,
      rows: wires.get(axis).length,
      wire,
      hidden,
      kind: least ? least.kind : "",
      least: least ? least.bytes : null,
      ratio: least && least.bytes ? least.wire / least.bytes : null,
      reductions: report.reductions[axis] ?? null,
      unseen: wires
        .get(axis)
        .some((row) => row.windowed && ["backward", "recompute"].includes(row.phase)),
    };
  });
  const scale = Math.max(1, ...axes.map((one) => Math.max(one.wire, one.least ?? 0)));
  const columns = [
    { title: "mesh axis", value: (one) => one.axis },
    { title: "size", value: (one) => one.size, number: true, show: (one) => integer(one.size) },
    { title: "collectives", value: (one) => one.rows, number: true },
    { title: "sent", value: (one) => one.wire, number: true, show: (one) => bytes(one.wire) },
    {
      title: "",
      value: (one) => one.wire,
      show: (one) => bar(one.wire, scale, "sent", one.least),
      hint: "Sent; the tick is the minimum",
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
      value: (one) => one.least,
      number: true,
      show: (one) => (one.least === null ? "" : bytes(one.least)),
    },
    { title: "ratio", value: (one) => one.ratio, number: true, show: ratio },
    {
      title: "reductions",
      value: (one) => one.reductions,
      number: true,
      hint:
        "How often each gradient is reduced over it per step; ≥ where permutes may reduce some too",
      show: (one) =>
        one.reductions === null
          ? ""
          : `${one.unseen ? "≥ " : ""}${+one.reductions.toPrecision(4)}`,
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
      "Bytes that one device sends on a ring, in all collectives that span the axis, are compiled; " +
        "the minimum is a textbook formula.",
    ),
    bound(report.ledger.problems),
    branched(report.ledger.rows),
    made.node,
    ...report.minima.filter((one) => one.excess?.length).map(beyond),
    by_sets(rows),
  );
}

const beyond = (one) =>
  el(
    "p",
    { class: "quiet" },
    `${one.axis} sends ${bytes(one.wire - one.bytes)} more than its minimum: ` +
      one.excess.map(([what, n]) => `${bytes(n)} ${what}`).join("; ") +
      ".",
  );

const ratio = (one) =>
  one.ratio === null
    ? ""
    : el("span", { class: one.ratio > 1.1 ? "warn" : "" }, one.ratio.toFixed(2));

// Above, a collective over several axes is in several rows; here it is in one row.
function by_sets(rows) {
  const sets = new Map();
  for (const row of rows)
    sets.set(joined(row.axes), (sets.get(joined(row.axes)) ?? 0) + row.wire_bytes);
  if (!rows.some((row) => row.axes.length > 1)) return "";
  const parts = [...sets].sort((a, b) => b[1] - a[1]).map(([axes, n]) => `${axes} ${bytes(n)}`);
  return el(
    "p",
    { class: "quiet" },
    "Of a collective over several axes, an axis with a minimum counts its own share, " +
      "any other the whole. " +
      `By the exact set of axes: ${parts.join("; ")}.`,
  );
}

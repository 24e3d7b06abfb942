function draw_flops() {
  const { flops } = report;
  const target = section("flops", "FLOPs per step, all devices", ["traced"]);
  if (!flops) return target.append(el("p.quiet", "Not counted: the report has no traced program."));
  const all = flops.model + flops.recompute + (flops.update ?? 0);
  const rows = flops.by_scope.map(([scope, phase, n], i) => ({
    scope: scope || "(no scope)",
    source: at_line(flops.lines[i]),
    phase,
    n,
  }));
  const largest = Math.max(1, ...rows.map((row) => row.n));
  const columns = [
    column("scope", "scope", { wide: true }),
    column("phase"),
    column("largest at", "source", { wide: true }),
    ...shares(all),
    column("", "n", {
      show: (row) => bar(row.n, largest, row.phase === "recompute" ? "again" : "flops"),
      hint: "Sort by FLOPs",
    }),
  ];
  target.append(
    bound(flops.problems),
    el(
      "p",
      `${si(flops.model)} model FLOPs, ${si(flops.recompute)} recomputed; ` +
        "products only, two per multiply-add.",
    ),
    filled(rows, columns, { caption: "FLOPs by scope and phase", sort: columns[3] }),
    flops_of_lines(flops, all),
  );
}

const shares = (all) => [amount("FLOPs", "n", si), amount("share", "n", (n) => percent(n, all))];

function flops_of_lines({ by_source }, all) {
  const rows = by_source.map(([source, n]) => ({ source, n, code: source?.code ?? "" }));
  if (!rows.length) return "";
  const columns = [
    column("source", (row) => at_line(row.source) || "unknown", { wide: true }),
    ...shares(all),
    code_column,
  ];
  const made = filled(rows, columns, { caption: "FLOPs by source line", sort: columns[1] });
  return fold("By source line", made);
}

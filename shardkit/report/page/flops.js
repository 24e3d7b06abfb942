function draw_flops() {
  const { flops } = report;
  const target = section("flops", "FLOPs per step, all devices", ["traced"]);
  if (!flops)
    return target.append(
      el("p", { class: "quiet" }, "Not counted: the report has no traced program."),
    );
  const all = flops.model + flops.recompute + (flops.update ?? 0);
  const rows = flops.by_scope.map(([scope, phase, n], i) => ({
    scope: scope || "(no scope)",
    source: at_line(flops.lines[i]),
    phase,
    n,
  }));
  const largest = Math.max(1, ...rows.map((row) => row.n));
  const number = { title: "FLOPs", value: (row) => row.n, number: true, show: (row) => si(row.n) };
  const made = table(
    [
      { title: "scope", value: (row) => row.scope, wide: true },
      { title: "phase", value: (row) => row.phase },
      { title: "largest at", value: (row) => row.source, wide: true },
      number,
      { title: "share", value: (row) => row.n, number: true, show: (row) => percent(row.n, all) },
      {
        title: "",
        value: (row) => row.n,
        show: (row) => bar(row.n, largest, row.phase === "recompute" ? "again" : "flops"),
        hint: "Sort by FLOPs",
      },
    ],
    { caption: "FLOPs by scope and phase", sort: number },
  );
  made.fill(rows);
  target.append(
    bound(flops.problems),
    el(
      "p",
      {},
      `${si(flops.model)} model FLOPs, ${si(flops.recompute)} recomputed; ` +
        "products only, two per multiply-add.",
    ),
    made.node,
    flops_of_lines(flops, all),
  );
}

function flops_of_lines({ by_source }, all) {
  const rows = by_source.map(([source, n]) => ({ source, n }));
  if (!rows.length) return "";
  const number = { title: "FLOPs", value: (row) => row.n, number: true, show: (row) => si(row.n) };
  const made = table(
    [
      { title: "source", value: (row) => at_line(row.source) || "unknown", wide: true },
      number,
      { title: "share", value: (row) => row.n, number: true, show: (row) => percent(row.n, all) },
      {
        title: "code",
        value: (row) => row.source?.code ?? "",
        wide: true,
        show: (row) => el("code", {}, row.source?.code ?? ""),
      },
    ],
    { caption: "FLOPs by source line", sort: number },
  );
  made.fill(rows);
  return el("details", {}, el("summary", {}, "By source line"), made.node);
}

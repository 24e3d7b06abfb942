function draw_ledger() {
  const rows = report.ledger.rows;
  const some = (field) => [...new Set(rows.map((row) => row[field]))].sort();
  const axes = report.mesh.map(([axis]) => axis);
  const filters = {
    axis: choice("axis", axes, redraw),
    kind: choice("kind", some("kind"), redraw),
    phase: choice("phase", some("phase"), redraw),
    text: searcher("source, scope, dtype, operand", redraw),
  };
  const said = el("p", { class: "said", "aria-live": "polite" });
  const wire = amount("sent", "wire_bytes", bytes, { hint: "Bytes one device sends per step" });
  const columns = [
    column("kind", "kind", { show: (row) => opener(row.kind, () => details(row), 12) }),
    column("axes", (row) => joined(row.axes) + (row.dcn ? " between slices" : "")),
    column("dtype"),
    amount("payload", "payload_bytes", bytes, {
      hint: "Bytes of the whole array of one execution",
    }),
    amount("trips", "trips", (n) => (n === null ? el("span.warn", "?") : integer(n))),
    wire,
    ...times_of(rows),
    column("phase"),
    column("source", (row) => at_line(row.source), { wide: true }),
    column("scope", "scope", { wide: true, show: (row) => several(row.scope) }),
    column("", marks, { hint: "Sort by marks" }),
  ];
  const made = table(columns, {
    caption: "Collectives",
    sort: wire,
    empty: "No collective is like that.",
  });

  function redraw() {
    const kept = rows.filter((row) => matches(row, filters));
    said.textContent =
      `${integer(kept.length)} of ${plural(rows.length, "collective")}, ` +
      `${bytes(sum(kept, (row) => row.wire_bytes))} of ` +
      `${least(report.ledger.problems)}${bytes(report.sent)} sent`;
    made.fill(kept);
  }
  section(
    "ledger",
    "Ledger",
    report.measured ? ["compiled", "measured"] : ["compiled"],
    el(
      "div.filters",
      Object.values(filters).map((one) => one.node),
      said,
    ),
    made.node,
  );
  redraw();
}

// The modelled and the measured time of each collective, where they are known.
function times_of(rows) {
  const known = [
    ["modelled", report.timeline?.collectives, "Seconds on the links per step, modelled"],
    ["measured", report.measured?.collectives, "Seconds per step, measured; mean of all devices"],
  ];
  return known
    .filter(([, times]) => times?.length === rows.length)
    .map(([title, times, hint]) => {
      const of = new Map(rows.map((row, i) => [row, times[i]]));
      const format = (time) => (time === null ? "" : seconds(time));
      return amount(title, (row) => of.get(row), format, { hint });
    });
}

// Up to two scopes of one instruction; of more, the first and the number of the others.
function several(scopes) {
  const [first, ...more] = scopes.split(", ");
  return more.length < 2 ? scopes : `${first} and ${integer(more.length)} more`;
}

function matches(row, { axis, kind, phase, text }) {
  const all = () =>
    [...row.sources.map(at_line), row.scope, row.dtype, row.name, row.op_name, ...row.operands]
      .join(" ")
      .toLowerCase();
  return (
    (!axis.get() || row.axes.includes(axis.get())) &&
    (!kind.get() || row.kind === kind.get()) &&
    (!phase.get() || row.phase === phase.get()) &&
    (!text.get() || all().includes(text.get()))
  );
}

function marks(row) {
  return [
    row.overlapped && "hidden",
    row.conditional && (row.taken < 1 ? `branch × ${Math.round(100 * row.taken)} %` : "branch"),
    row.windowed && "windowed",
    !row.full_axes && "part of axes",
  ]
    .filter(Boolean)
    .join(", ");
}

// Each array with its line, and with what it lies between.
const arrays = (row) =>
  row.operands.map((operand, at) => {
    const { made_by, wanted_by, declared_by } = row.ends[at] ?? {};
    const parts = [
      at_line(row.sources[at]),
      made_by && `made by ${made_by}`,
      wanted_by && `wanted by ${wanted_by}`,
      declared_by && `declared by ${declared_by}`,
    ];
    return el("div", [operand, ...parts.filter(Boolean)].join("; "));
  });

const details = (row) =>
  definitions([
    ["scopes", several(row.scope) === row.scope ? "" : row.scope],
    ["code", row.source?.code ?? ""],
    ["called from", row.source?.stack.slice(1).join(", ") ?? ""],
    ["operands", arrays(row)],
    ["devices in a group", integer(row.group)],
    ["instruction", `${row.name} in ${row.computation}`],
    ["JAX path", row.op_name],
  ]);

// The schedule of a pipeline: a row for each stage, a column for each tick.
const PASSES = {
  F: ["forward", "forward pass"],
  B: ["backward", "backward pass"],
  W: ["update", "backward pass, weights alone"],
};

function draw_ticks() {
  if (!report.ticks.length) return;
  const target = section("ticks", "Pipeline schedule", ["traced"]);
  for (const one of report.ticks) {
    const cells = one.rows.flat();
    const idle = cells.filter((cell) => !cell).length;
    const kinds = [...new Set(cells.filter(Boolean).map((cell) => cell[0]))];
    target.append(
      el(
        "p",
        axis_name(one.axis),
        ` runs ${one.name}: ${plural(one.rows[0].length, "tick")}, ` +
          `${percent(idle, cells.length)} of them idle (the bubble).`,
      ),
      tick_table(one),
      el(
        "p",
        kinds.map((kind) => key(`block-of ${PASSES[kind][0]}`, PASSES[kind][1])),
      ),
    );
  }
}

function tick_table({ axis, name, rows }) {
  const body = rows.map((row, stage) =>
    el(
      "tr",
      el("th", { scope: "row" }, `stage ${stage}`),
      row.map((cell, tick) => {
        const kind = cell ? `tick-of ${PASSES[cell[0]][0]}` : "idle";
        const what = cell ? `${PASSES[cell[0]][1]} of micro-batch ${cell.slice(1)}` : "idle";
        return el("td", { class: kind, title: `tick ${tick}, stage ${stage}: ${what}` }, cell);
      }),
    ),
  );
  const caption = `Ticks of ${name} over ${axis}`;
  return scrolled(caption, el("table.ticks", el("caption.hidden", caption), el("tbody", body)));
}

const LANES = ["compute", "communication"];

function seconds(n) {
  if (n === null) return "unknown";
  for (const [unit, factor] of Object.entries({ s: 1, ms: 1e3, µs: 1e6 }))
    if (n * factor >= 1) return `${+(n * factor).toPrecision(3)} ${unit}`;
  return `${(n * 1e9).toFixed(0)} ns`;
}

function draw_timeline() {
  const { timeline } = report;
  const target = section("timeline", "Time per step", ["modelled"]);
  if (!timeline) {
    const why =
      "No time is modelled: that needs a device in the hardware table, " +
      "and simulated ones have none.";
    return target.append(el("p.quiet", why));
  }
  const scheduled = timeline.source === "schedule";
  target.append(
    step_time(timeline),
    scheduled ? lanes(timeline) : ends(timeline),
    exposed(timeline),
    segment_table(timeline),
    fold("Assumptions of the model", list(timeline.assumptions)),
  );
}

function step_time(timeline) {
  const { source, chip, low, high, compute, exposed } = timeline;
  const how =
    source === "schedule"
      ? [
          el("strong", seconds(high)),
          ` on ${chip}, from the compiler's schedule: ${seconds(compute)} of compute and ` +
            `${seconds(exposed)} of communication that no compute hides${mfu(timeline)}.`,
        ]
      : [
          el("strong", `${seconds(low)} to ${seconds(high)}`),
          ` on ${chip}, as a roofline: if everything overlaps, ` +
            `and if nothing does${mfu(timeline)}.`,
        ];
  const lower = timeline.problems.length
    ? list(
        timeline.problems.map((text) => `Lower bound: ${text}`),
        ".warn",
      )
    : "";
  return el("div", el("p", how), lower);
}

function mfu({ mfu, best_mfu }) {
  if (mfu === null) return "";
  const range =
    mfu === best_mfu ? percent(mfu, 1) : `${percent(mfu, 1)} to ${percent(best_mfu, 1)}`;
  return `; MFU ${range}`;
}

// Compute and exposed communication one after another, hidden communication below the compute
// that hides it.
function lanes({ segments, blocks }) {
  const lane = Object.fromEntries(LANES.map((name) => [name, []]));
  const total = Math.max(...blocks.map((one) => one.start + one.seconds), 0);
  for (const { segment: one, start, seconds: length, hidden } of blocks) {
    const computes = one.kind === "compute";
    const text =
      `${one.phase}, ${one.scope || "(no scope)"}: ${seconds(one.seconds)}` +
      (computes ? "" : ` over ${joined(one.axes)}, ${seconds(one.exposed)} exposed`) +
      (one.where ? `, ${one.where}` : "");
    const kind = hidden ? "hides" : computes ? one.phase : "exposed";
    lane[one.kind].push(block(start, length, total, kind, text));
  }
  const drawn = LANES.map((name) =>
    el("div.lane", el("span.name", name), el("div.track", lane[name])),
  );
  return el(
    "figure.lanes",
    el("div", { "aria-hidden": "true" }, drawn, scale(total)),
    el(
      "figcaption.quiet",
      legend(segments),
      " Blocks are in the order of their start; the trips of a loop are summed.",
    ),
  );
}

const block = (from, length, total, kind, text) =>
  el("span", {
    class: `block-of ${kind}`,
    title: text,
    style: { left: `${(100 * from) / total}%`, width: `${(100 * length) / total}%` },
  });

const scale = (total) =>
  el(
    "div.lane.scale",
    el("span", {}),
    el(
      "div.track",
      [0, 0.25, 0.5, 0.75, 1].map((part) =>
        el("span", { style: { left: `${100 * part}%` } }, seconds(part * total)),
      ),
    ),
  );

function legend(segments) {
  const phases = [
    ...new Set(segments.filter((one) => one.kind === "compute").map((one) => one.phase)),
  ];
  const names = [
    ...phases.map((phase) => [phase, phase]),
    ["exposed", "communication, exposed"],
    ["hides", "communication, hidden"],
  ];
  return names.map(([kind, text]) => key(`block-of ${kind}`, text));
}

// The three resources of a roofline; the longest is the lower end, the sum the upper.
function ends({ compute, memory, exposed, high }) {
  const rows = [
    ["products at peak", compute],
    ["device memory", memory ?? 0],
    ["communication", exposed],
  ];
  return el(
    "div.memory",
    rows.map(([name, time]) => held(name, bar(time, high), seconds(time), time, high)),
  );
}

function exposed(timeline) {
  const axes = new Map();
  for (const one of timeline.segments.filter((one) => one.kind === "communication")) {
    axes.set(joined(one.axes), (axes.get(joined(one.axes)) ?? 0) + one.exposed);
  }
  const parts = Object.entries(timeline.communication)
    .sort((a, b) => b[1] - a[1])
    .map(
      ([name, all]) =>
        `${name || "none"} ${seconds(all)}` +
        (timeline.source === "schedule"
          ? ` (${seconds(axes.get(name || "none") ?? 0)} exposed)`
          : ""),
    );
  return el("p", parts.length ? `Communication over: ${parts.join("; ")}.` : "No communication.");
}

function segment_table({ segments, source }) {
  const total = sum(segments, (one) => (one.kind === "compute" ? one.seconds : one.exposed));
  const turn = (one) => (one.kind === "compute" ? one.seconds : one.exposed);
  const spent = amount("adds to the step", turn, seconds);
  const columns = [
    column("phase"),
    column("scope", (one) => one.scope || "(no scope)", { wide: true }),
    column("source", "where", { wide: true }),
    column("kind"),
    column("axes", (one) => (one.kind === "compute" ? "" : joined(one.axes))),
    amount("takes", "seconds", seconds),
    spent,
    amount("share", turn, (n) => percent(n, total)),
  ];
  const how = source === "schedule" ? "schedule" : "roofline, nothing overlapped";
  return fold(
    `${plural(segments.length, "block")} of the ${how}`,
    filled(segments, columns, { caption: "Blocks of the timeline", sort: spent }),
  );
}

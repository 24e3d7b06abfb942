// What is alive over a step: an area per class, the fullest moment marked, and below it what is
// alive at the moment that the pointer or the slider selects.
const LIVE_CLASSES = "gradients activations weights collectives outputs temporaries".split(" ");

function draw_history(peak) {
  const { history } = peak;
  if (!history || !history.at.length) return "";
  const { memory } = report;
  const held = sum(["params", "opt_state", "model_state", "batch", "rest"], (name) => memory[name]);
  const layers = [
    ["arguments", history.at.map(() => held + (memory.padding ?? 0))],
    ...LIVE_CLASSES.map((name) => [name, history.classes[name] ?? []]),
  ].filter(([name, sizes]) => name === "arguments" || sizes.some(Boolean));
  const totals = history.at.map((_, i) => sum(layers, ([, sizes]) => sizes[i]));
  const most = Math.max(1, ...totals);
  const top = totals.indexOf(Math.max(...totals));
  const at = (i) => `${(100 * (i + 0.5)) / history.at.length}%`;
  const cursor = el("span", { class: "cursor", style: { left: at(top) } });
  const readout = el("div", { class: "said", "aria-live": "polite" });
  const select = (i) => {
    slider.value = i;
    cursor.style.setProperty("left", at(i));
    readout.replaceChildren(...describe_moment(history, layers, totals, i));
  };
  const slider = el("input", {
    type: "range",
    min: 0,
    max: history.at.length - 1,
    value: top,
    "aria-label": "Moment of the step",
    oninput: (event) => select(Number(event.target.value)),
  });
  const plot = el(
    "div.plot",
    areas(layers, most),
    el("span.top", bytes(most)),
    el("span", { class: "peak", style: { left: at(top) } }, el("span", "peak")),
    cursor,
  );
  plot.addEventListener("pointermove", (event) => {
    const { left, width } = plot.getBoundingClientRect();
    const part = Math.max(0, Math.min(0.999, (event.clientX - left) / width));
    select(Math.floor(part * history.at.length));
  });
  select(top);
  return el(
    "figure.history",
    el("h3", "Over the step"),
    plot,
    phase_strip(history.phases),
    slider,
    el(
      "p",
      layers.map(([name]) => key(`live ${name}`, name)),
      " Phases below the areas: ",
      [...new Set(history.phases)].map((phase) => key(`block-of ${phase}`, phase)),
    ),
    readout,
  );
}

// Areas stacked on each other; a column is as wide as any other. Heights are parts of 1000: browsers
// draw no coordinate above 2^31, which is only 2 GiB.
function areas(layers, most) {
  const n = layers[0][1].length;
  const below = Array(n).fill(0);
  const height = (size) => (1000 * (1 - size / most)).toFixed(2);
  const paths = layers.map(([name, sizes]) => {
    const floor = [...below];
    sizes.forEach((size, i) => (below[i] += size));
    const up = below.map((y, i) => `V${height(y)}H${i + 1}`).join("");
    const down = floor
      .map((y, i) => `V${height(y)}H${i}`)
      .reverse()
      .join("");
    return svg("path", { class: `live ${name}`, d: `M0,${height(floor[0])}${up}${down}Z` });
  });
  const box = { viewBox: `0 0 ${n} 1000`, preserveAspectRatio: "none", "aria-hidden": "true" };
  return svg("svg", box, ...paths);
}

function phase_strip(phases) {
  const runs = [];
  for (const phase of phases) {
    if (runs.at(-1)?.phase === phase) runs.at(-1).n += 1;
    else runs.push({ phase, n: 1 });
  }
  const width = (n) => ({ width: `${(100 * n) / phases.length}%` });
  return el(
    "div.phases",
    runs.map(({ phase, n }) =>
      el(
        "span",
        { class: `block-of ${phase}`, title: phase, style: width(n) },
        n > 0.1 * phases.length ? phase : "",
      ),
    ),
  );
}

function describe_moment(history, layers, totals, i) {
  const moment = history.at[i];
  const parts = layers.filter(([, sizes]) => sizes[i]);
  const alive = history.buffers.filter((one) => one.start <= moment && moment <= one.end);
  alive.sort((a, b) => b.bytes - a.bytes);
  const of = parts.map(([name, sizes]) => `${name} ${bytes(sizes[i])}`).join("; ");
  const lines = alive
    .slice(0, 3)
    .map((one) => [
      `${bytes(one.bytes)} ${one.kind} ${one.shape}`,
      ` from ${one.where || "an unknown line"}`,
      `: ${one.name}`,
    ]);
  return [
    el(
      "p",
      `Moment ${integer(moment)} of ${integer(history.moments)}, ${history.phases[i]}: ` +
        `${bytes(totals[i])} by the schedule: ${of}. The largest buffers:`,
    ),
    list(lines),
  ];
}

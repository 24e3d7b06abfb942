// Positions of an axis that are drawn; of longer axes the middle is left out.
const LIMITS = { column: 16, row: 8, panel: 4 };

// Positions of an axis to draw; null for those left out.
function places(size, limit) {
  const all = [...Array(size).keys()];
  return size <= limit ? all : [...all.slice(0, limit / 2), null, size - 1];
}

// Which axes run across, down and over panels. A long axis runs across: pages are wide.
function arranged() {
  const axes = report.mesh.filter(([, size]) => size > 1);
  const panels = axes.slice(0, -2);
  let [down, across] = axes.length > 1 ? axes.slice(-2) : [["", 1], axes[0] ?? ["", 1]];
  if (down[1] > LIMITS.row && down[1] > across[1]) [down, across] = [across, down];
  return { down, across, panels };
}

// Draws the devices as a grid; `paint(button, place)` fills one, where place is {axis: index}.
function draw_grid(paint) {
  const { down, across, panels } = arranged();
  const grids = panel_places(panels).map((fixed) =>
    fixed === null
      ? el("div", { class: "gap between" }, "⋮")
      : el(
          "figure",
          { class: "panel" },
          panels.length ? el("figcaption", {}, place_text(fixed)) : "",
          grid(fixed, down, across, paint),
        ),
  );
  const made = el("div", { class: "mesh" }, grids);
  made.addEventListener("keydown", walk);
  const first = made.querySelector("button");
  if (first) first.tabIndex = 0;
  return made;
}

function panel_places(panels) {
  let found = [{}];
  for (const [axis, size] of panels) {
    found = found.flatMap((fixed) =>
      fixed === null
        ? [null]
        : places(size, LIMITS.panel).map((i) => (i === null ? null : { ...fixed, [axis]: i })),
    );
  }
  return found.filter((one, i) => one !== null || found[i - 1] !== null);
}

function grid(fixed, down, across, paint) {
  const columns = places(across[1], LIMITS.column);
  const corner = el(
    "th",
    { class: "corner" },
    down[0] ? `${down[0]} ↓ ` : "",
    across[0] ? `${across[0]} →` : "",
  );
  const head = el(
    "tr",
    {},
    corner,
    columns.map((i) => el("th", {}, i === null ? "⋯" : String(i))),
  );
  const body = places(down[1], LIMITS.row).map((j) => {
    if (j === null)
      return el(
        "tr",
        {},
        el("th", {}, "⋮"),
        columns.map(() => el("td", { class: "gap" }, "⋮")),
      );
    return el(
      "tr",
      {},
      el("th", {}, down[0] ? String(j) : ""),
      columns.map((i) => {
        if (i === null) return el("td", { class: "gap" }, "⋯");
        const place = { ...Object.fromEntries(report.mesh.map(([axis]) => [axis, 0])), ...fixed };
        if (across[0]) place[across[0]] = i;
        if (down[0]) place[down[0]] = j;
        const device = button({ class: "device", tabindex: "-1" });
        paint(device, place);
        return el("td", {}, device);
      }),
    );
  });
  return el(
    "table",
    { class: "devices" },
    el("caption", { class: "hidden" }, "Devices of the mesh"),
    el("thead", {}, head),
    el("tbody", {}, body),
  );
}

// Arrow keys move over the devices, so that they take one stop of the tab key.
function walk(event) {
  const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[
    event.key
  ];
  if (!step || !event.target.matches("button.device")) return;
  event.preventDefault();
  const here = event.target.getBoundingClientRect();
  const beyond = [...event.currentTarget.querySelectorAll("button.device")]
    .map((node) => {
      const box = node.getBoundingClientRect();
      return { node, x: box.x - here.x, y: box.y - here.y };
    })
    .filter(({ x, y }) =>
      step[0] ? x * step[0] > 1 && Math.abs(y) < 4 : y * step[1] > 1 && Math.abs(x) < 4,
    );
  beyond.sort((a, b) => Math.hypot(a.x, a.y) - Math.hypot(b.x, b.y));
  if (!beyond.length) return;
  event.target.tabIndex = -1;
  beyond[0].node.tabIndex = 0;
  beyond[0].node.focus();
}

const place_text = (place) =>
  Object.entries(place)
    .map(([axis, i]) => `${axis} ${integer(i)}`)
    .join(", ");

// Number of a device in the order of the mesh.
const device_number = (place) => report.mesh.reduce((n, [axis, size]) => n * size + place[axis], 0);

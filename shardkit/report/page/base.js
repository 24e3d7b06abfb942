const report = JSON.parse(document.getElementById("report").textContent);
const sizes = new Map(report.mesh);
const devices = report.mesh.reduce((n, [, size]) => n * size, 1);
const PAGE = 200;

// Elements are created, never parsed from text: names in a report come from the user.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style")
      for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== ""));
  return node;
}

const button = (attributes, text = "") => el("button", { type: "button", ...attributes }, text);

function svg(tag, attributes, ...children) {
  const node = document.createElementNS(document.getElementById("svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function bytes(n) {
  if (n === null) return "unknown";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let power = 0;
  while (Math.abs(n) >= 1024 && power < units.length - 1) [n, power] = [n / 1024, power + 1];
  const digits = power === 0 || Math.abs(n) >= 100 ? 0 : 2;
  return `${n.toFixed(digits)} ${units[power]}`;
}

function si(n) {
  const units = ["", "k", "M", "G", "T", "P", "E", "Z"];
  let power = 0;
  while (Math.abs(n) >= 1000 && power < units.length - 1) [n, power] = [n / 1000, power + 1];
  return `${power === 0 ? n : n.toPrecision(3)} ${units[power]}`.trim();
}

const integer = (n) => n.toLocaleString("en");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "");
const sum = (list, of) => list.reduce((total, one) => total + of(one), 0);
const plural = (n, noun, many = `${noun}s`) => `${integer(n)} ${n === 1 ? noun : many}`;
const joined = (names) => (names.length ? names.join(", ") : "none");
const named = (leaf) => (leaf.path ? `${leaf.part}/${leaf.path}` : leaf.part);

const at_line = (source) =>
  source ? `${source.file.split("/").pop()}:${source.line} in ${source.function}` : "";

// A mesh axis in its color.
const axis_name = (axis) =>
  el(
    "span",
    { class: "axis", style: { "--axis": report.colors[axis] ?? "" } },
    axis || "(none)",
  );

const type = (leaf) => `${leaf.dtype}[${leaf.shape.join(",")}]`;

const LABELS = {
  compiled: "Read from the program that the compiler made. Nothing was run.",
  modelled: "Computed from a model of the hardware or a textbook formula. Nothing was run.",
  measured: "Timed while it ran, by a profile.",
  traced: "Counted in the traced program, before compilation. Nothing was run.",
};
// Marks totals that are lower bounds, since something could not be read.
const least = (problems) => (problems.length ? "at least " : "");
const bound = (problems) =>
  problems.length ? el("p", { class: "warn" }, "Incomplete: these are lower bounds.") : "";

// A device takes one branch of a conditional; without a known share, all of them count.
const branched = (rows) =>
  rows.some((row) => row.conditional && row.taken === 1)
    ? el("p", { class: "warn" }, "Branches of conditionals count as taken: totals are upper bounds.")
    : "";

const label = (kind) => el("span", { class: `label ${kind}`, title: LABELS[kind] }, kind);

// An entry of a legend.
const key = (kind, text) => el("span", { class: "key" }, el("i", { class: kind }), text);

function section(id, title, labels, ...children) {
  const short = title.split(" per ")[0];
  const heading = el("h2", { id: `${id}-title` }, title, labels.map(label));
  const made = el("section", { id, "aria-labelledby": `${id}-title` }, heading, children);
  document.querySelector("main").append(made);
  document.querySelector("nav").append(el("a", { href: `#${id}` }, short));
  return made;
}

// A bar that is `part` of `whole` wide, with a tick where `mark` is.
function bar(part, whole, kind = "", mark = null) {
  const width = (n) => `${Math.min(100, whole ? (100 * n) / whole : 0)}%`;
  const fill = part ? el("span", { class: "fill", style: { width: width(part) } }) : "";
  const tick = mark === null ? "" : el("span", { class: "tick", style: { left: width(mark) } });
  return el("span", { class: `bar ${kind}`, "aria-hidden": "true" }, fill, tick);
}

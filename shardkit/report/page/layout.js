const ways = (axes) => axes.reduce((n, axis) => n * sizes.get(axis), 1);
const shards = (leaf) => leaf.spec.reduce((n, axes) => n * ways(axes), 1);
const copies = (leaf) => devices / shards(leaf);
const whole = (leaf) => shards(leaf) === 1 && devices > 1;
// As in the findings: declared copies and scalars are intended.
const warns = (leaf) =>
  whole(leaf) &&
  !leaf.declared_replicated &&
  leaf.shape.length > 0 &&
  ["params", "opt_state", "model_state"].includes(leaf.part);

// Which block of each dim a device holds; the first axis of a dim counts slowest.
const block_of = (leaf, place) =>
  leaf.spec.map((axes) => axes.reduce((n, axis) => n * sizes.get(axis) + place[axis], 0));
const shard_of = (leaf, block) => block.reduce((n, i, dim) => n * ways(leaf.spec[dim]) + i, 0);

function slice_text(leaf, block) {
  const dims = leaf.shard.map((n, dim) =>
    ways(leaf.spec[dim]) === 1
      ? ":"
      : `${block[dim] * n}:${Math.min(leaf.shape[dim], (block[dim] + 1) * n)}`,
  );
  return `[${dims.join(", ")}]`;
}

// Hues from green to pink: the warm ones are reserved for warnings.
const hue = (leaf, shard) => 150 + (190 * shard) / Math.max(1, shards(leaf) - 1);

function coloured(node, leaf, shard) {
  node.classList.add(warns(leaf) ? "copied" : whole(leaf) ? "plain" : "shard");
  node.style.setProperty("--hue", hue(leaf, shard).toFixed(0));
  node.dataset.shard = shard;
  node.textContent = whole(leaf) ? "all" : integer(shard);
}

function draw_layout(leaf) {
  const said = el(
    "p",
    { class: "said", "aria-live": "polite" },
    "Point at a device to see its shard and the devices with the same one.",
  );
  const drawing = el(
    "div.drawing",
    el("div", el("h4", "The array, cut into shards"), blocks(leaf)),
    el(
      "div.grow",
      el("h4", `The mesh: ${plural(devices, "device")}, and the shard each holds`),
      draw_grid((button, place) => paint(leaf, button, place)),
    ),
  );
  point(drawing, said, leaf);
  return el(
    "div",
    el("h3.path", `${named(leaf)} `, el("span.quiet", type(leaf))),
    el("p", summary(leaf)),
    leaf.declared_by ? el("p.quiet", `Declared by ${leaf.declared_by}.`) : "",
    dims_table(leaf),
    said,
    drawing,
  );
}

function summary(leaf) {
  const each = `${bytes(leaf.device_bytes)} on each device`;
  if (warns(leaf))
    return el(
      "span.warn",
      `Replicated: all ${integer(devices)} devices hold the whole array, and no rule declares it. ` +
        `${each}.`,
    );
  if (whole(leaf))
    return `Every device holds the whole array${leaf.declared_replicated ? ", as declared" : ""}: ${each}.`;
  const unused = report.mesh
    .filter(([axis, size]) => size > 1 && !leaf.spec.flat().includes(axis))
    .map(([axis]) => axis);
  const same =
    copies(leaf) === 1
      ? "each on one device"
      : `each on ${integer(copies(leaf))} devices (the same along ${unused.join(", ")})`;
  return `${plural(shards(leaf), "shard")}, ${same}: ${each}.`;
}

function dims_table(leaf) {
  if (!leaf.shape.length) return "";
  const rows = leaf.shape.map((size, dim) =>
    el(
      "tr",
      el("th", { scope: "row" }, String(dim)),
      leaf.names ? el("td", leaf.names[dim] ?? "") : "",
      el("td.number", integer(size)),
      el(
        "td",
        leaf.spec[dim].length
          ? leaf.spec[dim].map((axis) =>
              el("span", axis_name(axis), ` (${integer(sizes.get(axis))}) `),
            )
          : "whole",
      ),
      el("td.number", integer(leaf.shard[dim])),
    ),
  );
  const titles = ["dim", ...(leaf.names ? ["name"] : []), "size", "split over", "on each device"];
  const head = titles.map((title) =>
    el("th", { scope: "col", class: /size|device/.test(title) ? "number" : "" }, title),
  );
  return el("table.dims", el("thead", el("tr", head)), el("tbody", rows));
}

// The array as a rectangle of its first two split dims.
function blocks(leaf) {
  const split = leaf.spec.map((axes, dim) => dim).filter((dim) => ways(leaf.spec[dim]) > 1);
  const [down, across] =
    split.length > 1
      ? split
      : leaf.shape.length > 1 && split[0] === 0
        ? [0, null]
        : [null, split[0] ?? null];
  const count = (dim) => (dim === null ? 1 : ways(leaf.spec[dim]));
  const rows = places(count(down), LIMITS.row).map((j) =>
    el(
      "tr",
      places(count(across), LIMITS.row).map((i) => {
        if (i === null || j === null) return el("td.gap", j === null ? "⋮" : "⋯");
        const block = leaf.spec.map((_, dim) => (dim === across ? i : dim === down ? j : 0));
        const cell = el("td", { class: "block", title: slice_text(leaf, block) });
        coloured(cell, leaf, shard_of(leaf, block));
        return cell;
      }),
    ),
  );
  const more = split.length > 2 ? `Block 0 of dim ${split.slice(2).join(" and ")}.` : "";
  const sides = [down === null ? "" : `dim ${down} ↓`, across === null ? "" : `dim ${across} →`]
    .filter(Boolean)
    .join("   ");
  return el(
    "div",
    el("div.sides", sides || "not split"),
    el("table.array", el("tbody", rows)),
    more ? el("p.quiet", more) : "",
  );
}

function paint(leaf, button, place) {
  const block = block_of(leaf, place);
  const shard = shard_of(leaf, block);
  coloured(button, leaf, shard);
  const text =
    `Device ${integer(device_number(place))} (${place_text(place)}) holds ` +
    (whole(leaf) ? "the whole array" : `shard ${integer(shard)}, ${slice_text(leaf, block)}`);
  button.dataset.text = text;
  button.setAttribute("aria-label", text);
}

// Marks all devices with the same shard as the one under the pointer or in focus.
function point(drawing, said, leaf) {
  const mark = (event) => {
    const at = event.target.closest("[data-shard]");
    if (!at) return;
    drawing.classList.add("pointing");
    for (const node of drawing.querySelectorAll("[data-shard]"))
      node.classList.toggle("same", node.dataset.shard === at.dataset.shard);
    const others =
      copies(leaf) > 1
        ? `; the same is on ${plural(copies(leaf) - 1, "other device")}`
        : "; no other device holds it";
    if (at.dataset.text) said.textContent = `${at.dataset.text}${others}.`;
  };
  drawing.addEventListener("pointerover", mark);
  drawing.addEventListener("focusin", mark);
  drawing.addEventListener("pointerleave", () => drawing.classList.remove("pointing"));
}

let select_leaf = () => {};

function draw_leaves() {
  const mesh = report.mesh.map(([name, size]) => `${name} ${integer(size)}`).join(" × ");
  const said = `${plural(devices, "device")}. Devices are numbered in the order of the mesh.`;
  const text = el("p", `Mesh ${mesh}: ${said}`);
  const target = section("layout", "Mesh and layouts", ["compiled"], text);
  if (!report.leaves.length) {
    target.append(
      el("p.quiet", "This report lists no arrays."),
      draw_grid((button, place) => {
        button.classList.add("plain");
        button.textContent = integer(device_number(place));
        button.setAttribute("aria-label", `Device ${device_number(place)} (${place_text(place)})`);
      }),
    );
    return;
  }
  const shown = el("div.leaf");
  target.append(el("div.layouts", leaf_list(shown), shown));
  const params = report.leaves.filter((leaf) => leaf.part === "params");
  const largest = (a, b) => (b.device_bytes > a.device_bytes ? b : a);
  select_leaf((params.length ? params : report.leaves).reduce(largest), false);
}

function leaf_list(shown) {
  const parts = [...new Set(report.leaves.map((leaf) => leaf.part))];
  const filters = { part: choice("part", parts, redraw), text: searcher("path", redraw) };
  const only = el("input", { type: "checkbox", onchange: redraw });
  const said = el("p", { class: "said", "aria-live": "polite" });
  let selected = null;
  const held = amount("on a device", "device_bytes", bytes);
  const kind = (leaf) => (warns(leaf) ? "warn" : whole(leaf) ? "quiet" : "");
  const columns = [
    column("array", named, { wide: true, show: leaf_button }),
    column("split over", spec_text, {
      show: (leaf) => el("span", { class: kind(leaf) }, spec_text(leaf)),
    }),
    held,
    amount("copies", copies, integer, { hint: "Devices that hold the same shard" }),
  ];
  const made = table(columns, {
    caption: "Arrays of the step's input",
    sort: held,
    empty: "No array is like that.",
    row: (leaf) => ({ class: leaf === selected ? "selected" : "" }),
  });

  function leaf_button(leaf) {
    const pressed = { class: "pick", "aria-pressed": String(leaf === selected) };
    return [
      button(leaf.path || leaf.part, () => select_leaf(leaf, false), pressed),
      el("span.quiet", `${leaf.part} ${type(leaf)}`),
    ];
  }
  function redraw() {
    const kept = report.leaves.filter(
      (leaf) =>
        (!filters.part.get() || leaf.part === filters.part.get()) &&
        leaf.path.toLowerCase().includes(filters.text.get()) &&
        (!only.checked || warns(leaf)),
    );
    const all = bytes(sum(kept, (leaf) => leaf.device_bytes));
    said.textContent = `${integer(kept.length)} of ${plural(report.leaves.length, "array")}, ${all} on a device`;
    made.fill(kept);
  }
  select_leaf = (leaf, scroll) => {
    selected = leaf;
    shown.replaceChildren(draw_layout(leaf));
    for (const button of made.body.querySelectorAll(".pick[aria-pressed=true]"))
      mark(button, false);
    const at = [...made.body.rows].find((row) => row.data === leaf);
    if (at) mark(at.querySelector(".pick"), true);
    if (scroll) document.getElementById("layout").scrollIntoView();
  };
  function mark(button, on) {
    button.setAttribute("aria-pressed", String(on));
    button.closest("tr").classList.toggle("selected", on);
  }
  redraw();
  const check = el("label.check", only, "only unmeant copies");
  const choices = el("div.filters", filters.part.node, filters.text.node, check);
  return el("div.list", choices, said, made.node);
}

function spec_text(leaf) {
  if (!leaf.spec.some((axes) => axes.length))
    return leaf.declared_replicated ? "whole, as declared" : "whole";
  return `(${leaf.spec.map((axes) => axes.join("·") || "–").join(", ")})`;
}

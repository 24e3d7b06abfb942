function draw_findings() {
  const { findings: rows, kept } = report;
  const target = section("findings", "Findings", ["compiled"]);
  const folded = el("ol.findings", kept.map(finding));
  const below = kept.length ? fold(`${kept.length} more, without a better fix`, folded) : "";
  if (!rows.length) return target.append(el("p.quiet", "None."), below);
  const shows = el("ol.findings");
  const more = button("", () => grow(), { class: "more" });
  let shown = 0;
  function grow(step = 40) {
    shows.append(...rows.slice(shown, shown + step).map(finding));
    shown = Math.min(rows.length, shown + step);
    more.hidden = shown === rows.length;
    const left = rows.length - shown;
    more.textContent = `Show ${integer(Math.min(40, left))} more of ${integer(left)}`;
  }
  grow(6);
  target.append(shows, more, below);
}

function finding(one) {
  const about = [
    one.leaf || one.scope,
    at_line(one.source),
    one.axes.length ? `over ${one.axes.join(", ")}` : "",
  ];
  const leaf = report.leaves.find((leaf) => named(leaf) === one.leaf);
  const shows = () => select_leaf(leaf, true);
  return el(
    "li",
    el(
      "div.line",
      el("strong", one.kind.replaceAll("_", " ")),
      el("span.about", about.filter(Boolean).join(" ")),
      one.bytes ? el("span.bytes", bytes(one.bytes)) : "",
      leaf ? button("Show its layout", shows, { class: "link" }) : "",
    ),
    el("p", one.why),
    one.fix ? copyable(one) : "",
  );
}

function copyable({ fix: text, tried, bytes }) {
  const code = el("code", text);
  const copy = async (event) => {
    const pressed = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
      pressed.textContent = "Copied";
    } catch {
      // A browser that refuses the clipboard still lets the user copy a selection.
      getSelection().selectAllChildren(code);
      pressed.textContent = "Selected";
    }
    setTimeout(() => (pressed.textContent = "Copy"), 1500);
  };
  return el(
    "div.fix",
    el("span.name", tried || !bytes ? "Fix" : "Fix, not tried"),
    code,
    button("Copy", copy, { "aria-label": "Copy the fix" }),
  );
}

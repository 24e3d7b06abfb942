function draw_findings() {
  const { findings: rows, kept } = report;
  const target = section("findings", "Findings", ["compiled"]);
  const title = el("summary", {}, `${kept.length} more, without a better fix`);
  const folded = el("ol", { class: "findings" }, ...kept.map(finding));
  const below = kept.length ? el("details", {}, title, folded) : "";
  if (!rows.length) return target.append(el("p", { class: "quiet" }, "None."), below);
  const list = el("ol", { class: "findings" });
  const more = button({ class: "more", onclick: () => grow() });
  let shown = 0;
  function grow(step = 40) {
    list.append(...rows.slice(shown, shown + step).map(finding));
    shown = Math.min(rows.length, shown + step);
    more.hidden = shown === rows.length;
    const left = rows.length - shown;
    more.textContent = `Show ${integer(Math.min(40, left))} more of ${integer(left)}`;
  }
  grow(6);
  target.append(list, more, below);
}

function finding(one) {
  const about = [one.leaf || one.scope, at_line(one.source), one.axes.length ? `over ${one.axes.join(", ")}` : ""];
  const leaf = report.leaves.find((leaf) => named(leaf) === one.leaf);
  const shows = () => select_leaf(leaf, true);
  return el(
    "li",
    {},
    el(
      "div",
      { class: "line" },
      el("strong", {}, one.kind.replaceAll("_", " ")),
      el("span", { class: "about" }, about.filter(Boolean).join(" ")),
      one.bytes ? el("span", { class: "bytes" }, bytes(one.bytes)) : "",
      leaf
        ? button({ class: "link", onclick: shows }, "Show its layout")
        : "",
    ),
    el("p", {}, one.why),
    one.fix ? copyable(one) : "",
  );
}

function copyable({ fix: text, tried, bytes }) {
  const code = el("code", {}, text);
  const copy = async (event) => {
    const own = event.currentTarget;
    try {
      await navigator.clipboard.writeText(text);
      own.textContent = "Copied";
    } catch {
      // A browser that refuses the clipboard still lets the user copy a selection.
      getSelection().selectAllChildren(code);
      own.textContent = "Selected";
    }
    setTimeout(() => {
      own.textContent = "Copy";
    }, 1500);
  };
  return el(
    "div",
    { class: "fix" },
    el("span", { class: "name" }, tried || !bytes ? "Fix" : "Fix, not tried"),
    code,
    button({ "aria-label": "Copy the fix", onclick: copy }, "Copy"),
  );
}

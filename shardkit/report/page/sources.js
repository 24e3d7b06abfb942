// What the step sends, by the line of the user's code that causes it; the lines add up to all.
function draw_sources() {
  const lines = report.by_source;
  const target = section("sources", "Source lines", ["compiled"]);
  if (!lines.length) return target.append(el("p.quiet", "Nothing is sent."));
  const largest = Math.max(1, ...lines.map((one) => one.bytes));
  const beyond = amount("in findings", "in_findings", (n) => (n ? bytes(n) : ""));
  const columns = [
    column("source", "name", {
      wide: true,
      show: (one) => opener(one.name, () => reasons(one), 5),
    }),
    amount("sent", "bytes", bytes),
    beyond,
    amount("share", "bytes", (n) => percent(n, report.sent)),
    column("", "bytes", { show: (one) => bar(one.bytes, largest), hint: "Sort" }),
    code_column,
  ];
  const said =
    `${bytes(report.sent)} sent per device and step, by the line that causes it. ` +
    "Those that findings are about come first.";
  const made = filled(lines, columns, { caption: "Bytes sent by source line", sort: beyond });
  target.append(el("p.quiet", said), made);
}

// What a line sends by which collective, and what that lies between.
const reasons = (one) =>
  definitions(one.parts.map(([size, what, why]) => [size, why ? `${what}: ${why}` : what]));

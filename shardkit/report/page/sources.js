// What the step sends, by the line of the user's code that causes it; the lines add up to all.
function draw_sources() {
  const lines = report.by_source;
  const target = section("sources", "Source lines", ["compiled"]);
  if (!lines.length) return target.append(el("p", { class: "quiet" }, "Nothing is sent."));
  const largest = Math.max(1, ...lines.map((one) => one.bytes));
  const sent = { title: "sent", value: (one) => one.bytes, number: true };
  sent.show = (one) => bytes(one.bytes);
  const beyond = { title: "in findings", value: (one) => one.in_findings, number: true };
  beyond.show = (one) => (one.in_findings ? bytes(one.in_findings) : "");
  const made = table(
    [
      {
        title: "source",
        value: (one) => one.name,
        wide: true,
        show: (one) => opener(one.name, () => reasons(one), 5),
      },
      sent,
      beyond,
      {
        title: "share",
        value: (one) => one.bytes,
        number: true,
        show: (one) => percent(one.bytes, report.sent),
      },
      { title: "", value: (one) => one.bytes, show: (one) => bar(one.bytes, largest), hint: "Sort" },
      { title: "code", value: (one) => one.code, wide: true, show: (one) => el("code", {}, one.code) },
    ],
    { caption: "Bytes sent by source line", sort: beyond },
  );
  made.fill(lines);
  const said = `${bytes(report.sent)} sent per device and step, by the line that causes it. `
    + "Those that findings are about come first.";
  target.append(el("p", { class: "quiet" }, said), made.node);
}

// What a line sends by which collective, and what that lies between.
const reasons = (one) =>
  definitions(one.parts.map(([size, what, why]) => [size, why ? `${what}: ${why}` : what]));

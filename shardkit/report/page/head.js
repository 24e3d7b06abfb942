function draw_incomplete() {
  const counted = report.flops ? report.flops.problems : [];
  const found = [...report.ledger.problems, ...report.memory.problems, ...counted];
  if (!report.messages_complete)
    found.push(
      "The compiler's messages are unknown: involuntary rematerializations may be missing.",
    );
  if (!found.length) return;
  const target = document.getElementById("incomplete");
  target.hidden = false;
  target.append(
    el("h2", "Incomplete"),
    el("p", "These parts could not be read. Totals that depend on them are lower bounds."),
    list(found),
  );
}

function draw_subject() {
  const kind = report.device_kind || report.platform;
  const mesh = report.mesh.map(([name, size]) => `${name}=${integer(size)}`).join(", ");
  const measured = report.measured
    ? `Times of collectives are measured, by the profile ${report.measured.path}.`
    : "Nothing on this page was measured.";
  const simulated = report.platform === "cpu" ? ". Simulated devices have no meaningful speed" : "";
  document.getElementById("subject").textContent =
    `${report.name ? `${report.name}: one` : "One"} training step, compiled for ${plural(devices, "device")} of kind ${kind}, ` +
    `mesh (${mesh})${simulated}. ${measured} ${report.notes.join(" ")}`;
  document.title = `${report.name || "shardkit report"}: ${kind}, ${mesh}`;
  const { date, ...versions } = report.made;
  const by = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
  document.getElementById("made").textContent = date
    ? `Compiled ${date.replace("T", " ").replace("Z", " UTC")} with ${by.join(", ")}.`
    : "";
}

function figure(name, value, note, kind, warns = false) {
  return el(
    "div",
    { class: warns ? "figure warn" : "figure" },
    el("div.name", name, label(kind)),
    el("div.value", value),
    el("div.note", note),
  );
}

function draw_figures() {
  const { memory, flops, findings, ledger } = report;
  const hidden = bytes(sum(report.traffic, (one) => one.hidden));
  const sent = least(ledger.problems) + bytes(report.sent);
  const axes = `over ${plural(report.mesh.length, "mesh axis", "mesh axes")}`;
  const largest = findings.length ? `${bytes(findings[0].bytes)} in the largest` : "nothing to fix";
  const made = [
    figure_of_time(),
    figure("Device memory", bytes(memory.total), fits(memory), "compiled", over(memory)),
    figure("Sent per step", sent, `by each device, ${hidden} of it hidden`, "compiled"),
    figure("Collectives", integer(ledger.rows.length), axes, "compiled"),
    flops ? figure_of_flops(flops) : "",
    figure("Findings", integer(findings.length), largest, "compiled", findings.length > 0),
  ];
  document.getElementById("figures").append(...made);
}

function figure_of_flops({ problems, model, recompute }) {
  const more = recompute ? `${percent(recompute, model)} more` : "none";
  return figure(
    "FLOPs per step",
    least(problems) + si(model),
    `all devices, ${more} recomputed`,
    "traced",
  );
}

function figure_of_time() {
  const { timeline } = report;
  if (!timeline) return "";
  const time =
    timeline.source === "schedule" ? seconds(timeline.high) : `≥ ${seconds(timeline.low)}`;
  return figure("Step time", time, `on ${timeline.chip}${mfu(timeline)}`, "modelled");
}

const over = (memory) =>
  memory.capacity !== null && memory.total !== null && memory.total > memory.capacity;

function fits(memory) {
  if (memory.capacity === null) return "capacity of the device is unknown";
  if (memory.total === null) return `of ${bytes(memory.capacity)}`;
  const left = memory.capacity - memory.total;
  return left < 0
    ? `does not fit: ${bytes(-left)} too much for ${bytes(memory.capacity)}`
    : `fits: ${bytes(left)} left of ${bytes(memory.capacity)}`;
}

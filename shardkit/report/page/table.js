// A table whose headers sort it. A column is {title, value, show, number, hint, wide}: `value`
// is the sort key, `show` the text of the cell. Long tables grow by PAGE rows at a time.
function table(columns, { caption, sort = null, row = () => ({}), empty = "None." }) {
  const body = el("tbody");
  const more = button({ class: "more" });
  const state = { rows: [], shown: PAGE, sort, descending: true };
  const heads = columns.map((column) => head(column, state, draw));
  const made = el(
    "table",
    {},
    el("caption", { class: "hidden" }, caption),
    el("thead", {}, el("tr", {}, heads)),
    body,
  );
  const frame = el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    made,
  );
  more.addEventListener("click", () => {
    state.shown += PAGE;
    draw();
  });

  function draw() {
    const sorted = sort_rows(state);
    body.replaceChildren(...sorted.slice(0, state.shown).map((one) => cells(columns, one, row)));
    if (!sorted.length)
      body.append(el("tr", {}, el("td", { colspan: columns.length, class: "quiet" }, empty)));
    const left = sorted.length - state.shown;
    more.hidden = left <= 0;
    more.textContent = `Show ${integer(Math.min(PAGE, left))} more of ${integer(left)}`;
    heads.forEach((th, i) => {
      const order = state.descending ? "descending" : "ascending";
      th.setAttribute("aria-sort", state.sort === columns[i] ? order : "none");
    });
  }
  function fill(rows) {
    Object.assign(state, { rows, shown: PAGE });
    draw();
  }
  return { node: el("div", { class: "table" }, frame, more), fill, body };
}

function head(column, state, draw) {
  const sorts = () => {
    const again = state.sort === column;
    Object.assign(state, { sort: column, descending: again ? !state.descending : !!column.number });
    draw();
  };
  const button = el(
    "button",
    { type: "button", title: column.hint ?? "Sort", onclick: sorts },
    column.title,
  );
  return el("th", { scope: "col", class: column.number ? "number" : "" }, button);
}

function sort_rows({ rows, sort, descending }) {
  if (!sort) return rows;
  const sign = descending ? -1 : 1;
  const known = (value) => value !== null && value !== undefined;
  return [...rows].sort((a, b) => {
    const [x, y] = [sort.value(a), sort.value(b)];
    if (!known(x) || !known(y)) return known(y) - known(x);
    return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
  });
}

function cells(columns, one, row) {
  const made = columns.map((column) => {
    const kind = [column.number && "number", column.wide && "wide"].filter(Boolean).join(" ");
    return el(
      "td",
      { class: kind },
      column.show ? column.show(one) : String(column.value(one) ?? ""),
    );
  });
  const line = el("tr", row(one), made);
  line.data = one;
  return line;
}

// Opens a row of details below the row whose button it returns.
function opener(text, details, columns) {
  let below = null;
  const toggle = (event) => {
    const button = event.currentTarget;
    button.setAttribute("aria-expanded", String(!below));
    if (below) below = void below.remove();
    else {
      below = el("tr", { class: "details" }, el("td", { colspan: columns }, details()));
      button.closest("tr").after(below);
    }
  };
  return el(
    "button",
    { type: "button", class: "opener", "aria-expanded": "false", onclick: toggle },
    text,
  );
}

function definitions(pairs) {
  const rows = pairs.filter(([, value]) => value !== "" && value !== null);
  return el(
    "dl",
    {},
    rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
  );
}

function choice(title, options, redraw) {
  const select = el(
    "select",
    { onchange: redraw },
    el("option", { value: "" }, "any"),
    options.map((option) => el("option", { value: option }, option)),
  );
  return { node: el("label", {}, title, select), get: () => select.value };
}

function searcher(title, redraw) {
  const input = el("input", { type: "search", oninput: redraw, spellcheck: "false" });
  return { node: el("label", {}, title, input), get: () => input.value.trim().toLowerCase() };
}

// Looks at the drawn page in a browser, presses one thing in each table, and writes what is wrong
// into the page: text that wraps letter by letter, what is wider than the screen, errors.
const wrong = [];
const visible = (node) => node.getClientRects().length > 0;

function check_width(when) {
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) wrong.push(`${when}: ${width} px wide on a screen of ${innerWidth}`);
  for (const node of document.querySelectorAll("main *")) {
    const { right, width } = node.getBoundingClientRect();
    const scrolls = node.closest(".scroll, .mesh, .phases, .plot, svg");
    if (width && right > innerWidth + 1 && !scrolls)
      wrong.push(`${when}: ${node.tagName}.${node.className} ends at ${Math.round(right)} px`);
  }
}

// Lines of a text with fewer than four characters each, where it has more than two lines.
function check_text(when) {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const text = node.textContent.trim();
    if (text.length < 6 || !visible(node.parentElement) || node.parentElement.closest("script"))
      continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const lines = new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size;
    if (lines > 2 && text.length / lines < 4)
      wrong.push(`${when}: ${lines} lines for ${JSON.stringify(text.slice(0, 40))}`);
  }
}

// Browsers leave out shapes with coordinates above 2^31, and their edges are coarse long before.
function check_pictures() {
  for (const node of document.querySelectorAll("svg[viewBox]")) {
    const most = Math.max(...node.getAttribute("viewBox").split(" ").map(Number));
    if (most > 2 ** 16) wrong.push(`picture: coordinates to ${most}`);
  }
}

check_width("as drawn");
check_text("as drawn");
check_pictures();
for (const one of document.querySelectorAll("details")) one.open = true;
let pressed = 0;
for (const table of document.querySelectorAll("table")) {
  const button = table.querySelector(".opener, .pick, .device") ?? table.querySelector("button");
  if (button) pressed += 1;
  button?.click();
  table.querySelector("thead button")?.click();
}
for (const slider of document.querySelectorAll("input[type=range]")) {
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
}
check_width("opened");
check_text("opened");
wrong.push(...window.errors);
const result = document.createElement("pre");
result.id = "probed";
result.textContent = JSON.stringify({ width: innerWidth, pressed, wrong: [...new Set(wrong)] });
parent.document.body.append(result);

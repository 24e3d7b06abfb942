// The parts of a browser that the report's page uses, as far as drawing it needs them. Text and
// attributes are kept apart from the tree, as in a browser, so what is printed is what is shown.
class Node {
  constructor(tag) {
    Object.assign(this, { tag, children: [], attributes: {}, dataset: {}, listeners: {} });
    const styles = (this.styles = {});
    this.style = {
      setProperty: (name, value) => {
        styles[name] = value;
      },
    };
    const names = (this.classes = new Set());
    this.classList = {
      add: (n) => names.add(n),
      toggle: (n, on) => (on ? names.add(n) : names.delete(n)),
    };
  }
  append(...more) {
    for (const one of more) {
      if (one instanceof Node) one.parent = this;
      this.children.push(one);
    }
  }
  replaceChildren(...more) {
    this.children = [];
    this.append(...more);
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
    if (name === "class") for (const one of value.split(" ")) this.classes.add(one);
  }
  addEventListener(name, does) {
    this.listeners[name] = does;
  }
  set textContent(text) {
    this.children = [String(text)];
  }
  get textContent() {
    return this.children.map((c) => (c instanceof Node ? c.textContent : String(c))).join("|");
  }
  get value() {
    return this.chosen ?? "";
  }
  set value(value) {
    this.chosen = String(value);
  }
  get rows() {
    return this.children.filter((c) => c.tag === "tr");
  }
  all() {
    return this.children.flatMap((c) => (c instanceof Node ? [c, ...c.all()] : []));
  }
  matches(selector) {
    const [, tag, name, pressed] = selector.match(/^(\w*)(?:\.(\w+))?(\[aria-pressed=true\])?$/);
    return (
      (!tag || tag === this.tag) &&
      (!name || this.classes.has(name)) &&
      (!pressed || this.attributes["aria-pressed"] === "true")
    );
  }
  querySelectorAll(selector) {
    return this.all().filter((c) => c.matches(selector));
  }
  querySelector(selector) {
    return this.querySelectorAll(selector)[0] ?? null;
  }
  closest(selector) {
    return this.matches(selector) ? this : this.parent.closest(selector);
  }
  after(node) {
    const around = this.parent.children;
    around.splice(around.indexOf(this) + 1, 0, node);
    node.parent = this.parent;
  }
  scrollIntoView() {}
}
const html = require("fs").readFileSync(0, "utf8");
const body = new Node("body");
for (const tag of ["main", "nav"]) body.append(new Node(tag));
const ids = {
  report: new Node("script"),
  subject: new Node("p"),
  made: new Node("p"),
  svg: new Node("svg"),
  incomplete: new Node("section"),
  figures: new Node("section"),
};
body.children[0].append(...Object.values(ids));
ids.report.textContent = html.match(
  /<script type="application\/json" id="report">([^<]*)<\/script>/,
)[1];
const document = {
  createElement: (tag) => new Node(tag),
  createElementNS: (_, tag) => new Node(tag),
  querySelector: (selector) => body.querySelector(selector),
  getElementById: (id) => ids[id] ?? body.all().find((c) => c.attributes.id === id),
};
const script = html.match(/<script>\n([^]*?)<\/script>/)[1];
new Function("document", script)(document);
ids.report.textContent = "";
const find = (id) => document.getElementById(id);
const press = (node) => node.listeners.click({ currentTarget: node, target: node });
const change = (node, value) => {
  node.chosen = value;
  (node.listeners.change ?? node.listeners.input)({ target: node });
};

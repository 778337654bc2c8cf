// Small helpers: elements, numbers, state. Texts only ever go into the page as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const NONE = "–";
const state = { board: 0, method: null, against: null, sort: null, picked: null, details: null };

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(made.style, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

function number(value) {
  if (value === "inf") return Infinity;
  if (value === "-inf") return -Infinity;
  return typeof value === "number" ? value : NaN;
}

function percent(value, digits = 1) {
  const share = number(value);
  if (!Number.isFinite(share)) return NONE;
  const shown = (100 * share).toFixed(digits);
  return Number(shown) === 0 ? shown.replace("-", "") : shown;
}

function plain(given) {
  const value = number(given);
  if (Number.isNaN(value)) return NONE;
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return value.toFixed(Math.max(0, 2 - Math.floor(Math.log10(size))));
}

function seconds(given) {
  const value = number(given);
  if (!Number.isFinite(value)) return NONE;
  if (value < 0.1) return `${(1000 * value).toFixed(0)} ms`;
  if (value < 10) return `${value.toFixed(2)} s`;
  const whole = Math.round(value);
  if (whole < 120) return `${whole} s`;
  const two = (n) => String(n).padStart(2, "0");
  if (whole < 7200) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function limited(share) {
  return Math.min(100, Math.max(0, 100 * share));
}

function scrolled(table, label) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}

function plainTable(caption, columns, rows, silent = false) {
  return el("table", {},
    el("caption", { class: silent ? "hidden-label" : null }, caption),
    el("thead", {}, el("tr", {}, columns.map((column) => el("th", { scope: "col" }, column)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((cell, i) => (
      i ? el("td", {}, cell) : el("th", { scope: "row" }, cell)))))));
}

function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), children);
}

function chooser(label, options, value, onchange, className = "") {
  const select = el("select", { onchange: (event) => onchange(event.target.value) },
    options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, text)));
  return el("label", { class: className }, label, select);
}

const board = () => data.boards[state.board];
const measuresOf = (one) => one.measures[board().primary] || {}; // by kind, under the protocol that the board ranks by
const entry = (id) => board().entries.find((one) => one.id === id) || null;

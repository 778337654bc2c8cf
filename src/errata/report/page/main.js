// Puts the page together and keeps the sections in step.

function redraw(id, make) {
  const made = make();
  document.getElementById(id).replaceWith(made);
  if (made.draw) made.draw();
}

function focusOn(selector) {
  const found = document.querySelector(selector);
  if (found && !found.disabled) found.focus();
}

function goTo(id) {
  const heading = document.querySelector(`#${id} h2`);
  heading.setAttribute("tabindex", "-1");
  heading.focus({ preventScroll: true });
  document.getElementById(id).scrollIntoView();
}

function firstMethod() {
  const tested = board().entries.find((e) => !e.role);
  return (tested || board().entries[0]).id;
}

function defaultRival() {
  const found = board().entries.find((e) => e.role.startsWith("fine") && e.id !== state.method);
  return found ? found.id : null;
}

function chooseBoard(i) {
  Object.assign(state, { board: i, sort: null, picked: null });
  state.method = firstMethod();
  state.against = defaultRival();
  Object.assign(shown, { case: 0, kind: "", filter: "all", count: PAGE });
  for (const [id, make] of [["protocol", protocolSection], ["board", boardSection], ["curves", curvesSection], ["method", methodSection], ["cases", casesSection]]) redraw(id, make);
  focusOn(`#protocol .choice:nth-child(${i + 1})`);
}

function chooseMethod(id, from = null) {
  state.method = id;
  if (state.against === id) state.against = null;
  shown.count = PAGE;
  for (const [name, make] of [["board", boardSection], ["method", methodSection], ["cases", casesSection]]) redraw(name, make);
  if (from) focusOn(`#${from} label:first-child select`);
}

function publishedSection() {
  if (!data.published.length) {
    return section("published", "Published and measured", el("p", { class: "empty" }, "The runs have no published table."));
  }
  return section("published", "Published and measured", data.published.map((one) => [
    el("h3", {}, one.title),
    el("p", { class: "note" }, `${one.source ? `${one.source}. ` : ""}Published for ${one.setting}. Provenance: ${one.provenance}, ${one.meaning}. `,
      one.convention ? `Convention: ${one.convention.replace(/\.$/, "")}. ` : "",
      one.board ? `Measured: ${one.board}.` : "No comparable measurement: no board has this model, dataset and schedule.",
      one.tolerance === null ? "" : ` Tolerance: ${one.tolerance} either way.`),
    one.board ? publishedTable(one) : el("details", {}, el("summary", {}, "The published figures"), publishedTable(one)),
  ]));
}

function publishedTable(one) {
  return scrolled(plainTable(one.title, ["Method", "Score", "Published", "Provenance", "Measured", "Difference", "Agreement"],
    one.lines.map(([method, score, published, measured, within, provenance]) => [method, score,
      published === null ? "not shown" : figureText(published), provenance, measured === null ? NONE : figureText(measured),
      published === null || measured === null ? NONE : `${measured > published ? "+" : ""}${(measured - published).toFixed(2)}`,
      within === null ? "" : within ? "within tolerance" : el("span", { class: "bad" }, "outside tolerance")]), true), one.title);
}

const figureText = (value) => String(Number(Number(value).toFixed(2)));

function absentSection() {
  if (!data.absent.length) return section("absent", "Cells without results", el("p", { class: "empty" }, "Every cell has results."));
  return section("absent", "Cells without results",
    scrolled(el("table", { class: "wrap" },
      el("caption", {}, "Refused, failed or unfinished, with the reason"),
      el("thead", {}, el("tr", {}, ["Method", "Model", "Dataset", "Schedule", "Status", "Reason"].map((t) => el("th", { scope: "col" }, t)))),
      el("tbody", {}, data.absent.map((one) => el("tr", {}, el("th", { scope: "row" }, one.method),
        [one.model, one.dataset, one.schedule].map((t) => el("td", {}, t)),
        el("td", { class: one.status === "failed" ? "bad" : "" }, one.status),
        el("td", {}, one.reason || "no result file yet", one.trace ? el("details", {}, el("summary", {}, "traceback"), el("pre", {}, one.trace)) : null))))), "Cells without results"));
}

function provenanceSection() {
  return section("provenance", "Provenance", data.runs.map((run) => [
    data.runs.length > 1 ? el("h3", {}, run.name) : null,
    el("ul", { class: "plain" }, run.facts.map((fact) => el("li", {}, fact))),
  ]));
}

function themes() {
  const button = document.getElementById("theme");
  const order = ["auto", "light", "dark"];
  let now = "auto";
  button.hidden = false;
  button.addEventListener("click", () => {
    now = order[(order.indexOf(now) + 1) % order.length];
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = `Theme: ${now}`;
  });
}

function start() {
  const app = document.getElementById("app");
  document.getElementById("sections").hidden = false;
  themes();
  if (!data.boards.length) {
    app.append(section("board", "Board", el("p", { class: "empty" }, "No cell has results yet.")), publishedSection(), absentSection(), provenanceSection());
    return;
  }
  state.method = firstMethod();
  state.against = defaultRival();
  app.append(protocolSection(), boardSection(), curvesSection(), methodSection(), casesSection(), publishedSection(), absentSection(), provenanceSection());
  const drawCurves = () => { const one = document.getElementById("curves"); if (one.draw) one.draw(); };
  drawCurves();
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; drawCurves(); } });
  window.addEventListener("beforeprint", () => document.querySelectorAll("#board details").forEach((one) => { one.open = true; }));
}

start();

// Cases with their texts: every probe before and after, filtered, made on demand.

const PAGE = 60;
const WORDS = ["", "wrong", "right"];
const shown = { case: 0, kind: "", filter: "all", count: PAGE };

const kindName = (kind) => data.details.kinds[kind] || kind;
const string = (i) => (i < 0 ? null : data.details.strings[i]);
const digit = (mark, place) => Math.floor(mark / 3 ** place) % 3;

function probesOf(cell, i) {
  const [name, edits, list, texts, marks, extra] = cell.cases[i];
  const probes = data.details.lists[list].map((number_, j) => {
    const [kind, prompt, answers, before, changes, mark] = data.details.probes[number_];
    return { case: string(name), edits, kind: string(kind), prompt: string(prompt), answers: answers.map(string),
      before: string(before), after: string(texts[j]), changes: Boolean(changes), marks: [mark, marks[j]], numbers: [] };
  });
  for (let j = 0; j < extra.length; j += 4) probes[extra[j]].numbers.push([string(extra[j + 1]), extra[j + 2], extra[j + 3]]);
  return probes;
}

function verdict(probe, side) {
  return digit(probe.marks[side], 0);
}

function passes(probe) {
  if (shown.kind && probe.kind !== shown.kind) return false;
  if (shown.filter === "wrong") return verdict(probe, 1) === 1;
  if (shown.filter === "changed") return probe.before !== probe.after;
  if (shown.filter === "broken") return verdict(probe, 0) === 2 && verdict(probe, 1) === 1;
  return true;
}

function caseName(cell, i) {
  const probes = probesOf(cell, i);
  const first = probes.find((probe) => probe.kind === "efficacy") || probes[0];
  const text = first ? `${first.prompt} → ${first.answers[0] || ""}` : "";
  const wrong = probes.filter((probe) => verdict(probe, 1) === 1).length;
  return `${string(cell.cases[i][0])} · ${text.length > 90 ? `${text.slice(0, 88)} …` : text} · ${wrong ? `${wrong} wrong` : "all right"}`;
}

function casesSection() {
  const one = entry(state.method);
  const cell = one.details === null ? null : data.details.cells[one.details];
  if (!cell) {
    return section("cases", "Cases", caseMethod(),
      el("p", { class: "empty" }, "The page has no texts of this method's cases."));
  }
  if (shown.case >= cell.cases.length) shown.case = 0;
  const kinds = [...new Set(cell.cases.flatMap((c) => data.details.lists[c[2]].map((p) => string(data.details.probes[p][0]))))];
  if (shown.kind && !kinds.includes(shown.kind)) shown.kind = "";
  const last = cell.cases.length - 1;
  const step = (by) => {
    shown.case = Math.min(last, Math.max(0, (shown.case < 0 ? 0 : shown.case) + by));
    refreshCases(by < 0 ? "#earlier" : "#later");
  };
  return section("cases", `Cases: ${one.name}`,
    cell.cases.length < cell.total ? el("p", { class: "note" },
      `The page holds the first ${cell.cases.length.toLocaleString("en")} of ${cell.total.toLocaleString("en")} cases; the others are in the run folder.`) : null,
    cell.cases[0][1] !== null ? el("p", { class: "note" },
      `Asked with all ${cell.cases[0][1].toLocaleString("en")} edits of the sequence in place.`) : null,
    el("div", { class: "controls" }, caseMethod(),
      chooser("Case", [["-1", `all ${cell.cases.length.toLocaleString("en")} cases`], ...cell.cases.map((_, i) => [i, caseName(cell, i)])], shown.case,
        (i) => { shown.case = Number(i); refreshCases("#cases label:nth-child(2) select"); }, "wide"),
      chooser("Kind", [["", "every kind"], ...kinds.map((kind) => [kind, kindName(kind)])], shown.kind,
        (kind) => { shown.kind = kind; refreshCases("#cases label:nth-child(3) select"); }),
      chooser("Show", [["all", "all probes"], ["wrong", "wrong after the edit"], ["changed", "text changed"], ["broken", "right before, wrong after"]], shown.filter,
        (filter) => { shown.filter = filter; refreshCases("#cases label:nth-child(4) select"); }),
      el("div", { class: "choices", style: { margin: "0" } },
        el("button", { type: "button", class: "quiet", id: "earlier", disabled: shown.case <= 0, onclick: () => step(-1) }, "← Previous case"),
        el("button", { type: "button", class: "quiet", id: "later", disabled: shown.case >= last, onclick: () => step(1) }, "Next case →"))),
    probeTable(cell));
}

function caseMethod() {
  return chooser("Method", board().entries.map((e) => [e.id, e.name]), state.method, (id) => chooseMethod(id, "cases"));
}

function refreshCases(focus) {
  shown.count = PAGE;
  redraw("cases", casesSection);
  focusOn(focus);
}

function probeTable(cell) {
  const every = shown.case < 0;
  const indices = every ? cell.cases.map((_, i) => i) : [shown.case];
  let [total, right, drawn] = [0, 0, 0];
  const rows = [];
  for (const i of indices) {
    const found = probesOf(cell, i).filter(passes);
    total += found.length;
    right += found.filter((probe) => verdict(probe, 1) === 2).length;
    if (every && found.length && drawn < shown.count) {
      rows.push(el("tr", { class: "case" }, el("th", { colspan: 6, scope: "rowgroup" }, caseName(cell, i))));
    }
    for (const probe of found) {
      if (drawn < shown.count) rows.push(probeRow(probe));
      drawn += 1;
    }
  }
  const counted = el("p", { class: "note", "aria-live": "polite" },
    total ? `${total.toLocaleString("en")} probes, ${right.toLocaleString("en")} right after the edit (free generation)${total > shown.count ? `; the first ${shown.count} are shown` : ""}.` : "No probe of this case passes the filter.");
  if (!total) return [counted];
  const table = el("table", { class: "probes" },
    el("caption", { class: "hidden-label" }, "Probes with their texts before and after"),
    el("colgroup", {}, ["k", "p", "w", "", "", "s"].map((name) => el("col", { class: name }))),
    el("thead", {}, el("tr", {}, ["Kind", "Prompt", "Answers", "Before", "After", "Other protocols"].map((t) => el("th", { scope: "col" }, t)))),
    el("tbody", {}, rows));
  const more = total > shown.count ? el("button", { type: "button", class: "quiet more", onclick: () => {
    shown.count += 4 * PAGE;
    redraw("cases", casesSection);
  } }, `Show more of ${total.toLocaleString("en")}`) : null;
  return [counted, table, more];
}

function probeRow(probe) {
  const label = (name, ...children) => el("td", { "data-label": name }, children);
  return el("tr", {},
    el("td", { class: "kind", "data-label": "Kind" }, kindName(probe.kind), probe.changes ? null : el("span", { class: "verdict" }, "must not change")),
    label("Prompt", el("span", { class: "text" }, probe.prompt)),
    label("Answers", probe.answers.length ? probe.answers.slice(0, 4).join(" or ") : NONE,
      probe.answers.length > 4 ? el("span", { class: "verdict" }, `and ${probe.answers.length - 4} more`) : null),
    label("Before", answer(probe.before, verdict(probe, 0), "")),
    label("After", answer(probe.after, verdict(probe, 1), WORDS[verdict(probe, 1)])),
    label("Other protocols", others(probe)));
}

// In colour after the edit alone: before it, most probes of what is to change are wrong.
function answer(text, mark, className) {
  return [
    text === null ? el("span", { class: "muted" }, "not generated") : el("span", { class: "text" }, text || "(empty)"),
    mark ? el("span", { class: `verdict ${className}` }, `${mark === 2 ? "✓" : "✗"} ${WORDS[mark]}`) : null,
  ];
}

const protocolName = (protocol) => (data.metrics[protocol] || {}).label || protocol.replaceAll("_", " ");

function others(probe) {
  const found = [];
  data.details.marked.forEach((protocol, place) => {
    const [before, after] = [digit(probe.marks[0], place), digit(probe.marks[1], place)];
    if (place && after) {
      found.push(`${protocolName(protocol)}: ${before && before !== after ? `${WORDS[before]} → ` : ""}${WORDS[after]}`);
    }
  });
  for (const [protocol, before, after] of probe.numbers) {
    const { compares, unit } = data.metrics[protocol] || {};
    found.push(compares ? `${protocolName(protocol)}: ${plain(after)}${unit && unit !== "share" ? ` ${unit}` : ""}`
      : `${protocolName(protocol)}: ${plain(before)} → ${plain(after)}`);
  }
  return found.length ? found.map((text) => el("span", { class: "proto" }, text)) : NONE;
}

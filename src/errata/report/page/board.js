// The board: one protocol's table, sortable, with intervals as small bars; legacy tables below it.

function protocolSection() {
  const made = section("protocol", data.boards.length > 1 ? "Protocols" : "Protocol",
    data.boards.length > 1 && el("p", { class: "note" },
      "Each board has one protocol; numbers of different boards are not comparable."),
    data.boards.length > 1 && el("div", { class: "choices", role: "group", "aria-label": "Board" },
      data.boards.map((one, i) => el("button", {
        type: "button", class: "choice", "aria-pressed": String(i === state.board), onclick: () => chooseBoard(i),
      }, one.title))),
    tagList(board()));
  return made;
}

function tagList(one) {
  const shown = { model: one.model, schedule: one.schedule, ...one.tag };
  if (shown.dataset_sha256) shown.dataset_sha256 = String(shown.dataset_sha256).slice(0, 16);
  return el("dl", { class: "tag", "aria-label": "Protocol tag" }, Object.entries(shown).map(([name, value]) => (
    el("div", {}, el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, String(value))))));
}

function range(measure, className = "") {
  const [value, low, high] = measure;
  if (low === null || high === null) return null;
  return el("span", { class: `range ${className}`, "aria-hidden": "true" },
    el("i", { style: { left: `${limited(low)}%`, width: `${limited(high) - limited(low)}%` } }),
    el("b", { style: { left: `${limited(value)}%` } }));
}

function interval(measure, show, between = "–") {
  const [, low, high] = measure;
  return low === null || high === null ? null : el("span", { class: "ends" }, `${show(low)}${between}${show(high)}`);
}

function shareCell(measure, className = "") {
  if (!measure) return el("td", { class: className }, NONE);
  const title = [
    measure[3] === null ? "" : `unedited ${percent(measure[3])}`, measure[4] ? `${measure[4]} probes` : "",
  ].filter(Boolean).join(", ");
  return el("td", { class: className, title: title || null },
    el("span", { class: "value" }, percent(measure[0])), range(measure), interval(measure, (v) => percent(v)));
}

function overCell(measure, className) {
  if (!measure) return el("td", { class: className }, NONE);
  const signed = (value) => (value > 0 ? "+" : "") + percent(value);
  const worse = measure[2] !== null ? measure[2] < 0 : measure[0] < 0;
  return el("td", { class: `${className}${worse ? " bad" : ""}` }, signed(measure[0]),
    interval(measure, signed, " to "), worse ? el("span", { class: "ends bad" }, "worse than it") : null);
}

function columnsOf(one) {
  const first = measuresOf;
  const columns = [{ id: "headline", title: "Headline", group: "", value: (e) => e.headline && e.headline[0],
    cell: (e, c) => shareCell(e.headline, `head ${c}`) }];
  if (one.entries.some((e) => e.earlier)) {
    columns.push({ id: "earlier", title: "Earlier headline", group: "", value: (e) => e.earlier && e.earlier[0],
      cell: (e, c) => shareCell(e.earlier, c) });
  }
  if (one.entries.some((e) => e.over)) {
    columns.push({ id: "over", title: "Over fine-tuning", group: "", value: (e) => e.over && e.over[0],
      cell: (e, c) => overCell(e.over, c) });
  }
  for (const kind of one.kinds) {
    columns.push({ id: kind.id, title: capital(kind.label), group: capital(one.groups[kind.group]),
      value: (e) => first(e)[kind.id] && first(e)[kind.id][0], cell: (e, c) => shareCell(first(e)[kind.id], c) });
  }
  const text = (id, title, group, value, show, up) => {
    if (one.entries.some((e) => !Number.isNaN(number(value(e))))) {
      columns.push({ id, title, group, up, value: (e) => number(value(e)), cell: (e, c) => el("td", { class: c }, show(e)) });
    }
  };
  for (const paper of one.paper) {
    const score = (e) => e.scores[paper.name];
    text(`score-${paper.name}`, paper.title, "Legacy", score, (e) => (
      score(e) === undefined || score(e) === null ? NONE : score(e).toFixed(1)), false);
  }
  for (const extra of one.extras) {
    text(extra.id, extra.title, "Model", (e) => e[extra.id], (e) => (extra.share ? percent(e[extra.id]) : plain(e[extra.id])), extra.up);
  }
  text("perplexity", "Perplexity", "Model", (e) => e.perplexity[1],
    (e) => `${plain(e.perplexity[0])} → ${plain(e.perplexity[1])}`, true);
  text("fit", "Time per edit", "Cost", (e) => e.fit, (e) => seconds(e.fit), true);
  return columns;
}

function sorted(entries, columns) {
  const key = state.sort || { id: "headline", up: false };
  const column = columns.find((one) => one.id === key.id) || columns[0];
  const value = (e) => {
    const found = column.value(e);
    return found === null || found === undefined || Number.isNaN(found) ? null : found;
  };
  return [...entries].sort((a, b) => {
    if (key.id === "name") return (key.up ? 1 : -1) * a.name.localeCompare(b.name);
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (key.up ? 1 : -1) * (x === y ? 0 : x - y);
  });
}

function headCell(id, title, className, up) {
  const key = state.sort || { id: "headline", up: false };
  const active = key.id === id;
  const next = active ? !key.up : Boolean(up);
  return el("th", { scope: "col", class: className,
    "aria-sort": active ? (key.up ? "ascending" : "descending") : null },
  el("button", { type: "button", class: "sort", "data-sort": id, onclick: () => sortBy(id, next) }, title));
}

function sortBy(id, up) {
  state.sort = { id, up };
  document.getElementById("board").replaceWith(boardSection());
  document.querySelector(`[data-sort="${CSS.escape(id)}"]`).focus();
}

function boardRow(one, columns) {
  return el("tr", { class: one.id === state.method ? "chosen" : "" },
    el("th", { scope: "row" },
      el("button", { type: "button", class: "link", onclick: () => { chooseMethod(one.id); goTo("method"); } }, one.name),
      one.role ? el("span", { class: "role" }, one.role) : null),
    columns.map((column, i) => column.cell(one, starts(columns, i) ? "first" : "")));
}

const starts = (columns, i) => i > 0 && columns[i].group !== columns[i - 1].group;

function groupHeads(columns) {
  const spans = [];
  for (const column of columns) {
    if (spans.length && spans[spans.length - 1][0] === column.group) spans[spans.length - 1][1] += 1;
    else spans.push([column.group, 1]);
  }
  return el("tr", { class: "groups" }, el("td"), spans.map(([group, span]) => (
    el(group ? "th" : "td", { colspan: span, scope: group ? "colgroup" : null }, group))));
}

function boardSection() {
  const one = board();
  const columns = columnsOf(one);
  const base = one.entries.filter((e) => e.role);
  const rest = sorted(one.entries.filter((e) => !e.role), columns);
  const table = el("table", { class: "board" },
    el("caption", { class: "hidden-label" }, `Board of ${one.title}`),
    el("thead", {}, groupHeads(columns), el("tr", {}, headCell("name", "Method", "", true),
      columns.map((c, i) => headCell(c.id, c.title, starts(columns, i) ? "first" : "", c.up)))),
    base.length ? el("tbody", { class: "base" }, base.map((e) => boardRow(e, columns))) : null,
    el("tbody", {}, rest.map((e) => boardRow(e, columns))));
  return section("board", `Board: ${one.title}`,
    el("p", {}, `${capital(one.explained)}.`,
      one.entries.some((e) => e.over) ? " Over fine-tuning: difference of headlines in points, paired over cases." : ""),
    el("p", { class: "note" }, "Free generation, per cent with 95 % bootstrap intervals over cases. ",
      "For kinds that must not change: the share still right among those right before the edit. A method's name links to its details."),
    scrolled(table, "Board, scrolls sideways"),
    (one.unedited_cases || []).map((text) => el("p", { class: "note" }, `${text}.`)),
    rest.length ? null : el("p", { class: "empty" }, "Only baselines have results so far."),
    legacyTables(one), costTable(one));
}

function legacyTables(one) {
  if (!one.others.length && !one.scores.length && !one.beside.length) return null;
  const tables = [];
  if (one.beside.length) {
    tables.push(scrolled(plainTable("Free generation, stricter shares, %: only the answer generated; old answer still asserted; same text as before",
      ["Method", ...one.beside.map(([heading]) => capital(heading))], one.entries.map((e) => [e.name, ...one.beside.map(([, kind, name]) => {
        const measure = measuresOf(e)[kind];
        return measure && measure[5] && name in measure[5] ? percent(measure[5][name]) : NONE;
      })])), "Strict shares"));
  }
  tables.push(...one.others.map((protocol) => {
    const show = protocol.share ? (v) => percent(v) : plain;
    return scrolled(plainTable(capital(protocol.title),
      ["Method", ...protocol.kinds.map((kind) => capital(kind.label) + (kind.kept ? " kept" : ""))],
      one.entries.map((e) => [e.name, ...protocol.kinds.map((kind) => {
        const measure = (e.measures[protocol.id] || {})[kind.id];
        return measure ? el("span", {}, show(measure[0]), interval(measure, show)) : NONE;
      })])), protocol.title);
  }));
  if (one.scores.length) {
    tables.push(scrolled(plainTable("Scores under the papers' names", ["Method", ...one.scores],
      one.entries.map((e) => [e.name, ...one.scores.map((name) => (
        typeof e.scores[name] === "number" ? e.scores[name].toFixed(1) : NONE))])), "Legacy scores"));
  }
  return el("details", {}, el("summary", {}, "Stricter shares, other protocols, and legacy scores for comparison with papers only"), tables);
}

function costTable(one) {
  const names = [...new Set(one.entries.flatMap((e) => Object.keys(e.cost)))];
  if (!names.length) return null;
  return el("details", {}, el("summary", {}, "Cost: time, memory, size"),
    scrolled(plainTable("Cost of each cell", ["Method", ...names.map(capital)],
      one.entries.map((e) => [e.name, ...names.map((name) => e.cost[name] || NONE)])), "Cost"));
}

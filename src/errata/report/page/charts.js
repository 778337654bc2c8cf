// Curves over a sequence, and one method's radar and bars. Drawn as SVG at the width that is there.

const DASHES = ["", "6 3", "2 3"];
const LOG_SPAN = 15;
const FAR = 1000; // values beyond this multiple of the unedited one, or this relative change, are drawn at the upper edge

function picked() {
  if (!state.picked) {
    const withCurves = board().entries.filter((e) => e.looks.length);
    const best = withCurves.filter((e) => !e.role).slice(0, 5);
    const tuning = withCurves.find((e) => e.role.startsWith("fine"));
    state.picked = [...best, ...(tuning ? [tuning] : [])].map((e) => e.id);
    if (!state.picked.length) state.picked = withCurves.map((e) => e.id);
  }
  return state.picked;
}

function styleOf(id) {
  if (!picked().includes(id)) return { stroke: "var(--grey-line)", width: 1, dash: "", shown: false };
  const colourOf = (each) => board().entries.find((e) => e.id === each).style[0]; // by the method's name alone
  const alike = picked().filter((each) => colourOf(each) === colourOf(id));
  return { stroke: `var(--s${colourOf(id)})`, width: 2, shown: true, dash: DASHES[alike.indexOf(id) % DASHES.length] };
}

function curvesSection() {
  const withCurves = board().entries.filter((e) => e.looks.length);
  if (!withCurves.length) {
    return section("curves", "Curves", el("p", { class: "empty" },
      "This board has no sequence of edits, so there are no curves."));
  }
  const charts = el("div", { class: "charts" });
  const legend = el("div", { class: "choices", role: "group", "aria-label": "Methods shown in colour" });
  const draw = () => {
    legend.replaceChildren(...withCurves.map((e) => legendButton(e, draw)));
    charts.replaceChildren(...chartsOf(withCurves).map((chart) => figure(chart)));
    charts.querySelectorAll("figure").forEach((one) => one.draw());
  };
  const made = section("curves", "Curves over the sequence",
    el("p", { class: "note" }, "Selected methods are in colour, the others in grey."), legend, charts,
    lookTable(withCurves));
  made.draw = draw;
  return made;
}

function legendButton(one, draw) {
  const style = styleOf(one.id);
  return el("button", { type: "button", class: "choice", "aria-pressed": String(style.shown), "data-id": one.id,
    onclick: () => {
      state.picked = style.shown ? picked().filter((id) => id !== one.id) : [...picked(), one.id];
      draw();
      document.querySelector(`#curves [data-id="${CSS.escape(one.id)}"]`).focus();
    } },
  svgSwatch(style), one.name);
}

function svgSwatch(style) {
  return svg("svg", { width: 22, height: 8, class: "swatch", "aria-hidden": "true" },
    svg("line", { x1: 0, x2: 22, y1: 4, y2: 4, stroke: style.stroke, "stroke-width": style.width + 0.5, "stroke-dasharray": style.dash }));
}

function chartsOf(withCurves) {
  const look = (i, low, high) => (e) => e.looks.map((l) => ({ x: l[0], y: number(l[i]), low: low && l[low], high: high && l[high] }));
  const base = withCurves.map((e) => number(e.looks[0][6])).find(Number.isFinite);
  const within = (top, points) => (e) => points(e).map((p) => (p.y > top ? { ...p, y: Infinity, said: p.y } : p));
  const found = [
    { title: "Retention", note: "still answered with the target, %, by number of later edits", share: true, x: "later edits", age: true,
      points: (e) => e.retention.map((a) => ({ x: (a[0] + a[1]) / 2, y: a[2], low: a[3], high: a[4],
        label: a[0] === a[1] ? String(a[0]) : `${a[0]} to ${a[1]}` })) },
    { title: "Efficacy", note: "over all edits so far, %, free generation", share: true, x: "edits in place", points: look(1, 2, 3) },
    { title: "Perplexity", note: `of neutral text, per token; dotted: unedited; triangle: more than ${FAR.toLocaleString("en")} times that`,
      x: "edits in place", points: within(FAR * (base || 1), look(5)), base },
    { title: "Change of the weights", note: `largest |change| / |weight|, Frobenius norms; triangle: more than ${FAR.toLocaleString("en")}`,
      x: "edits in place", points: within(FAR, look(7)) },
  ];
  return found.map((chart) => ({ ...chart, 
    series: withCurves.map((e) => ({ id: e.id, name: e.name, points: chart.points(e) }))
      .filter((s) => s.points.some((p) => Number.isFinite(p.y) || p.y === Infinity)) }))
    .filter((chart) => chart.series.length);
}

function figure(chart) {
  const holder = el("div");
  const made = el("figure", {}, el("figcaption", {}, chart.title, el("span", {}, chart.note)), holder);
  made.draw = () => holder.replaceChildren(lineChart(chart, Math.max(260, holder.clientWidth || 360)));
  return made;
}

function scale(values, from, to, log) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) { high = log ? low * 2 : low + 1; low = log ? low / 2 : Math.max(0, low - 1); }
  const f = log ? Math.log10 : (v) => v;
  const place = (v) => from + ((f(v) - f(low)) / (f(high) - f(low))) * (to - from);
  place.low = low; place.high = high; place.log = log;
  return place;
}

function ticks(place, many, own = []) {
  const seen = [...new Set(own)].sort((a, b) => a - b);
  if (seen.length && seen.length <= many) return seen;
  if (place.log) {
    let inside = [];
    for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
      inside = [];
      for (let p = Math.floor(Math.log10(place.low)); p <= Math.log10(place.high); p += 1) {
        for (const step of steps) {
          const v = Number((step * 10 ** p).toPrecision(6));
          if (v >= place.low * 0.999 && v <= place.high * 1.001) inside.push(v);
        }
      }
      if (inside.length >= 3) break;
    }
    const every = Math.ceil(inside.length / many);
    return inside.filter((_, i) => i % every === 0);
  }
  const raw = (place.high - place.low) / many;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(place.low / step) * step; v <= place.high + step * 1e-9; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

function scalesOf(chart, width, height, left) {
  const points = chart.series.flatMap((s) => s.points);
  const xs = points.map((p) => p.x);
  const finite = points.map((p) => p.y).filter(Number.isFinite);
  if (Number.isFinite(chart.base)) finite.push(chart.base);
  const positive = xs.filter((v) => v > 0);
  const logX = positive.length > 1 && Math.max(...positive) / Math.min(...positive) >= LOG_SPAN;
  // a logarithmic axis has no 0: age 0 is drawn at half the smallest positive age
  const shift = logX && Math.min(...xs) <= 0 ? Math.min(...positive) / 2 : 0;
  const at = (v) => (shift && v <= 0 ? shift : v);
  const x = scale(xs.map(at), left, width - 14, logX);
  const logY = !chart.share && Math.min(...finite) > 0 && Math.max(...finite) / Math.min(...finite) >= LOG_SPAN;
  const top = finite.length ? Math.max(...finite) : 1;
  const ends = chart.share ? [0, 1] : logY ? [Math.min(...finite) / 1.15, top * 1.15]
    : [Math.max(0, Math.min(...finite) * 0.9), top * 1.08 || 1];
  return { at, x, y: scale(ends, height - 40, 14, logY), shift };
}

function lineChart(chart, width) {
  const height = Math.round(Math.min(300, Math.max(220, width * 0.62)));
  const left = 46;
  const { at, x, y, shift } = scalesOf(chart, width, height, left);
  const show = chart.share ? (v) => percent(v, 0) : plain;
  const drawn = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${chart.title}: ${chart.note}. The numbers are in the table below the charts.` });
  for (const tick of ticks(y, 5)) {
    drawn.append(svg("line", { x1: left, x2: width - 14, y1: y(tick), y2: y(tick), stroke: "var(--rule)" }),
      svg("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, chart.share ? percent(tick, 0) : plainTick(tick)));
  }
  const own = chart.age ? [] : chart.series.flatMap((s) => s.points.map((p) => p.x));
  const marks = ticks(x, Math.max(4, Math.floor(width / 65)), own).filter((v) => !shift || v > shift * 1.2);
  for (const tick of [...(shift ? [shift] : []), ...marks]) {
    drawn.append(svg("line", { x1: x(tick), x2: x(tick), y1: height - 40, y2: height - 36, stroke: "var(--muted)" }),
      svg("text", { x: x(tick), y: height - 22, "text-anchor": "middle" }, tick === shift ? "0" : plainTick(tick)));
  }
  drawn.append(svg("text", { x: (left + width - 14) / 2, y: height - 4, "text-anchor": "middle" },
    `${chart.x}${x.log ? " (log scale)" : ""}`));
  if (Number.isFinite(chart.base)) {
    drawn.append(svg("line", { x1: left, x2: width - 14, y1: y(chart.base), y2: y(chart.base), stroke: "var(--muted)", "stroke-dasharray": "1 4", "stroke-width": 1.5 }));
  }
  const layers = [...chart.series].sort((a, b) => styleOf(a.id).shown - styleOf(b.id).shown);
  for (const series of layers) drawn.append(seriesOf(series, at, x, y, show, chart));
  return drawn;
}

const plainTick = (v) => (Number.isInteger(v) ? v.toLocaleString("en") : String(Number(v.toPrecision(3))));

function seriesOf(series, at, x, y, show, chart) {
  const style = styleOf(series.id);
  const group = svg("g", { fill: "none", stroke: style.stroke, "stroke-width": style.width });
  const place = (p) => [x(at(p.x)), p.y === Infinity ? 6 : y(p.y)];
  const known = series.points.filter((p) => Number.isFinite(p.y) || p.y === Infinity);
  group.append(svg("polyline", { points: known.map((p) => place(p).map((v) => v.toFixed(1)).join()).join(" "),
    "stroke-dasharray": style.dash || null, "stroke-linejoin": "round" }));
  if (!style.shown) return group;
  for (const point of known) {
    const [px, py] = place(point);
    if (typeof point.low === "number" && typeof point.high === "number") {
      group.append(svg("line", { x1: px, x2: px, y1: y(point.low), y2: y(point.high), "stroke-width": 1, opacity: 0.55 }));
    }
    const text = `${series.name}: ${show(point.said || point.y)}${chart.share && point.y !== Infinity ? " %" : ""} at ${point.label || point.x.toLocaleString("en")} ${chart.x}`;
    group.append(point.y === Infinity
      ? svg("path", { d: `M${px - 4},${py + 3}L${px},${py - 4}L${px + 4},${py + 3}Z`, fill: style.stroke }, svg("title", {}, text))
      : svg("circle", { cx: px, cy: py, r: 3, fill: style.stroke, stroke: "var(--ground)", "stroke-width": 1 }, svg("title", {}, text)));
  }
  return group;
}

function lookTable(withCurves) {
  const rows = withCurves.flatMap((e) => e.looks.map((l) => [e.name, l[0].toLocaleString("en"), shareText(l.slice(1, 4)),
    percent(l[4]), plain(l[5]), plain(l[7]), l[8].join("; ")]));
  const ages = withCurves.flatMap((e) => e.retention.map((a) => [e.name, a[0] === a[1] ? String(a[0]) : `${a[0]} to ${a[1]}`,
    shareText(a.slice(2, 5)), String(a[5])]));
  const alarms = withCurves.filter((e) => e.looks.some((l) => l[8].length));
  return [
    alarms.length ? [el("p", {}, "First collapse alarms:"), el("ul", { class: "alarms" }, alarms.map((e) => {
      const first = e.looks.find((l) => l[8].length);
      return el("li", {}, `${e.name} at ${first[0].toLocaleString("en")} edits: ${first[8].join("; ")}`);
    }))] : el("p", { class: "note" }, "No checkpoint raised a collapse alarm."),
    el("details", {}, el("summary", {}, "The curves as tables"),
      scrolled(plainTable("As edits accumulate", ["Method", "Edits", "Efficacy, %", "Newest batch, %", "Perplexity", "Norm ratio", "Alarm"], rows), "Checkpoints"),
      ages.length ? scrolled(plainTable("By age of the edit", ["Method", "Later edits", "Still right, %", "Questions"], ages), "Retention") : null),
  ];
}

function shareText([value, low, high]) {
  if (value === null) return NONE;
  return percent(value) + (low === null ? "" : ` [${percent(low)}, ${percent(high)}]`);
}

function methodSection() {
  const one = entry(state.method);
  const other = entry(state.against);
  const options = board().entries.map((e) => [e.id, e.name]);
  return section("method", `Method: ${one.name}`,
    el("div", { class: "controls" },
      chooser("Method", options, state.method, (id) => chooseMethod(id, "method")),
      chooser("Compared with", [["", "nothing"], ...options.filter(([id]) => id !== state.method)], state.against || "",
        (id) => { state.against = id || null; redraw("method", methodSection); focusOn("#method label:nth-child(2) select"); })),
    el("div", { class: "two" },
      el("div", {}, radar(one, other), factsOf(one)),
      el("div", {}, bars(one, other))));
}

function radar(one, other) {
  const kinds = board().kinds.filter((kind) => measuresOf(one)[kind.id]).slice(0, 10);
  if (kinds.length < 3) {
    return el("p", { class: "empty" }, "A radar needs at least three kinds of probes; this board has fewer.");
  }
  const longest = Math.max(...kinds.map((kind) => kind.label.length));
  const [width, height, radius] = [Math.max(350, 2 * (90 + 12 + 6.6 * longest)), 290, 90]; // 6.6: a character of 12 px
  const [cx, cy] = [width / 2, height / 2];
  const point = (i, r) => {
    const angle = (2 * Math.PI * i) / kinds.length - Math.PI / 2;
    return [cx + r * Math.cos(angle), cy + r * Math.sin(angle)];
  };
  const path = (values) => values.map((v, i) => point(i, radius * v).map((n) => n.toFixed(1)).join()).join(" ");
  const values = (e) => kinds.map((kind) => (measuresOf(e)[kind.id] || [0])[0]);
  const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, class: "radar", role: "img",
    "aria-label": `Radar of ${one.name}${other ? ` compared with ${other.name}` : ""}; the bars show the same numbers.` });
  for (const r of [0.25, 0.5, 0.75, 1]) {
    drawn.append(svg("polygon", { points: path(kinds.map(() => r)), fill: "none", stroke: "var(--rule)" }));
  }
  kinds.forEach((kind, i) => {
    const [x, y] = point(i, radius);
    const [tx, ty] = point(i, radius + 12);
    const anchor = Math.abs(tx - cx) < 8 ? "middle" : tx > cx ? "start" : "end";
    drawn.append(svg("line", { x1: cx, y1: cy, x2: x, y2: y, stroke: "var(--rule)" }),
      svg("text", { x: tx, y: ty + (ty < cy - 60 ? 0 : ty > cy + 60 ? 8 : 4), "text-anchor": anchor }, kind.label));
  });
  if (other) {
    drawn.append(svg("polygon", { points: path(values(other)), fill: "none", stroke: "var(--muted)", "stroke-width": 1.5, "stroke-dasharray": "4 3" }));
  }
  drawn.append(svg("polygon", { points: path(values(one)), fill: "var(--accent-soft)", stroke: "var(--accent)", "stroke-width": 2 }));
  return el("figure", {}, el("figcaption", {}, "Free generation", el("span", {}, "outer ring: 100 %",
    other ? `; dashed: ${other.name}` : "")), drawn);
}

function bars(one, other) {
  const list = el("dl", { class: "bars" });
  let last = null;
  for (const kind of board().kinds) {
    const measure = measuresOf(one)[kind.id];
    if (!measure) continue;
    if (kind.group !== last) list.append(el("dt", { class: "group" }, capital(board().groups[kind.group])));
    last = kind.group;
    const [value, low, high, , n] = measure;
    const against = other && measuresOf(other)[kind.id];
    list.append(el("dt", {}, capital(kind.label)),
      el("dd", { "aria-hidden": "true" }, el("div", { class: "bar" },
        el("u", { style: { width: `${limited(value)}%` } }),
        low === null || high === null ? null
          : el("i", { style: { left: `${limited(low)}%`, width: `${limited(high) - limited(low)}%` } }),
        against ? el("b", { style: { left: `${limited(against[0])}%` } }) : null)),
      el("dd", { class: "num", title: n ? `${n} probes` : null }, shareText(measure)));
  }
  return [el("h3", {}, "By kind of probe, %"), list.children.length ? list : el("p", { class: "empty" }, "No free generation."),
    el("p", { class: "note" }, "Whiskers: 95 % bootstrap intervals over cases.", other ? ` Dotted: ${other.name}.` : "")];
}

function factsOf(one) {
  const facts = { ...(one.role ? { role: one.role } : {}), ...one.cost };
  if (Object.keys(one.settings).length) {
    facts.settings = Object.entries(one.settings).map(([k, v]) => `${k}=${typeof v === "string" ? v : JSON.stringify(v)}`).join(", ");
  }
  if (one.host.fingerprint) facts.host = `${one.host.name || ""} ${String(one.host.fingerprint).slice(0, 16)}`.trim();
  return el("dl", { class: "facts" }, Object.entries(facts).flatMap(([name, value]) => [el("dt", {}, capital(name)), el("dd", {}, value)]));
}

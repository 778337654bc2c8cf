"use strict";
// All text from the server and the user enters the page as text nodes, never as markup.

const byId = (id) => document.getElementById(id);
let token = "";
let ledger = false;

function make(tag, properties, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("aria-") || name === "scope" || name === "role" || name === "tabindex") node.setAttribute(name, value);
    else node[name] = value;
  }
  for (const child of children) node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  return node;
}

function table(caption, heads, rows) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell) => (
    cell instanceof Node && cell.tagName === "TD" ? cell : make("td", { className: "wide" }, cell)))));
  const inner = make("table", {}, ...(caption ? [make("caption", {}, caption)] : []), make("thead", {}, head),
    make("tbody", {}, ...body));
  return make("div", { className: "scroll", tabindex: "0", role: "region", "aria-label": caption || heads.join(", ") }, inner);
}

async function call(path, body) {
  const headers = {};
  if (token) headers.authorization = `Bearer ${token}`;
  const options = { headers };
  if (body !== undefined) {
    options.method = "POST";
    headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  if (answer.status === 401 || answer.status === 403) byId("access").hidden = false;
  return answer;
}

async function json(path, body) {
  const answer = await call(path, body);
  const document_ = await answer.json();
  if (!answer.ok && !document_.attempts && !document_.report) throw new Error(document_.error.message);
  return document_;
}

function say(problem) {
  byId("problem").textContent = problem ? String(problem.message || problem) : "";
  byId("problem").hidden = !problem;
}

async function busy(button, work) {
  button.disabled = true;
  say(null);
  try { await work(); } catch (error) { say(error); } finally { button.disabled = false; }
}

// --- ask -------------------------------------------------------------------------------

async function* parts(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const part = JSON.parse(data);
      if (part.error) throw new Error(part.error.message);
      yield part;
    }
  }
}

async function ask(side) {
  const text = byId(`${side}-text`);
  const note = byId(`${side}-note`);
  text.textContent = "";
  note.textContent = "…";
  const prompt = byId("prompt").value;
  const chat = byId("chat").checked;
  const body = { model: byId(side).value, max_tokens: Number(byId("tokens").value), stream: true };
  if (chat) body.messages = [{ role: "user", content: prompt }];
  else body.prompt = prompt;
  const answer = await call(chat ? "/v1/chat/completions" : "/v1/completions", body);
  if (!answer.ok) { note.textContent = ""; throw new Error((await answer.json()).error.message); }
  let revision = "";
  for await (const part of parts(answer)) {
    revision = part.errata.revision;
    for (const choice of part.choices) text.append(chat ? choice.delta.content || "" : choice.text);
  }
  text.normalize();
  note.textContent = revision === "base" ? "without edits" : `revision ${revision}`;
  return text.textContent;
}

function markDifference(first, second) {
  if (first === second) return;
  const least = Math.min(first.length, second.length);
  let head = 0;
  while (head < least && first[head] === second[head]) head += 1;
  let tail = 0;
  while (tail < least - head && first[first.length - 1 - tail] === second[second.length - 1 - tail]) tail += 1;
  for (const [side, text] of [["first", first], ["second", second]]) {
    const end = text.length - tail;
    byId(`${side}-text`).replaceChildren(text.slice(0, head), make("mark", {}, text.slice(head, end)), text.slice(end));
  }
}

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(event.submitter || byId("ask-form").querySelector("button"), async () => {
    const [first, second] = await Promise.all([ask("first"), ask("second")]);
    markDifference(first, second);
  });
});

// --- edits -----------------------------------------------------------------------------

function report(one) {
  const parts_ = [];
  if (one.report && one.report.length) {
    parts_.push(table("What the guard measured", ["measured", "value", "bound", ""], one.report.map((row) => [
      row.what, row.value, `${row.word} ${row.bound}`,
      make("td", { className: row.passed ? "good" : "bad" }, row.passed ? "kept" : "broken")])));
  }
  const changed = (one.measured && one.measured.changed) || [];
  if (changed.length) {
    parts_.push(table("Answers that changed", ["kind", "prompt", "before", "after"],
      changed.map((row) => [row.kind, row.prompt, row.before, row.after])));
  }
  return parts_;
}

function sentence(request) {
  const target = request.target === undefined ? "" : ` → ${request.target}`;
  return (request.prompt || "").replace("{}", request.subject) + target;
}

byId("edit-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const outcome = byId("outcome");
  busy(event.submitter || byId("edit-form").querySelector("button"), async () => {
    outcome.replaceChildren(make("p", { className: "note" }, "Being fitted and measured; answers go on meanwhile."));
    try {
      const made = await json("/v1/edits", {
        requests: [{ prompt: byId("statement").value, subject: byId("subject").value, target: byId("target").value }],
        method: byId("method").value, reason: byId("reason").value,
      });
      outcome.replaceChildren(...made.attempts.flatMap((one) => [
        make("h3", {}, make("code", {}, one.id.slice(0, 12)), " ",
          make("span", { className: one.applied ? "good" : "bad" }, one.applied ? "applied" : "refused by the guard")),
        ...report(one)]));
    } catch (error) {
      outcome.replaceChildren();
      throw error;
    } finally {
      await refresh();
    }
  });
});

function action(one, verb, title) {
  const button = make("button", { type: "button" }, title);
  button.setAttribute("aria-label", `${title} edit ${one.id.slice(0, 12)}`);
  button.addEventListener("click", () => busy(button, async () => {
    const done = await json(`/v1/edits/${one.id}/${verb}`, {});
    await refresh();
    if (verb !== "revert") {
      const passed = verb === "apply" ? done.applied : done.passed;
      byId("outcome").replaceChildren(
        make("h3", {}, `${title}: `, make("code", {}, one.id.slice(0, 12)), " ",
          make("span", { className: passed ? "good" : "bad" }, passed ? "within bounds" : "out of bounds")),
        ...report(done));
      byId("edit").scrollIntoView({ block: "nearest" });
    }
  }));
  return button;
}

function showEdits(listed) {
  const rows = listed.data.map((one) => {
    const more = one.requests.length > 1 ? ` and ${one.requests.length - 1} more` : "";
    const actions = make("td", { className: "actions" });
    if (ledger) actions.append(action(one, one.applied ? "revert" : "apply", one.applied ? "Revert" : "Apply"),
      action(one, "verify", "Verify"));
    return [make("td", {}, make("code", {}, one.id.slice(0, 12))), (one.requests[0] ? sentence(one.requests[0]) : "") + more,
      one.method, make("td", { className: one.applied ? "good short" : "short" }, one.applied ? "in place" : "not in place"),
      one.reason, actions];
  });
  byId("edits").replaceChildren(rows.length ? table("", ["id", "facts", "method", "state", "why", ""], rows)
    : make("p", { className: "note" }, "No edits yet."));
}

function showLog(events) {
  byId("log").replaceChildren(events.length ? table("", ["", "when (UTC)", "who", "event", "edit", "why"],
    events.map((one) => [make("td", {}, one.number), make("td", {}, one.created.replace("T", " ").slice(0, 19)), one.author,
      make("td", {}, one.kind), make("td", {}, make("code", {}, one.edit.slice(0, 12))), one.reason]))
    : make("p", { className: "note" }, "No ledger, so no log."));
}

function showNames(models) {
  for (const [side, place] of [["first", 0], ["second", 1]]) {
    const select = byId(side);
    const before = select.value;
    select.replaceChildren(...models.map((one) => make("option", { value: one.id }, one.id)));
    select.value = models.some((one) => one.id === before) ? before : models[place].id;
  }
}

function fact(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

async function refresh() {
  const [models, listed, log] = await Promise.all([json("/v1/models"), json("/v1/edits"), json("/v1/log")]);
  ledger = listed.ledger;
  byId("no-ledger").hidden = ledger;
  byId("edit-form").hidden = !ledger;
  showNames(models.data);
  showEdits(listed);
  showLog(log.data);
  byId("facts").replaceChildren(fact("model", models.data[0].id), fact("revision", listed.revision),
    fact("in place", listed.active.length));
}

async function showBoards() {
  const { sections } = await json("/v1/board");
  byId("board").hidden = !sections.length;
  byId("boards").replaceChildren(...sections.flatMap((one) => [
    make("h3", {}, one.title), make("p", { className: "note" }, `Protocol: ${one.tag}`),
    ...one.tables.flatMap((part) => [
      table(part.title, part.columns, part.rows.map((row) => row.map((cell) => make("td", { className: "number" }, cell)))),
      ...part.notes.map((note) => make("p", { className: "note" }, note))])]));
}

async function showMethods() {
  const { data, usual } = await json("/v1/methods");
  byId("method").replaceChildren(...data.map((one) => make("option", { value: one.name, title: one.title }, one.name)));
  byId("method").value = usual;
}

async function begin() {
  say(null);
  try {
    await refresh();
    await Promise.all([showBoards(), showMethods()]);
  } catch (error) { say(error); }
}

byId("access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value;
  begin();
});

begin();

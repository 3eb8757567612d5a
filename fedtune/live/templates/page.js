"use strict";
// Texts come from clients: they are put into the page as text nodes alone, and never as markup.
const MOST_ROUNDS = 500, MOST_CLIENTS = 200, MOST_DOTS = 60;
const DASH = "\u2013";
const STATES = {
  preparing: "… preparing", running: "▶ running", finished: "✓ finished", stopped: "■ stopped",
};
const CLIENTS = {
  "": "…", "at work": "▶ at work", answered: "✓ answered", used: "✓ used", connected: "● connected", away: "○ away",
  failed: "✗ failed", refused: "✗ refused", late: "◷ late", unfit: "✗ unfit",
};
let head = {}, rounds = new Map(), clients = new Map(), skew = 0, pending = false, source = null;
const roundRows = new Map(), clientRows = new Map();

const at = id => document.getElementById(id);
function set(node, text) { if (node.textContent !== text) node.textContent = text; }
function element(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}
function number(value) {
  return value === null || value === undefined ? DASH : Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3)
    ? value.toExponential(2) : value.toPrecision(4);
}
function bytes(count) {
  if (count < 1000) return `${count} B`;
  for (const unit of ["kB", "MB", "GB"]) { count /= 1000; if (count < 999.95) return `${count.toFixed(1)} ${unit}`; }
  return `${(count / 1000).toFixed(1)} TB`;
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return DASH;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  const two = value => String(value).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

function take(content) {
  if (content.reset) {
    rounds = new Map(); clients = new Map();
    roundRows.clear(); clientRows.clear();
    for (const id of ["rounds", "clients", "problems", "notes"]) at(id).replaceChildren();
  }
  head = content.head;
  skew = Date.now() - head.now;
  for (const row of content.rounds) { rounds.set(row.n, row); showRound(row); }
  for (const [name, row] of Object.entries(content.clients)) { clients.set(name, row); showClient(name, row); }
  if (content.problems) showProblems(content.problems);
  if (content.notes) {
    at("notes").replaceChildren(...content.notes.slice().reverse().map(text => element("li", text)));
    at("notes-title").hidden = !content.notes.length;
  }
  if (!pending) { pending = true; setTimeout(() => { pending = false; show(); }, 0); }
}

function cells(tr, texts, numbers) {
  texts.forEach((text, place) => {
    if (!tr.cells[place]) tr.append(element("td", undefined, numbers.includes(place) ? "n" : ""));
    set(tr.cells[place], text);
  });
}
function showRound(row) {
  let tr = roundRows.get(row.n);
  if (!tr) {
    tr = element("tr");
    roundRows.set(row.n, tr);
    at("rounds").prepend(tr);
    tr.dataset.round = row.n;
    tr.dataset.at = row.at;
    tr.dataset.seen = Date.now();
    if (roundRows.size > MOST_ROUNDS) {
      const oldest = roundRows.keys().next().value;
      roundRows.get(oldest).remove();
      roundRows.delete(oldest);
      at("rounds-more").hidden = false;
      set(at("rounds-more"), `The last ${MOST_ROUNDS} rounds; rounds.jsonl has all of them.`);
    }
  }
  cells(tr, [String(row.n), number(row.test), number(row.before), number(row.after),
    row.n ? `${row.used} of ${row.asked}` : DASH, bytes(row.up), bytes(row.down), duration(row.seconds)],
    [0, 1, 2, 3, 4, 5, 6, 7]);
}
function showClient(name, row) {
  let tr = clientRows.get(name);
  if (!tr) {
    if (clientRows.size >= MOST_CLIENTS) return;
    tr = element("tr");
    const th = element("td");
    th.append(element("bdi", name));
    tr.append(th);
    clientRows.set(name, tr);
    const order = new Intl.Collator(undefined, {numeric: true}).compare;
    const next = [...at("clients").rows].find(other => order(other.dataset.name, name) > 0);
    tr.dataset.name = name;
    at("clients").insertBefore(tr, next || null);
  }
  const texts = [CLIENTS[row.state] || row.state, String(row.used), number(row.before), number(row.after),
    bytes(row.up), bytes(row.down), row.problem];
  texts.forEach((text, place) => {
    if (!tr.cells[place + 1]) tr.append(element("td", undefined, place > 0 && place < 6 ? "n" : ""));
    set(tr.cells[place + 1], text);
  });
}
function showProblems(problems) {
  at("problems").replaceChildren(...problems.slice(-20).reverse().map(problem => {
    const li = element("li");
    li.append(element("span", `✗ ${problem.kind} `, "kind"));
    if (problem.client) li.append(element("bdi", problem.client), " ");
    if (problem.round !== null) li.append(element("span", `in round ${problem.round}`, "soft"));
    li.append(": ", element("bdi", problem.reason));
    return li;
  }));
  at("no-problems").hidden = problems.length > 0;
}

function show() {
  set(at("name"), head.name);
  document.title = `${head.name}: ${head.done}/${head.rounds || "?"} ${head.state}`;
  const of = head.rounds ? ` of ${head.rounds}` : "";
  const where = head.state === "running" ? `, round ${head.round}${of}` : head.done ? `, after round ${head.done}${of}` : "";
  set(at("state"), `${STATES[head.state]}${where}${head.text ? `: ${head.text}` : ""}`);
  at("progress").max = head.rounds || 1;
  at("progress").value = head.done;
  const list = [...rounds.values()], tested = list.filter(row => row.test !== null);
  const local = list.filter(row => row.after !== null), last = list[list.length - 1];
  const tiles = [["round", `${head.done}${of}`, `${rounds.size ? "" : "not begun"}`]];
  if (tested.length) tiles.push(["test loss", number(tested[tested.length - 1].test),
    `from ${number(tested[0].test)} in round ${tested[0].n}`]);
  if (local.length) tiles.push(["local loss", number(local[local.length - 1].after),
    `from ${number(local[local.length - 1].before)} before the steps`]);
  if (head.connected !== null) tiles.push(["connected", String(head.connected), "clients"]);
  tiles.push(["clients", head.state === "running" ? `${head.answered} of ${head.asked}` :
    last && last.n ? `${last.used} of ${last.asked}` : DASH, head.state === "running" ? "answered in this round" : "used in the last round"]);
  tiles.push(["sent up", bytes(head.up), "by all clients"], ["sent down", bytes(head.down), "to all clients"]);
  at("tiles").replaceChildren(...tiles.map(([title, value, note]) => {
    const div = element("div");
    div.append(element("dt", title), element("dd", value), element("dd", note));
    return div;
  }));
  const hidden = clients.size - clientRows.size;
  set(at("clients-text"), clients.size ? `${clients.size} so far${hidden ? `, of which ${hidden} are not listed` : ""}.` : "None yet.");
  tick();
  draw(tested, local);
}
function tick() {
  if (!head.name) return;
  const now = Date.now() - skew, left = head.rounds - head.done;
  set(at("phase"), head.phase ? `${head.phase} …` : "");
  if (head.state === "finished" || head.state === "stopped") { set(at("time"), ""); return; }
  const parts = [`since ${duration((now - head.began) / 1000)}`];
  if (head.seconds !== null && left > 0 && head.state === "running") {
    const spent = head.round_began ? (now - head.round_began) / 1000 : 0;
    parts.push(`about ${duration(Math.max(0, head.seconds * left - Math.min(spent, head.seconds)))} left`);
  }
  set(at("time"), parts.join(", "));
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(part => part * power).find(part => part >= raw);
  const first = Math.ceil(low / step), last = Math.floor((high + step / 1e6) / step);
  const values = [];
  // Counted: of numbers that are nearly equal a sum of steps would never reach the last one.
  for (let count = first; count <= last && values.length <= most; count++) values.push(Number((count * step).toPrecision(12)));
  return values;
}
function draw(tested, local) {
  const chart = at("chart"), width = Math.max(240, at("plot").clientWidth), height = 240;
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const points = [...tested.map(row => [row.n, row.test]), ...local.map(row => [row.n, row.after])];
  at("key-test").hidden = !tested.length;
  at("key-local").hidden = !local.length;
  const words = (rows, key, what) => rows.length ? ` ${what} from ${number(rows[0][key])} in round ${rows[0].n} to ` +
    `${number(rows[rows.length - 1][key])} in round ${rows[rows.length - 1].n}.` : "";
  const title = svg("title", {id: "chart-text"}, points.length
    ? `Loss by round.${words(tested, "test", "Test loss")}${words(local, "after", "Local loss")} The table below has the numbers.`
    : "No round is over yet.");
  const parts = [title];
  if (points.length) {
    const left = 46, right = width - 12, top = 10, bottom = height - 26;
    const last = Math.max(1, head.rounds > 1 && head.rounds < 4 * Math.max(...points.map(p => p[0])) ? head.rounds : Math.max(...points.map(p => p[0])));
    let low = Math.min(...points.map(p => p[1])), high = Math.max(...points.map(p => p[1]));
    // Losses that differ by their last digits alone are drawn as a flat line.
    const flat = high - low <= 1e-6 * Math.max(Math.abs(low), Math.abs(high));
    const margin = (flat ? Math.abs(high) || 1 : high - low) * 0.06;
    low -= margin; high += margin;
    const x = n => left + (right - left) * n / last, y = v => bottom - (bottom - top) * (v - low) / (high - low);
    for (const value of ticks(low, high, 4)) {
      parts.push(svg("path", {class: "grid", d: `M${left} ${y(value)}H${right}`}));
      parts.push(svg("text", {class: "axis", x: left - 6, y: y(value) + 4, "text-anchor": "end"}, String(value)));
    }
    for (const value of ticks(0, last, Math.min(8, width / 60)).filter(Number.isInteger)) {
      parts.push(svg("text", {class: "axis", x: x(value), y: height - 8, "text-anchor": "middle"}, String(value)));
    }
    for (const [rows, key, name] of [[local, "after", "local"], [tested, "test", "test"]]) {
      if (!rows.length) continue;
      parts.push(svg("path", {class: `line ${name}`, d: `M${rows.map(row => `${x(row.n).toFixed(1)} ${y(row[key]).toFixed(1)}`).join("L")}`}));
      if (rows.length > MOST_DOTS) continue;
      for (const row of rows) parts.push(name === "test"
        ? svg("circle", {class: "dot test", cx: x(row.n), cy: y(row.test), r: 3.5})
        : svg("rect", {class: "dot local", x: x(row.n) - 3, y: y(row.after) - 3, width: 6, height: 6}));
    }
  }
  chart.replaceChildren(...parts);
}

function link(state, text) {
  at("link").dataset.link = state;
  set(at("link"), text);
}
function connect() {
  source = new EventSource("events");
  source.addEventListener("update", event => {
    take(JSON.parse(event.data));
    link("live", "● live");
    at("lost").hidden = true;
  });
  source.onerror = () => {
    if (head.state === "finished") {
      source.close();
      link("over", "✓ the run is over");
      return;
    }
    const stopped = head.state === "stopped";
    link("lost", stopped ? "■ the run has stopped" : "✗ connection lost");
    at("lost").hidden = false;
    set(at("lost"), stopped ? "⚠ The run has stopped; this page goes on by itself when it is resumed at the same address."
      : "⚠ Connection lost: the process that runs fedtune is gone, or cannot be reached. Trying again …");
    // A browser tries again by itself, except after an answer that is no stream of events.
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
  };
}
setInterval(tick, 1000);
new ResizeObserver(() => { if (head.name) show(); }).observe(at("plot"));
connect();

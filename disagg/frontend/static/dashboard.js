"use strict";
/* Draws /dashboard/data every two seconds. All text from the cluster goes through textContent. */

const PERIOD_MS = 2000;
const KEY = "disagg-api-key";
const SVG = "http://www.w3.org/2000/svg";
const PARTS = [
  ["frontend", "frontend", "Front end"],
  ["queue", "queue", "Queue"],
  ["prefill", "prefill", "Prefill"],
  ["kv_transfer", "transfer", "KV transfer"],
  ["first_decode", "decode", "First decode step"],
];
const ROLES = ["prefill", "decode", "mixed"];
const FAILED = ["error", "shed", "deadline"];

const $ = (id) => document.getElementById(id);

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "text") made.textContent = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

/* -- numbers ---------------------------------------------------------------------------------------- */

function seconds(value) {
  if (value === null || value === undefined) return ["–", ""];
  if (value >= 100) return [value.toFixed(0), "s"];
  if (value >= 1) return [value.toPrecision(3), "s"];
  const ms = value * 1000;
  return [ms >= 100 ? ms.toFixed(0) : ms >= 0.01 ? String(Number(ms.toPrecision(3))) : "0", "ms"];
}

function plain(value) {
  if (value === null || value === undefined) return ["–", ""];
  if (value >= 1e6) return [(value / 1e6).toPrecision(3), "M"];
  if (value >= 1e4) return [(value / 1e3).toPrecision(3), "k"];
  if (value >= 100 || Number.isInteger(value)) return [value.toFixed(0), ""];
  return [String(Number(value.toPrecision(3))), ""];
}

const percent = (value) => (value === null || value === undefined ? ["–", ""] : [(value * 100).toFixed(value < 0.1 ? 1 : 0), "%"]);
const shown = ([number, unit]) => (unit ? `${number} ${unit}` : number);
const sum = (values) => values.reduce((total, value) => total + value, 0);
const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

/* The end of an axis is the first of these times a power of ten that holds all values. */
function niceEnd(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 6, 8, 10].find((step) => step * power >= value * 0.999) * power;
}

/* -- charts ----------------------------------------------------------------------------------------- */

const LEFT = 52;

/* One chart: lines, or areas on top of each other. series: [{name, style, values}], a value per row. */
class Chart {
  constructor(id, format, { stacked = false, end = null } = {}) {
    this.figure = $(id);
    this.legend = this.figure.parentElement.querySelector(".legend");
    Object.assign(this, { format, stacked, end });
    this.figure.addEventListener("pointermove", (event) => this.point(event));
    this.figure.addEventListener("pointerleave", () => this.leave());
  }

  draw(times, series, objective = null) {
    Object.assign(this, { times, series, objective });
    const width = Math.max(280, this.figure.clientWidth);
    const height = this.figure.parentElement.classList.contains("wide") ? 220 : 190;
    Object.assign(this, { width, height, top: 10, bottom: height - 22 });
    const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.summary() });
    const present = series.filter((each) => each.values.some((value) => value !== null));
    const highest = Math.max(0, ...times.map((_, i) => this.height_at(i)));
    /* An objective far above everything would flatten what there is to see; the legend tells it anyway. */
    const near = objective !== null && (!highest || objective < 3 * highest);
    const peak = near ? Math.max(highest, objective) : highest;
    this.max = this.end ?? niceEnd(peak);
    this.axes(svg);
    if (!present.length) {
      svg.append(shape("text", { class: "empty", x: (LEFT + width) / 2, y: (this.top + this.bottom) / 2, "text-anchor": "middle" }, "no requests in the last minutes"));
    } else if (this.stacked) this.areas(svg);
    else for (const each of present) this.line(svg, each);
    if (objective !== null && objective <= this.max) {
      svg.append(shape("line", { class: "objective", x1: LEFT, x2: width, y1: this.y(objective), y2: this.y(objective) }));
    }
    this.cursor = shape("line", { class: "cursor", y1: this.top, y2: this.bottom, visibility: "hidden" });
    svg.append(this.cursor);
    this.figure.replaceChildren(svg);
    this.describe();
    if (this.at !== undefined) this.show();
  }

  height_at(index) {
    const values = this.series.map((each) => each.values[index] ?? 0);
    return this.stacked ? sum(values) : Math.max(0, ...values);
  }

  x(index) {
    const last = this.times.length - 1;
    return last < 1 ? this.width : LEFT + ((this.width - LEFT) * (this.times[index] - this.times[0])) / (this.times[last] - this.times[0]);
  }

  y(value) {
    return this.bottom - ((this.bottom - this.top) * Math.min(value, this.max)) / this.max;
  }

  axes(svg) {
    for (let step = 0; step <= 4; step += 1) {
      const value = (this.max * step) / 4;
      const y = this.y(value);
      svg.append(shape("line", { class: "grid", x1: LEFT, x2: this.width, y1: y, y2: y }));
      if (step % 2 === 0) svg.append(shape("text", { class: "axis", x: LEFT - 8, y: y + 4, "text-anchor": "end" }, shown(this.format(value))));
    }
    const last = this.times.length - 1;
    if (last < 1) return;
    const span = this.times[last] - this.times[0];
    const minutes = span > 480 ? 5 : span > 150 ? 2 : span > 60 ? 1 : 0.5;
    for (let back = 0; back <= span / 60; back += minutes) {
      const x = this.width - ((this.width - LEFT) * back * 60) / span;
      if (x < LEFT + 4) break;
      const anchor = back === 0 ? "end" : "middle";
      svg.append(shape("text", { class: "axis", x, y: this.height - 5, "text-anchor": anchor }, back === 0 ? "now" : `−${back} min`));
    }
  }

  line(svg, { style, values }) {
    let path = "";
    let pen = false;
    values.forEach((value, index) => {
      if (value !== null) path += `${pen ? "L" : "M"}${this.x(index).toFixed(1)} ${this.y(value).toFixed(1)}`;
      /* A lone point is a line of no length, which round ends make a dot. */
      if (value !== null && !pen && (values[index + 1] ?? null) === null) path += "h0.01";
      pen = value !== null;
    });
    svg.append(shape("path", { class: `line stroke-${style}`, d: path }));
  }

  areas(svg) {
    const base = this.times.map(() => 0);
    const step = this.times.length > 1 ? (this.width - LEFT) / this.times.length : 24;
    const wide = Math.max(1.5, Math.min(step - 1.5, 24));
    for (const { style, values } of this.series) {
      values.forEach((value, index) => {
        if (value === null || value <= 0) return;
        const low = this.y(base[index]);
        base[index] += value;
        const high = this.y(base[index]);
        const x = LEFT + step * (index + 0.5) - wide / 2;
        svg.append(shape("rect", { class: `fill-${style}`, x: x.toFixed(1), y: high.toFixed(1), width: wide.toFixed(1), height: Math.max(0, low - high).toFixed(1) }));
      });
    }
  }

  /* The legend tells the newest value there is. */
  describe() {
    const items = this.series.map(({ name, style, values }) => {
      const newest = values.findLast((value) => value !== null) ?? null;
      const swatch = shape("svg", { viewBox: "0 0 12 10", "aria-hidden": "true" });
      swatch.append(shape("rect", { class: `fill-${style}`, y: this.stacked ? 0 : 3, width: 12, height: this.stacked ? 10 : 4, rx: 2 }));
      return element("span", {}, swatch, name, element("b", { text: shown(this.format(newest)) }));
    });
    if (this.objective !== null) {
      const swatch = shape("svg", { viewBox: "0 0 12 10", "aria-hidden": "true" });
      swatch.append(shape("line", { class: "objective", x2: 12, y1: 5, y2: 5 }));
      items.push(element("span", {}, swatch, "Objective", element("b", { text: shown(this.format(this.objective)) })));
    }
    this.legend.replaceChildren(...items);
  }

  summary() {
    return this.series.map(({ name, values }) => `${name}: ${shown(this.format(values.findLast((value) => value !== null) ?? null))}`).join(", ");
  }

  point(event) {
    this.at = [event.clientX, event.clientY];
    this.show();
  }

  show() {
    if (!this.times?.length) return;
    const box = this.figure.getBoundingClientRect();
    const share = (((this.at[0] - box.left) / box.width) * this.width - LEFT) / (this.width - LEFT);
    const count = this.times.length;
    const raw = this.stacked ? Math.floor(share * count) : Math.round(share * (count - 1));
    const index = Math.max(0, Math.min(count - 1, raw));
    const step = (this.width - LEFT) / count;
    const x = this.stacked ? LEFT + step * (index + 0.5) : this.x(index);
    this.cursor.setAttribute("x1", x);
    this.cursor.setAttribute("x2", x);
    this.cursor.setAttribute("visibility", "visible");
    const rows = this.series.map(({ name, values }) => `${name}  ${shown(this.format(values[index]))}`);
    const tip = $("tip");
    tip.textContent = [clock(this.times[index]), ...rows].join("\n");
    tip.hidden = false;
    const right = this.at[0] + 16 + tip.offsetWidth < innerWidth;
    tip.style.left = `${right ? this.at[0] + 16 : Math.max(4, this.at[0] - 16 - tip.offsetWidth)}px`;
    tip.style.top = `${Math.min(this.at[1] + 12, innerHeight - tip.offsetHeight - 6)}px`;
  }

  leave() {
    this.at = undefined;
    this.cursor?.setAttribute("visibility", "hidden");
    $("tip").hidden = true;
  }
}

const charts = {
  parts: new Chart("chart-parts", seconds, { stacked: true }),
  ttft: new Chart("chart-ttft", seconds),
  tpot: new Chart("chart-tpot", seconds),
  requests: new Chart("chart-requests", plain),
  tokens: new Chart("chart-tokens", plain),
  kv: new Chart("chart-kv", percent, { end: 1 }),
  waiting: new Chart("chart-waiting", plain),
};

/* -- the page --------------------------------------------------------------------------------------- */

/* History with a gap where a front end was away, so that no line runs through it. */
function filled(data) {
  const rows = [];
  for (const row of data.history) {
    const before = rows.at(-1)?.t ?? row.t;
    for (let t = before + data.period_s; t < row.t; t += data.period_s) rows.push({ t, gap: true });
    rows.push(row);
  }
  return rows;
}

function drawCharts(data) {
  const rows = filled(data);
  const times = rows.map((row) => row.t);
  const pick = (read) => rows.map((row) => (row.gap ? null : (read(row) ?? null)));
  const quantiles = (name) => ["P50", "P90", "P99"].map((label, i) => ({ name: label, style: label.toLowerCase(), values: pick((row) => row[name][i]) }));
  charts.parts.draw(times, PARTS.map(([key, style, name]) => ({ name, style, values: pick((row) => row[key]) })));
  charts.ttft.draw(times, quantiles("ttft"), data.objectives.ttft);
  charts.tpot.draw(times, quantiles("tpot"), data.objectives.tpot);
  const outcomes = (names) => pick((row) => sum(names.map((name) => row.outcomes[name] ?? 0)));
  charts.requests.draw(times, [
    { name: "Answered", style: "good", values: outcomes(["stop", "length"]) },
    { name: "Shed", style: "warn", values: outcomes(["shed"]) },
    { name: "Failed", style: "bad", values: outcomes(["error", "deadline"]) },
    { name: "Client left or erred", style: "faint", values: outcomes(["abort", "invalid"]) },
  ]);
  charts.tokens.draw(times, [
    { name: "Prompt", style: "prefill", values: pick((row) => row.prompt_tokens) },
    { name: "Output", style: "decode", values: pick((row) => row.generation_tokens) },
  ]);
  const roles = ROLES.filter((role) => data.pools[role] || data.wanted[role]);
  const byRole = (key) => roles.map((role) => ({ name: role[0].toUpperCase() + role.slice(1), style: role, values: pick((row) => row.pools[role]?.[key]) }));
  charts.kv.draw(times, byRole("kv_max"));
  charts.waiting.draw(times, [{ name: "Router", style: "queue", values: pick((row) => row.placing) }, ...byRole("waiting")]);
}

/* Rates and latencies of the last minute, weighted by what each row saw. */
function drawTiles(data) {
  const rows = data.history.filter((row) => row.t > data.now - 75).slice(-6);
  const rate = (read) => (rows.length ? sum(rows.map(read)) / rows.length : null);
  const newest = (name, i) => data.history.findLast((row) => row[name][i] !== null && row.t > data.now - 75)?.[name][i] ?? null;
  const failed = rate((row) => sum(FAILED.map((name) => row.outcomes[name] ?? 0)));
  const missed = (name, i) => data.objectives[name] !== null && newest(name, i) > data.objectives[name];
  const held = sum(Object.values(data.pools).map((pool) => pool.held));
  const placing = rows.at(-1)?.placing ?? 0;
  const waiting = sum(Object.values(data.pools).map((pool) => pool.waiting)) + placing;
  const tiles = [
    ["Requests", plain(rate((row) => sum(Object.values(row.outcomes)))), "a second, last minute", false],
    ["Time to first token", seconds(newest("ttft", 0)), `P99 ${shown(seconds(newest("ttft", 2)))}`, missed("ttft", 0), missed("ttft", 2)],
    ["Time per token", seconds(newest("tpot", 0)), `P99 ${shown(seconds(newest("tpot", 2)))}`, missed("tpot", 0), missed("tpot", 2)],
    ["Output", plain(rate((row) => row.generation_tokens)), "tokens a second", false],
    ["Running", plain(sum(Object.values(data.pools).map((pool) => pool.running))), `${waiting} waiting, ${held} held`, false],
    ["Shed or failed", plain(failed), "a second, last minute", failed > 0],
  ];
  $("tiles").replaceChildren(
    ...tiles.map(([name, [number, unit], more, bad, badTail = false]) =>
      element("div", { class: `card tile${bad ? " bad" : ""}` },
        element("div", { class: "name", text: name }),
        element("div", { class: "value", text: number }, ...(unit ? [" ", element("small", { text: unit })] : [])),
        element("div", { class: `more${badTail ? " bad" : ""}`, text: more }))));
}

const STATES = { ready: "good", starting: "warn", draining: "warn" };

function meter(share, style) {
  const svg = shape("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", role: "img", "aria-label": shown(percent(share)) });
  svg.append(shape("rect", { class: "fill-track", width: 100, height: 8 }), shape("rect", { class: `fill-${share > 0.95 ? "bad" : style}`, width: Math.min(100, share * 100), height: 8 }));
  return element("div", { class: "meter" }, svg, element("span", { text: shown(percent(share)) }));
}

function drawWorkers(data) {
  const order = (worker) => `${ROLES.indexOf(worker.role)} ${worker.id.padStart(40)}`;
  const workers = [...data.workers].sort((a, b) => (order(a) < order(b) ? -1 : 1));
  $("workers").replaceChildren(
    ...workers.map((worker) =>
      element("tr", {},
        element("td", { text: worker.id }),
        element("td", {}, element("span", { class: `dot ${STATES[worker.state] ?? "bad"}` }), worker.state),
        element("td", { class: "bar" }, meter(worker.kv_blocks_used / Math.max(1, worker.kv_blocks_total), worker.role)),
        element("td", { class: "n", text: worker.num_running }),
        element("td", { class: "n", text: worker.num_waiting }),
        element("td", { class: "n", text: worker.num_held }),
        element("td", { class: "where", text: `${worker.host}, pid ${worker.pid}` }))));
  const pools = ROLES.filter((role) => data.wanted[role] || data.pools[role]);
  $("pools").textContent = pools.map((role) => `${data.pools[role]?.ready ?? 0} of ${data.wanted[role]} ${role} ready`).join(", ");
}

/* The part that is furthest above its usual time, which is the lower quartile of the minutes before. */
function culprit(rows, keys) {
  const grown = keys.map((key) => {
    const seen = rows.map((row) => row[key]).filter((value) => value !== null).sort((a, b) => a - b);
    return [(rows.at(-1)[key] ?? 0) - (seen[Math.floor(seen.length / 4)] ?? 0), key];
  });
  const [, key] = grown.reduce((a, b) => (b[0] > a[0] ? b : a));
  return PARTS.find((part) => part[0] === key)[2].toLowerCase().replace("kv", "KV");
}

/* What clients suffer from that no worker's state tells, the worst first. */
function complaints(data) {
  const found = [];
  const rows = data.history.filter((row) => row.t > data.now - 900);
  const recent = rows.filter((row) => row.t > data.now - 2.5 * data.period_s);
  const rate = (names) => sum(recent.map((row) => sum(names.map((name) => row.outcomes[name] ?? 0))));
  const all = rate(["stop", "length", ...FAILED]);
  for (const [names, what] of [[["error", "deadline"], "fail"], [["shed"], "are shed"]]) {
    if (rate(names) > 0.05 * all) found.push(`${shown(percent(rate(names) / all))} of requests ${what}`);
  }
  const newest = recent.at(-1);
  for (const [name, what, keys] of [
    ["ttft", "first tokens are late", ["frontend", "queue", "prefill"]],
    ["tpot", "tokens are slow", ["kv_transfer", "first_decode"]],
  ]) {
    const late = newest && data.objectives[name] !== null && newest[name][1] > data.objectives[name];
    if (late) found.push(`${what}: ${culprit(rows, keys)}`);
  }
  return found;
}

function drawStatus(data) {
  const found = complaints(data);
  const missing = ROLES.filter((role) => data.wanted[role] > 0 && !data.pools[role]?.ready);
  const short = ROLES.filter((role) => (data.pools[role]?.ready ?? 0) < data.wanted[role]);
  if (missing.length) setStatus("bad", `no ${missing.join(" and no ")} worker is ready`);
  else if (!data.router.connected) setStatus("bad", "the router is away");
  else if (short.length) setStatus("warn", [`${short.join(" and ")} pool short of workers`, ...found].join("; "));
  else if (found.length) setStatus("warn", found.join("; "));
  else setStatus("good", "all well");
  $("model").textContent = data.model;
  const frontEnds = data.num_frontends === 1 ? "1 front end" : `${data.num_frontends} front ends`;
  $("foot").textContent = `disagg ${data.version} · ${frontEnds} · updated ${clock(data.now)}`;
}

function setStatus(style, text) {
  $("status").className = style;
  $("status").querySelector(".text").textContent = text;
}

function draw(data) {
  $("page").hidden = false;
  drawStatus(data);
  drawTiles(data);
  drawCharts(data);
  drawWorkers(data);
}

/* -- talking to the cluster ------------------------------------------------------------------------- */

/* A header's value is bytes; keys may hold any character. */
const asBytes = (text) => Array.from(new TextEncoder().encode(text), (byte) => String.fromCharCode(byte)).join("");

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key === null ? more : { ...more, authorization: `Bearer ${asBytes(key)}` };
}

let latest = null;

async function refresh() {
  let response;
  try {
    response = await fetch("/dashboard/data", { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(8000) });
  } catch {
    setStatus("bad", "no answer");
    return true;
  }
  if (response.status === 401) {
    askForKey(sessionStorage.getItem(KEY) !== null);
    return false;
  }
  if (!response.ok) {
    setStatus("bad", `answer ${response.status}`);
    return true;
  }
  latest = await response.json();
  draw(latest);
  return true;
}

async function loop() {
  while (await refresh()) {
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
    /* A page that nobody sees asks for nothing. */
    while (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

function askForKey(wrong) {
  sessionStorage.removeItem(KEY);
  $("page").hidden = true;
  $("sign-in").hidden = false;
  $("key-error").textContent = wrong ? "That key was refused." : "";
  setStatus("warn", "key needed");
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  $("sign-in").hidden = true;
  loop();
});

let running = null;

$("try").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const answer = $("answer");
  answer.textContent = "";
  answer.className = "";
  $("trace").replaceChildren();
  running = new AbortController();
  $("try").querySelector("button").textContent = "Stop";
  try {
    await ask($("prompt").value, answer, running.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      answer.className = "error";
      answer.textContent += `${answer.textContent ? "\n" : ""}${error.message}`;
    }
  }
  running = null;
  $("try").querySelector("button").textContent = "Send";
});

$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("try").requestSubmit();
  }
});

async function ask(prompt, answer, signal) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    signal,
    headers: headers({ "content-type": "application/json", "x-disagg-explain": "1" }),
    body: JSON.stringify({ messages: [{ role: "user", content: prompt }], stream: true, temperature: 0, max_completion_tokens: 512 }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    answer.textContent += event.choices?.[0]?.delta?.content ?? "";
    if (event.disagg) explain(event.disagg.choices[0]);
  }
}

/* Yield the JSON of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

/* One request's own waterfall, and who did what. */
function explain(choice) {
  if (!choice.parts) return;
  const { frontend, queue, prefill, kv_transfer, decode } = choice.parts;
  const parts = [["Front end", "frontend", frontend], ["Queue", "queue", queue - frontend], ["Prefill", "prefill", prefill], ["KV transfer", "transfer", kv_transfer], ["Decode", "decode", decode]];
  const total = sum(parts.map(([, , value]) => value));
  const svg = shape("svg", { viewBox: "0 0 1000 26", preserveAspectRatio: "none", role: "img", "aria-label": "Where this request's time went" });
  let x = 0;
  for (const [, style, value] of parts) {
    const width = (1000 * value) / total;
    svg.append(shape("rect", { class: `fill-${style}`, x, width: Math.max(0, width - 1.5), height: 26 }));
    x += width;
  }
  const legend = element("div", { class: "legend" }, ...parts.map(([name, style, value]) => {
    const swatch = shape("svg", { viewBox: "0 0 12 10", "aria-hidden": "true" });
    swatch.append(shape("rect", { class: `fill-${style}`, width: 12, height: 10, rx: 2 }));
    return element("span", {}, swatch, name, element("b", { text: shown(seconds(value)) }));
  }));
  const stories = choice.attempts.map((attempt) => {
    const line = element("p", {}, "Prefilled on ", element("b", { text: attempt.prefill_worker }));
    if (attempt.decode_worker === attempt.prefill_worker) line.append(" and decoded there");
    else line.append(", decoded on ", element("b", { text: attempt.decode_worker }));
    const transfer = attempt.transfer;
    if (transfer?.recomputed) line.append(`; the KV was lost (${transfer.reason}) and computed again`);
    else if (transfer) line.append(`; ${(transfer.num_bytes / 1e6).toPrecision(3)} MB of KV over ${transfer.transport}`);
    if (attempt.cached_tokens) line.append(`; ${attempt.cached_tokens} prompt tokens from the cache`);
    line.append(attempt.lost ? `; then ${attempt.lost} was lost.` : ".");
    return line;
  });
  $("trace").replaceChildren(svg, legend, ...stories);
}

addEventListener("resize", () => { if (latest) drawCharts(latest); });
loop();

// The page: asks /status about once a second while it is seen, and draws what it says.
// All text goes in through textContent: nothing that a server or a model says becomes markup.

const POLL_MS = 1000;
const PATIENCE_MS = 10_000;
const HISTORY_S = 300;
const LINE_WINDOW_S = 10;
const TEXT_WINDOW_S = 60;
const SHOWN_TIMES = [
  "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
];
const KEY = "spanwise.key";
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
let samples = []; // {at_s, ...the engine's counts, those of all replicas together}, oldest first
let drawnPlan = null;
let model = null; // what the server calls it
let rankViews = [];
let replicaViews = [];
let timer = null;
let polling = false;
let answering = null; // the AbortController of the answer that streams

// --- elements

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function svgElement(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// Only what has changed is touched: a screen reader hears no more than there is.
function setText(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

// How the server is: "good", "bad", or neither yet.
function say(text, mood = "") {
  const state = byId("state");
  setText(state, mood === "bad" ? `⚠ ${text}` : `● ${text}`);
  state.className = mood;
}

function fillList(list, pairs) {
  const key = pairs.map(([name]) => name).join("\n");
  if (list.dataset.names !== key) {
    list.dataset.names = key;
    list.replaceChildren(...pairs.map(([name]) => {
      const row = element("div");
      row.append(element("dt", name), element("dd"));
      return row;
    }));
  }
  pairs.forEach(([, value], i) => setText(list.children[i].lastChild, value));
}

// --- how figures are written

function bytesText(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (bytes >= 1024 && place < units.length - 1) { bytes /= 1024; place += 1; }
  return `${place && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[place]}`;
}

function secondsText(seconds) {
  if (seconds === null) return "–";
  if (seconds === Infinity) return "beyond the last bucket";
  if (seconds < 1) return `${(seconds * 1000).toPrecision(3)} ms`;
  return `${seconds.toPrecision(3)} s`;
}

const rateText = (rate) => (rate === null ? "–" : rate >= 10 ? rate.toFixed(0) : rate.toFixed(1));
const shareText = (part, of) => (of ? `${Math.round((100 * part) / of)}%` : "–");
const percentText = (share) => (share === null ? "–" : shareText(share, 1));
const mean = (values) => values.reduce((total, value) => total + value, 0) / values.length;

// --- figures from counts

// The newest sample that is at least so old, counted from the given one; the oldest otherwise.
function sampleBefore(place, window_s) {
  const since = samples[place].at_s - window_s;
  let found = place;
  while (found > 0 && samples[found].at_s > since) found -= 1;
  return samples[found];
}

function rate(place, window_s, count) {
  const now = samples[place], before = sampleBefore(place, window_s);
  return now === before ? null : (count(now) - count(before)) / (now.at_s - before.at_s);
}

// A quantile of what was observed between two histograms, linear within a bucket; null for nothing.
function quantile(before, now, share) {
  const [bounds, counts] = now;
  const seen = counts.map((count, i) => count - (before[1][i] ?? 0));
  const total = seen.reduce((sum, count) => sum + count, 0);
  if (total <= 0) return null;
  let left = share * total;
  for (let i = 0; i < bounds.length; i += 1) {
    const low = i ? bounds[i - 1] : 0;
    if (seen[i] && left <= seen[i]) return low + (bounds[i] - low) * (left / seen[i]);
    left -= seen[i];
  }
  return Infinity;
}

function quantileAt(name, place, window_s, share) {
  const before = sampleBefore(place, window_s).histograms, now = samples[place].histograms;
  return quantile(before[name], now[name], share);
}

function sum(stats, name) {
  return stats.replicas.reduce((total, replica) => total + replica[name], 0);
}

// The histograms of all replicas as one; their buckets are the same.
function allOf(replicas, name) {
  const each = replicas.map((replica) => replica.histograms[name]);
  return [each[0][0], each[0][1].map((_, i) => each.reduce((total, one) => total + one[1][i], 0))];
}

function sampleOf(status) {
  const { replicas, devices, num_refused } = status.stats;
  const finished = {}, histograms = {};
  for (const replica of replicas) {
    for (const [reason, count] of Object.entries(replica.finished)) {
      finished[reason] = (finished[reason] ?? 0) + count;
    }
  }
  for (const name of SHOWN_TIMES) histograms[name] = allOf(replicas, name);
  return {
    at_s: status.at_s, devices, finished, histograms, num_refused,
    replicas: replicas.map(({ histograms: _, ...counts }) => counts),
    prompt_tokens: sum(status.stats, "prompt_tokens"),
    generation_tokens: sum(status.stats, "generation_tokens"),
  };
}

function remember(status) {
  const last = samples.at(-1);
  const sample = sampleOf(status);
  const isNewStart = last && (sample.at_s <= last.at_s
    || sample.generation_tokens < last.generation_tokens
    || sample.replicas.length !== last.replicas.length);
  if (isNewStart) samples = [];
  samples.push(sample);
  while (samples[0].at_s < sample.at_s - HISTORY_S) samples.shift();
}

// --- the layout

// Rectangles of a bar by their class; each is set as a share of the whole.
function barOf(...names) {
  const bar = svgElement("svg", {
    class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true",
  });
  const parts = names.map((name) => svgElement("rect", { class: name, width: 0, height: 10 }));
  bar.append(...parts);
  const set = (i, from, width) => {
    parts[i].setAttribute("x", (100 * from).toFixed(2));
    parts[i].setAttribute("width", (100 * Math.min(width, 1)).toFixed(2));
  };
  return { bar, set };
}

function rankView(rank, scale) {
  const item = element("li");
  const load = barOf("load"), memory = barOf("weights", "used", "cache");
  const weights = rank.weight_bytes / scale, room = rank.cache_bytes / scale;
  memory.set(0, 0, weights);
  memory.set(2, weights, room);
  const figures = element("dl", "", "figures"), health = element("p");
  const lane = rank.place.lane ? `lane ${rank.place.lane}, ` : "";
  const head = element("p");
  head.append(element("strong", rank.device), ` ${lane}rank ${rank.place.tp}`);
  item.append(head, load.bar, memory.bar, figures, health);
  return {
    item, rank, figures, health,
    setLoad: (share) => load.set(0, 0, share),
    setUsed: (share) => memory.set(1, weights, room * share),
  };
}

function stageView(number, ranks, scale) {
  const stage = element("li");
  const list = element("ul", "", "ranks");
  for (const rank of ranks) {
    const view = rankView(rank, scale);
    rankViews.push({ ...view, place: rank.number });
    list.append(view.item);
  }
  stage.append(element("h4", `Stage ${number}`), list);
  return stage;
}

function replicaView(number, ranks, scale) {
  const section = element("section");
  const title = element("h3", `Replica ${number}`);
  title.id = `replica-${number}`;
  section.setAttribute("aria-labelledby", title.id);
  const figures = element("dl"), stages = element("ol", "", "stages");
  const byStage = Map.groupBy(ranks, (rank) => rank.place.pp);
  for (const [stage, own] of byStage) stages.append(stageView(stage, own, scale));
  section.append(title, figures, stages);
  replicaViews.push(figures);
  return section;
}

function drawPlan(plan) {
  const key = JSON.stringify(plan);
  if (key === drawnPlan) return;
  drawnPlan = key;
  rankViews = [];
  replicaViews = [];
  const ranks = plan.ranks.map((rank, number) => ({ ...rank, number }));
  const scale = Math.max(1, ...ranks.map((rank) => rank.weight_bytes + rank.cache_bytes));
  const byReplica = Map.groupBy(ranks, (rank) => rank.place.dp);
  byId("replicas").replaceChildren(
    ...[...byReplica].map(([number, own]) => replicaView(number, own, scale)),
  );
  const idle = plan.idle_devices.length ? [["Idle", plan.idle_devices.join(", ")]] : [];
  fillList(byId("plan"), [
    ["Layout", plan.layout], ...idle,
    ["Model", `${plan.architecture}, ${plan.dtype}`],
    ["Context", `${plan.max_model_len} tokens`],
    ["Cache", `${plan.cache_tokens} tokens a replica`],
  ]);
  setText(byId("layout-line"), "The bars of a device: its load; below it weights (solid), cache "
    + "(outlined) and the part of it in use (filled).");
}

function drawReplicas(stats) {
  stats.replicas.forEach((replica, i) => {
    if (!replicaViews[i]) return;
    const steps = rate(samples.length - 1, LINE_WINDOW_S, (s) => s.replicas[i].num_steps);
    fillList(replicaViews[i], [
      ["Running", String(replica.num_running)],
      ["Waiting", String(replica.num_waiting)],
      ["KV blocks", `${replica.num_used_blocks} of ${replica.num_blocks} `
        + `(${shareText(replica.num_used_blocks, replica.num_blocks)})`],
      ["Steps/s", rateText(steps)],
      ["Prefix hits", shareText(replica.prefix_hit_tokens, replica.prefix_queried_tokens)],
      ["Preempted", String(replica.num_preempted)],
    ]);
  });
}

function drawRanks(status) {
  for (const view of rankViews) {
    const { rank } = view, replica = status.stats?.replicas[rank.place.dp];
    const device = status.stats?.devices[view.place];
    const share = replica?.num_blocks ? replica.num_used_blocks / replica.num_blocks : 0;
    view.setUsed(share);
    view.setLoad(device?.utilization ?? 0);
    fillList(view.figures, [
      ["Load", device ? shareText(device.utilization, 1) : "–"],
      ["Weights", bytesText(rank.weight_bytes)],
      ["Cache", `${bytesText(rank.cache_bytes)}, ${shareText(share, 1)} in use`],
      ["Memory", device ? `${bytesText(device.memory_used_bytes)} of `
        + bytesText(device.memory_total_bytes) : "–"],
    ]);
    drawHealth(view.health, status.ranks[view.place]);
  }
}

function drawHealth(where, rank) {
  setText(where, !rank ? "? not heard of" : rank.healthy ? "✓ answers"
    : `⚠ silent for ${secondsText(rank.age_s)}`);
  where.classList.toggle("bad", Boolean(rank) && !rank.healthy);
}

// --- the lines

const percentiles = (name) => ({
  lines: [0.5, 0.95].map((share) => (i) => quantileAt(name, i, LINE_WINDOW_S, share)),
  text: (i) => ["50", "95", "99"].map(
    (p) => `p${p} ${secondsText(quantileAt(name, i, TEXT_WINDOW_S, p / 100))}`,
  ).join(", "),
  top: secondsText,
  keys: "solid p50, dashed p95",
});

function loadAt(place, of) {
  const { devices } = samples[place];
  return devices.length ? of(devices.map((device) => device.utilization)) : null;
}

const CHARTS = [
  { title: "Time to first token", ...percentiles("time_to_first_token_seconds") },
  { title: "Between tokens", ...percentiles("inter_token_latency_seconds") },
  { title: "End to end", ...percentiles("e2e_request_latency_seconds") },
  {
    title: "Tokens per second",
    lines: ["generation_tokens", "prompt_tokens"].map(
      (name) => (i) => rate(i, LINE_WINDOW_S, (s) => s[name]),
    ),
    text(i) { return `${rateText(this.lines[0](i))} generated, ${rateText(this.lines[1](i))} of prompts`; },
    top: rateText,
    keys: "solid output, dashed prompts",
  },
  {
    title: "Queues",
    lines: ["num_running", "num_waiting"].map((name) => (i) => sum(samples[i], name)),
    text(i) { return `${this.lines[0](i)} running, ${this.lines[1](i)} waiting`; },
    top: String,
    keys: "solid running, dashed waiting",
  },
  {
    title: "Device load",
    lines: [mean, (values) => Math.max(...values)].map((of) => (i) => loadAt(i, of)),
    text(i) { return `${percentText(this.lines[0](i))} on average, ${percentText(this.lines[1](i))} at most`; },
    top: percentText,
    keys: "solid mean, dashed busiest",
    highest: 1,
  },
  {
    title: "KV cache in use",
    lines: [(i) => mean(samples[i].replicas.map((r) => r.num_used_blocks / (r.num_blocks || 1)))],
    text(i) { return percentText(this.lines[0](i)); },
    top: percentText,
    keys: "mean of the replicas",
    highest: 1,
  },
];

function buildChart(chart) {
  const figure = element("figure"), caption = element("figcaption");
  const plot = element("div", "", "plot"), axis = element("div", "", "axis");
  for (const name of ["now", "key", "high", "since"]) chart[name] = element("span");
  const svg = svgElement("svg", {
    class: "chart", viewBox: "0 0 300 60", preserveAspectRatio: "none", "aria-hidden": "true",
  });
  chart.paths = chart.lines.map(() => svgElement("path", { d: "" }));
  svg.append(...chart.paths);
  plot.append(svg, chart.high);
  setText(chart.key, chart.keys);
  axis.append(chart.since, chart.key, element("span", "now"));
  caption.append(element("strong", chart.title), chart.now);
  figure.append(caption, plot, axis);
  return figure;
}

// How much time the charts span: it grows with what is known.
function span_s() {
  const known_s = samples.at(-1).at_s - samples[0].at_s;
  return [60, 120, HISTORY_S].find((each) => known_s <= each) ?? HISTORY_S;
}

// A value that is not there leaves a gap.
function pathOf(values, top) {
  const end_s = samples.at(-1).at_s;
  let path = "", isDown = false;
  values.forEach((value, i) => {
    const isThere = value !== null && Number.isFinite(value);
    if (isThere) {
      const x = 300 * (1 - (end_s - samples[i].at_s) / span_s()), y = 58 - (56 * value) / top;
      path += `${isDown ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      if (!isDown) path += "h.01";
    }
    isDown = isThere;
  });
  return path;
}

function drawChart(chart) {
  const lines = chart.lines.map((line) => samples.map((_, i) => line(i)));
  const highest = chart.highest ?? Math.max(0, ...lines.flat().filter(Number.isFinite));
  chart.paths.forEach((path, i) => path.setAttribute("d", pathOf(lines[i], highest || 1)));
  setText(chart.now, chart.text(samples.length - 1));
  setText(chart.high, highest ? chart.top(highest) : "");
  setText(chart.since, `${span_s() / 60} min ago`);
}

function drawStats(stats) {
  drawReplicas(stats);
  CHARTS.forEach(drawChart);
  const { finished } = samples.at(-1);
  const ended = Object.entries(finished).sort();
  fillList(byId("outcomes"), [
    ...ended.map(([reason, count]) => [reason, String(count)]),
    ["refused for want of room", String(stats.num_refused)],
  ]);
}

// --- asking the server

class Refusal extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function refusalOf(response) {
  const said = await response.text();
  try {
    return new Refusal(JSON.parse(said).error.message, response.status);
  } catch (error) {
    if (!(error instanceof SyntaxError || error instanceof TypeError)) throw error;
    return new Refusal(`${response.status} ${response.statusText}`, response.status);
  }
}

function askForKey(isNeeded) {
  byId("key-form").hidden = !isNeeded;
}

function draw(status) {
  setText(byId("model"), `${status.model ?? ""} · version ${status.version}`);
  byId("send").disabled = !status.ready || answering !== null;
  if (!status.ready) {
    if (status.phase === "failed") say("The engine does not run; the server's log says why", "bad");
    else say(`Loading: ${status.phase}`);
    return;
  }
  if (status.healthy) say("Running", "good");
  else say("Not every part of the engine answers", "bad");
  model = status.model;
  drawPlan(status.plan);
  if (status.stats) {
    remember(status);
    drawStats(status.stats);
  }
  drawRanks(status);
}

async function pollOnce() {
  const signal = AbortSignal.timeout(PATIENCE_MS);
  const response = await fetch("status", { headers: headers(), cache: "no-store", signal });
  if (!response.ok) throw await refusalOf(response);
  askForKey(false);
  draw(await response.json());
}

function onPollError(error) {
  byId("send").disabled = true;
  if (error.status === 401) {
    askForKey(true);
    say(sessionStorage.getItem(KEY) ? "The key is not accepted" : "A key is needed", "bad");
  } else if (error instanceof Refusal) {
    say(error.message, "bad");
  } else {
    say("The server does not answer; asking again", "bad");
  }
}

async function poll() {
  if (polling) return;
  polling = true;
  clearTimeout(timer);
  try {
    await pollOnce();
  } catch (error) {
    onPollError(error);
    if (!(error instanceof Refusal || error instanceof DOMException
      || error instanceof TypeError)) throw error;
  } finally {
    polling = false;
    // Without a right key there is nothing to ask for until another is given.
    if (!document.hidden && byId("key-form").hidden) timer = setTimeout(poll, POLL_MS);
  }
}

// --- trying a prompt

function requestOf(route) {
  const prompt = byId("prompt").value;
  const said = route === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  return {
    ...said,
    model,
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("max-tokens").value),
    stream: true,
    stream_options: { include_usage: true },
  };
}

// The data of each event, as it comes; ends with the stream.
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
    }
  }
}

async function streamAnswer(route, signal, onText) {
  const path = route === "chat" ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify(requestOf(route)),
    signal,
  });
  if (!response.ok) throw await refusalOf(response);
  let usage = null, reason = null;
  for await (const event of eventsOf(response.body)) {
    if (event.error) throw new Refusal(event.error.message, 0);
    const choice = event.choices[0];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) onText(text);
    reason = choice?.finish_reason ?? reason;
    usage = event.usage ?? usage;
  }
  if (reason === null) throw new Refusal("the answer broke off", 0);
  return { usage, reason };
}

function setAnswering(controller) {
  answering = controller;
  byId("send").disabled = controller !== null;
  byId("stop").disabled = controller === null;
  // While it grows it is not read out; the whole of it is, once.
  byId("answer").setAttribute("aria-busy", String(controller !== null));
}

async function answer(event) {
  event.preventDefault();
  if (answering) return;
  const began = performance.now(), shown = byId("answer"), state = byId("answer-state");
  const controller = new AbortController();
  shown.replaceChildren();
  setAnswering(controller);
  setText(state, "Answering…");
  try {
    const route = new FormData(byId("try-form")).get("route");
    const { usage, reason } = await streamAnswer(route, controller.signal, (text) => {
      const isAtEnd = shown.scrollTop + shown.clientHeight >= shown.scrollHeight - 4;
      shown.append(text);
      if (isAtEnd) shown.scrollTop = shown.scrollHeight;
    });
    const tokens = usage ? `${usage.completion_tokens} tokens, ` : "";
    setText(state, `Finished (${reason}): ${tokens}${secondsText((performance.now() - began) / 1000)}`);
  } catch (error) {
    const isStopped = controller.signal.aborted;
    if (error.status === 401) askForKey(true);
    setText(state, isStopped ? "Stopped" : error instanceof Refusal ? `⚠ ${error.message}`
      : "⚠ The server does not answer");
  } finally {
    setAnswering(null);
  }
}

// --- the beginning

function useKey(event) {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  askForKey(false);
  poll();
}

function onVisibility() {
  clearTimeout(timer);
  if (!document.hidden) poll();
}

byId("charts").append(...CHARTS.map(buildChart));
byId("try-form").addEventListener("submit", answer);
byId("stop").addEventListener("click", () => answering?.abort());
byId("key-form").addEventListener("submit", useKey);
document.addEventListener("visibilitychange", onVisibility);
poll();

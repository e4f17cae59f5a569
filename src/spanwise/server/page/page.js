// The page: asks /status about once a second while it is seen, and draws what it says.
// All text goes in through textContent: nothing that a server or a model says becomes markup.

const POLL_MS = 1000;
const PATIENCE_MS = 10_000;
const HISTORY_S = 300;
const LINE_WINDOW_S = 10;
const TEXT_WINDOW_S = 60;
const KEY = "spanwise.key";
const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);
let samples = []; // {at_s, ...stats}, the oldest first
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

function say(text, isBad = false) {
  const state = byId("state");
  setText(state, isBad ? `⚠ ${text}` : `● ${text}`);
  state.classList.toggle("bad", isBad);
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
  return quantile(sampleBefore(place, window_s)[name], samples[place][name], share);
}

function sum(stats, name) {
  return stats.replicas.reduce((total, replica) => total + replica[name], 0);
}

function remember(status) {
  const last = samples.at(-1);
  const sample = { ...status.stats, at_s: status.at_s };
  const isNewStart = last && (sample.at_s <= last.at_s
    || sample.generation_tokens < last.generation_tokens
    || sample.replicas.length !== last.replicas.length);
  if (isNewStart) samples = [];
  samples.push(sample);
  while (samples[0].at_s < sample.at_s - HISTORY_S) samples.shift();
}

// --- the layout

function barOf(rank, scale) {
  const bar = svgElement("svg", {
    class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true",
  });
  const weights = (100 * rank.weight_bytes) / scale, cache = (100 * rank.cache_bytes) / scale;
  const used = svgElement("rect", { class: "used", x: weights, width: 0, height: 10 });
  bar.append(
    svgElement("rect", { class: "weights", width: weights, height: 10 }), used,
    svgElement("rect", { class: "cache", x: weights, width: cache, height: 10 }),
  );
  return { bar, setUsed: (share) => used.setAttribute("width", cache * share) };
}

function rankView(rank, scale) {
  const item = element("li");
  const { bar, setUsed } = barOf(rank, scale);
  const cache = element("p"), health = element("p");
  const lane = rank.place.lane ? `lane ${rank.place.lane}, ` : "";
  item.append(
    element("strong", rank.device), element("p", `${lane}rank ${rank.place.tp}`, "quiet"), bar,
    element("p", `Weights ${bytesText(rank.weight_bytes)}`), cache, health,
  );
  return { item, rank, cache, health, setUsed };
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
  const idle = plan.idle_devices.length ? `; idle: ${plan.idle_devices.join(", ")}` : "";
  setText(byId("layout-line"), `${plan.layout}${idle}. ${plan.architecture}, ${plan.dtype}, `
    + `context ${plan.max_model_len} tokens, cache ${plan.cache_tokens} tokens a replica. `
    + "Bars: weights (solid), cache (outlined), its part in use (filled).");
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
    const replica = status.stats?.replicas[view.rank.place.dp];
    const share = replica?.num_blocks ? replica.num_used_blocks / replica.num_blocks : 0;
    view.setUsed(share);
    setText(view.cache, `Cache ${bytesText(view.rank.cache_bytes)}, `
      + `${Math.round(100 * share)}% in use`);
    const rank = status.ranks[view.place];
    const isWell = Boolean(rank?.healthy);
    setText(view.health, !rank ? "? not heard of" : isWell ? "✓ answers"
      : `⚠ silent for ${secondsText(rank.age_s)}`);
    view.health.classList.toggle("bad", Boolean(rank) && !isWell);
  }
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

const CHARTS = [
  { title: "Time to first token", ...percentiles("time_to_first_token_s") },
  { title: "Between tokens", ...percentiles("inter_token_latency_s") },
  { title: "End to end", ...percentiles("e2e_latency_s") },
  {
    title: "Tokens per second",
    lines: ["generation_tokens", "prompt_tokens"].map(
      (name) => (i) => rate(i, LINE_WINDOW_S, (s) => s[name]),
    ),
    text(i) { return `${rateText(this.lines[0](i))} generated, ${rateText(this.lines[1](i))} of prompts`; },
    top: rateText,
    keys: "solid generated, dashed prompts",
  },
  {
    title: "Queues",
    lines: ["num_running", "num_waiting"].map((name) => (i) => sum(samples[i], name)),
    text(i) { return `${this.lines[0](i)} running, ${this.lines[1](i)} waiting`; },
    top: String,
    keys: "solid running, dashed waiting",
  },
];

function buildChart(chart) {
  const figure = element("figure"), caption = element("figcaption");
  chart.now = element("span");
  chart.key = element("span", "", "quiet");
  const svg = svgElement("svg", {
    class: "chart", viewBox: "0 0 300 60", preserveAspectRatio: "none", "aria-hidden": "true",
  });
  chart.paths = chart.lines.map(() => svgElement("path", { d: "" }));
  svg.append(...chart.paths);
  caption.append(element("strong", chart.title), chart.now, element("br"), chart.key);
  figure.append(caption, svg);
  return figure;
}

// A value that is not there leaves a gap.
function pathOf(values, top) {
  const end_s = samples.at(-1).at_s;
  let path = "", isDown = false;
  values.forEach((value, i) => {
    const isThere = value !== null && Number.isFinite(value);
    if (isThere) {
      const x = HISTORY_S - (end_s - samples[i].at_s), y = 58 - (56 * value) / top;
      path += `${isDown ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      if (!isDown) path += "h.01";
    }
    isDown = isThere;
  });
  return path;
}

function drawChart(chart) {
  const lines = chart.lines.map((line) => samples.map((_, i) => line(i)));
  const highest = Math.max(0, ...lines.flat().filter(Number.isFinite));
  chart.paths.forEach((path, i) => path.setAttribute("d", pathOf(lines[i], highest || 1)));
  setText(chart.now, chart.text(samples.length - 1));
  setText(chart.key, `${chart.keys}; top: ${highest ? chart.top(highest) : "–"}`);
}

function drawStats(stats) {
  drawReplicas(stats);
  CHARTS.forEach(drawChart);
  const ended = Object.entries(stats.finished).sort();
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
    say(status.phase === "failed" ? "The engine does not run; the server's log says why"
      : `Loading: ${status.phase}`, status.phase === "failed");
    return;
  }
  say(status.healthy ? "Running" : "Not every part of the engine answers", !status.healthy);
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
    say(sessionStorage.getItem(KEY) ? "The key is not accepted" : "A key is needed", true);
  } else if (error instanceof Refusal) {
    say(error.message, true);
  } else {
    say("The server does not answer; asking again", true);
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

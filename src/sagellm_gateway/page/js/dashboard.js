// The server's figures as they change.

import { ApiError, call, errorText, events } from "./api.js";
import { Chart } from "./chart.js";
import { h } from "./dom.js";
import { compact, count, figure, milliseconds, percent, plural, seconds, uptime } from "./format.js";

const RETRY_MS = 3000;

const STATES = { ready: "good", starting: "busy", draining: "busy", stopped: "quiet", error: "bad" };

export class Dashboard {
  #openKey;
  #running = null; // AbortController of the stream
  #cards;

  constructor(root, { openKey }) {
    this.#openKey = openKey;
    this.#cards = makeCards();
    this.status = h("p", { class: "status", role: "status" });
    this.problem = h("div", { class: "problem-box", hidden: true });
    this.totals = h("dl", { class: "totals" });
    this.engines = h("div", { class: "engines" });
    this.events = h("ol", { class: "events" });
    this.happened = h(
      "section",
      { "aria-labelledby": "events-title", hidden: true },
      h("h2", { id: "events-title" }, "What happened"),
      this.events,
    );
    this.body = h(
      "div",
      { class: "figures", hidden: true },
      h(
        "section",
        { class: "cards", "aria-label": "Figures" },
        this.#cards.map((card) => card.element),
      ),
      this.totals,
      h("section", { "aria-labelledby": "engines-title" }, h("h2", { id: "engines-title" }, "Engines"), this.engines),
      this.happened,
    );
    root.append(h("div", { class: "dashboard-inner" }, this.status, this.problem, this.body));
  }

  /** Follow the figures until `stop`. */
  async start() {
    this.stop();
    const controller = (this.#running = new AbortController());
    this.#say("Connecting…", "busy");
    while (!controller.signal.aborted) {
      let wait = RETRY_MS;
      try {
        for await (const data of events(await call("admin/stats/stream", { signal: controller.signal })))
          this.#show(JSON.parse(data));
        throw new ApiError("The server ended the stream of figures.");
      } catch (error) {
        if (error.name === "AbortError") return;
        wait = this.#fail(error);
      }
      if (wait === null) return;
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }

  stop() {
    this.#running?.abort();
    this.#running = null;
  }

  /** Say what is wrong; the milliseconds until the next try, or null where trying again would not help. */
  #fail(error) {
    if (error.needsKey) {
      this.#refuse(
        "These figures are for administrators",
        error.message,
        h("button", { type: "button", class: "primary", onclick: this.#openKey }, "Enter an admin key"),
      );
      return null;
    }
    if (error.status === 404) {
      this.#refuse("No live figures here", "This server has no /admin/stats. Its Prometheus metrics are at /metrics.");
      return null;
    }
    this.#say(`${error.message} Trying again.`, "bad");
    return RETRY_MS;
  }

  #refuse(title, text, ...more) {
    this.body.hidden = true;
    this.#say("", "quiet");
    this.problem.hidden = false;
    this.problem.replaceChildren(h("h2", {}, title), h("p", { class: "lead" }, text), ...more);
  }

  #say(text, kind) {
    if (this.status.dataset.kind === kind && this.status.textContent === text) return;
    this.status.dataset.kind = kind;
    this.status.replaceChildren(text);
  }

  #show(stats) {
    if (stats.error) throw new ApiError(errorText(stats));
    this.problem.hidden = true;
    this.body.hidden = false;
    this.#say(`Live · up for ${uptime(stats.uptime_s)}`, "good");
    for (const card of this.#cards) card.show(stats);
    const { totals } = stats;
    const entries = [
      ["Requests", totals.requests],
      ["Failed", totals.failed],
      ["Prompt tokens", totals.prompt_tokens],
      ["Output tokens", totals.output_tokens],
    ];
    this.totals.replaceChildren(
      ...entries.map(([name, value]) =>
        h("div", {}, h("dt", {}, name), h("dd", { title: count(value) }, compact(value))),
      ),
    );
    this.engines.replaceChildren(...stats.engines.map(engineRow));
    this.happened.hidden = stats.events.length === 0;
    this.events.replaceChildren(...stats.events.toReversed().map(eventRow));
  }
}

// ---- cards

function makeCards() {
  const sum = (stats, name) => stats.engines.reduce((total, engine) => total + engine[name], 0);
  const share = (stats, name) => {
    const ready = stats.engines.filter((engine) => engine.num_blocks > 0);
    const blocks = ready.reduce((total, engine) => total + engine.num_blocks, 0);
    return blocks ? ready.reduce((total, engine) => total + engine[name] * engine.num_blocks, 0) / blocks : null;
  };
  const latency = (stats, name) => [stats[name].p50, stats[name].p90, stats[name].p99];
  const percentiles = ([, p90, p99]) =>
    p90 === null ? "no requests yet" : `p90 ${seconds(p90)} · p99 ${seconds(p99)}`;
  const inPercent = (value) => [percent(value), "%"];
  const window = (stats) => plural(Math.round(stats.window_s / 60), "minute");
  return [
    card("Output", (stats) => [stats.rates.output_tokens_per_s], {
      say: (value) => [figure(value), "tokens/s"],
      note: () => "all engines together",
    }),
    card("Requests", (stats) => [stats.rates.requests_per_s], {
      say: (value) => [figure(value), "per second"],
      note: (stats) => `${count(stats.totals.requests)} in all`,
    }),
    card("Running", (stats) => [sum(stats, "num_running"), stats.queue_depth + sum(stats, "num_waiting")], {
      say: (value) => [count(value), "requests"],
      note: (stats, [, waiting]) => `${count(waiting)} waiting`,
      hint: () => "The finer line is what waits.",
    }),
    card("Time to first token", (stats) => latency(stats, "ttft_ms"), {
      say: milliseconds,
      note: (stats, values) => percentiles(values),
      hint: (stats) => `Median of the last ${window(stats)}; p90 and p99 are the finer lines.`,
    }),
    card("Time per output token", (stats) => latency(stats, "tpot_ms"), {
      say: milliseconds,
      note: (stats, values) => percentiles(values),
      hint: (stats) => `Median of the last ${window(stats)}; p90 and p99 are the finer lines.`,
    }),
    card("KV cache in use", (stats) => [share(stats, "kv_usage")], {
      say: inPercent,
      limit: 1,
      note: (stats) =>
        `${count(sum(stats, "num_blocks") - sum(stats, "num_free_blocks"))} of ${count(sum(stats, "num_blocks"))} blocks held`,
    }),
    card("Prefix cache hits", (stats) => [share(stats, "prefix_hit_rate")], {
      say: inPercent,
      limit: 1,
      note: () => "of prompt tokens looked up",
    }),
  ];
}

/** A figure with its course. `values(stats)` gives what is drawn, of which the first is the figure. */
function card(title, values, { say, note, hint = () => null, limit = null }) {
  const number = h("span", { class: "number" }, "–");
  const unit = h("span", { class: "unit" });
  const line = h("p", { class: "card-note" });
  const chart = new Chart(title, {
    series: 3,
    limit,
    format: (value) => say(value).join(" "),
    scale: (value) => shortly(say(value)),
  });
  const element = h(
    "article",
    { class: "card" },
    h("h3", {}, title),
    h("p", { class: "value" }, number, unit),
    chart.element,
    line,
  );
  return {
    element,
    show(stats) {
      const now = values(stats);
      const isKnown = now[0] !== null && now[0] !== undefined;
      const [text, name] = isKnown ? say(now[0]) : ["–", ""];
      number.textContent = text;
      unit.textContent = name;
      line.textContent = note(stats, now);
      element.title = hint(stats) ?? "";
      chart.push(stats.time, ...now);
    },
  };
}

/** A round number without its zeros; of units only the short ones. */
const shortly = ([number, unit]) => `${number.replace(/\.0+$/, "")}${unit.length > 2 ? "" : ` ${unit}`}`;

// ---- engines

function engineRow(engine) {
  const pair = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  return h(
    "article",
    { class: "engine" },
    h(
      "header",
      {},
      h("h3", {}, engine.model),
      h("span", { class: "state", "data-kind": STATES[engine.state] ?? "quiet" }, engine.state),
      h(
        "span",
        { class: "engine-id" },
        engine.pid ? `${engine.engine_id} · process ${engine.pid}` : engine.engine_id,
      ),
    ),
    engine.error && h("p", { class: "engine-error" }, engine.error),
    h(
      "dl",
      {},
      pair("Places taken", meter(engine.load, "Places taken"), ` ${percent(engine.load)} %`),
      pair("Running", count(engine.num_running)),
      pair("Waiting", count(engine.num_waiting)),
      pair("KV cache", meter(engine.kv_usage, "KV cache in use"), ` ${percent(engine.kv_usage)} %`),
      pair("Prefix hits", `${percent(engine.prefix_hit_rate)} %`),
      pair("Blocks", count(engine.num_blocks)),
      engine.max_model_len ? pair("Context", `${count(engine.max_model_len)} tokens`) : null,
    ),
  );
}

const meter = (share, name) =>
  h("meter", { min: "0", max: "1", value: String(Math.min(share, 1)), "aria-label": name });

// ---- events

const EVENTS = { lost: "bad", refused: "bad", moved: "busy", engine: "quiet", policy: "quiet", scale: "quiet" };

/** Something that happened to engines, requests on the move, or policies. */
function eventRow(event) {
  const at = new Date(event.time * 1000);
  return h(
    "li",
    {},
    h("time", { datetime: at.toISOString() }, at.toLocaleTimeString("en-GB")),
    h("span", { class: "state", "data-kind": EVENTS[event.kind] ?? "quiet" }, event.kind),
    h("span", { class: "event-text" }, event.message),
  );
}

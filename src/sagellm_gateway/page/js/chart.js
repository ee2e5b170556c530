// A line over the last minutes, without axes: its scale stands beside it.

import { h, svg } from "./dom.js";

const WIDTH = 240;
const HEIGHT = 64;
const TOP = 3;
const SPAN = 30; // points that the width holds at first: a line is to be seen from its second point on

/**
 * Draws several series of the same scale. `format(value)` says a value, `scale(value)` the top; `limit` fixes the top,
 * e.g. at 1 for shares.
 */
export class Chart {
  #points = []; // [time, values]
  #lines;
  #area;
  #options;

  constructor(label, { series = 1, capacity = 120, format = String, scale = format, limit = null } = {}) {
    this.#options = { label, capacity, format, scale, limit };
    this.#area = svg("path", { class: "area" });
    this.#lines = Array.from({ length: series }, (_, index) => svg("path", { class: `line line-${index}` }));
    this.#lines.reverse(); // the first on top
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
    this.picture = svg(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
      this.#area,
      ...this.#lines,
      this.cursor,
    );
    this.tip = h("output", { class: "tip", hidden: true });
    this.top = h("span", { class: "scale" });
    this.element = h("div", { class: "chart" }, this.picture, this.top, this.tip);
    this.#lines.reverse();
    this.element.addEventListener("pointermove", (event) => this.#point(event));
    this.element.addEventListener("pointerleave", () => this.#hideTip());
  }

  /** Add the values of now; null leaves a gap. */
  push(time, ...values) {
    this.#points.push([time, values]);
    if (this.#points.length > this.#options.capacity) this.#points.shift();
    this.#draw();
  }

  clear() {
    this.#points = [];
    this.#draw();
  }

  #draw() {
    const { format, scale, limit, label } = this.#options;
    const known = this.#points.flatMap(([, values]) => values).filter((value) => value !== null && value !== undefined);
    const most = limit ?? ceiling(Math.max(0, ...known));
    const y = (value) => HEIGHT - 1 - (value / most) * (HEIGHT - TOP - 1);
    this.#lines.forEach((line, index) => line.setAttribute("d", this.#path(index, y)));
    const outline = this.#path(0, y);
    const first = this.#points.findIndex(([, values]) => isKnown(values[0]));
    this.#area.setAttribute(
      "d",
      outline && first >= 0 && !outline.slice(1).includes("M") ? `${outline}V${HEIGHT}H${this.#x(first)}Z` : "",
    );
    this.top.textContent = known.length ? scale(most) : "";
    const last = this.#points.at(-1)?.[1][0];
    this.picture.setAttribute(
      "aria-label",
      isKnown(last) ? `${label}: now ${format(last)}` : `${label}: no figures yet`,
    );
  }

  /** The distance of two points. */
  get #step() {
    return WIDTH / (Math.max(SPAN, this.#points.length) - 1);
  }

  #x(index) {
    return Number((WIDTH - (this.#points.length - 1 - index) * this.#step).toFixed(2));
  }

  #path(series, y) {
    let path = "";
    let isOpen = false;
    this.#points.forEach(([, values], index) => {
      const value = values[series];
      if (isKnown(value)) path += `${isOpen ? "L" : "M"}${this.#x(index)} ${y(value).toFixed(2)}`;
      isOpen = isKnown(value);
    });
    return path;
  }

  #point(event) {
    const box = this.element.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const index = Math.round(this.#points.length - 1 - (WIDTH - x) / this.#step);
    const entry = this.#points[index];
    if (!entry) return this.#hideTip();
    const [time, values] = entry;
    const at = this.#x(index);
    this.cursor.setAttribute("x1", at);
    this.cursor.setAttribute("x2", at);
    this.cursor.setAttribute("visibility", "visible");
    this.tip.hidden = false;
    this.tip.textContent = `${values.filter(isKnown).map(this.#options.format).join(" · ") || "nothing"}, ${ago(time)}`;
    this.tip.classList.toggle("right", at > WIDTH / 2);
  }

  #hideTip() {
    this.tip.hidden = true;
    this.cursor.setAttribute("visibility", "hidden");
  }
}

const isKnown = (value) => value !== null && value !== undefined;

/** The next round number. */
function ceiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((factor) => factor * power).find((candidate) => candidate >= value);
}

function ago(time) {
  const seconds = Math.round(Date.now() / 1000 - time);
  return seconds < 1 ? "now" : `${seconds} s ago`;
}

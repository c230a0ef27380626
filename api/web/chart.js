// Curves of a job's figures over its steps, as one inline SVG.

import { el, number } from "./dom.js";

const HEIGHT = 260, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 26;
const NAMES = { steps: "training", train: "train split", held_out: "held-out split" };
const MOST_POINTS = 600;

/** Points by figure and series, keyed by step, so that a repeated step counts once. */
export class Curves {
  constructor() {
    this.figures = new Map();
  }

  add(event) {
    const { step, split, values, ...rest } = event.data;
    if (event.type === "job.metric") this.#put(values, split, step);
    else if (event.type === "job.progress") this.#put({ loss: rest.loss }, "steps", step);
  }

  #put(values, series, step) {
    for (const [name, value] of Object.entries(values ?? {})) {
      if (typeof value !== "number") continue;
      if (!this.figures.has(name)) this.figures.set(name, { steps: new Map(), train: new Map(), held_out: new Map() });
      this.figures.get(name)[series]?.set(step, value);
    }
  }

  /** Figures that have at least two points to draw a line between. */
  get names() {
    return [...this.figures].filter(([, series]) => Object.values(series).some((points) => points.size > 1)).map(([name]) => name);
  }
}

/** The chart and its legend, for a box of this width in pixels. */
export function draw(figure, width) {
  const series = Object.entries(figure).map(([name, points]) => [name, thin([...points].sort((a, b) => a[0] - b[0]))]).filter(([, points]) => points.length);
  const all = series.flatMap(([, points]) => points);
  const [x0, x1] = extent(all.map(([step]) => step));
  const [y0, y1] = extent(all.map(([, value]) => value));
  const x = (step) => LEFT + ((step - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  const svg = el("svg", { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": "curve over steps" });
  for (let part = 0; part <= 4; part += 1) {
    const value = y0 + ((y1 - y0) * part) / 4;
    svg.append(el("line", { svg: true, class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(label(LEFT - 8, y(value) + 4, "end", number(value)));
  }
  for (const [part, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
    const step = x0 + (x1 - x0) * part;
    svg.append(label(x(step), HEIGHT - 6, anchor, number(Math.round(step))));
  }
  for (const [name, points] of series) {
    const d = points.map(([step, value], index) => `${index ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(el("path", { svg: true, class: name, d }));
  }
  const legend = series.map(([name, points]) => el("span", { class: name }, el("i"), `${NAMES[name]} ${number(points.at(-1)[1])}`));
  return [svg, el("div", { class: "legend" }, ...legend)];
}

function label(x, y, anchor, text) {
  return el("text", { svg: true, x, y, "text-anchor": anchor }, text);
}

function extent(values) {
  const low = Math.min(...values), high = Math.max(...values);
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

function thin(points) {
  const every = Math.ceil(points.length / MOST_POINTS);
  return points.filter((_, index) => index % every === 0 || index === points.length - 1);
}

// Small ways to make elements and to say numbers. Text is always set as text, never as HTML.

export function el(tag, attributes = {}, ...children) {
  const node = tag === "svg" || attributes.svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "svg" || value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const badge = (state) => el("span", { class: `badge ${state}` }, state);

export function bar(job, size = "") {
  const inner = el("div");
  inner.style.width = `${(100 * job.progress.value).toFixed(1)}%`;
  return el("div", { class: `bar ${job.state} ${size}`, role: "progressbar", "aria-valuenow": Math.round(100 * job.progress.value) }, inner);
}

export function number(value) {
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 7 : 4 });
}

export function duration(seconds) {
  if (seconds < 0.995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export function ago(time) {
  const seconds = (Date.now() - Date.parse(time)) / 1000;
  if (seconds < 5) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return new Date(time).toLocaleDateString();
}

export const clock = (time) => new Date(time).toLocaleTimeString("en-GB");

export function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = size > 0 ? Math.min(Math.floor(Math.log2(size) / 10), 4) : 0;
  return `${(size / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

export function table(heads, rows) {
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {}, head)))), el("tbody", {}, ...rows)));
}

/** Why a job waits, and for how long. */
function waits({ position, reason, eta, waits_for: others }) {
  if (others.length) return `waiting for ${others.join(", ")}`;
  const parts = [...(position ? [`place ${position}`] : []), reason.replaceAll("_", " ")];
  if (eta && eta.p90 < 1) parts.push("starts at once");
  else if (eta) parts.push(`starts in about ${duration(eta.p50)}, likely within ${duration(eta.p90)}`);
  return parts.join(" · ");
}

/** What a job is doing, in one line. */
export function line(job) {
  const { figures, step, steps } = job.progress;
  if (job.queue) return waits(job.queue);
  if (job.error) return `${job.error.code}: ${job.error.message}`;
  const parts = [];
  if (steps && job.state !== "succeeded") parts.push(`${number(step)} / ${number(steps)}`);
  if (job.phase) parts.push(job.phase.replaceAll("_", " "));
  if (figures.loss !== undefined) parts.push(`loss ${number(figures.loss)}`);
  if (job.state === "running" && figures.rate) parts.push(`${number(figures.rate)} steps/s`);
  if (job.state === "running" && figures.eta_seconds) parts.push(`${duration(figures.eta_seconds)} left`);
  if (job.state === "succeeded") parts.push(job.result?.model ?? job.result?.dataset ?? "done");
  return parts.join(" · ");
}

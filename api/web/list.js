// The list of jobs, with what the workers are doing.

import { get, Refused } from "./api.js";
import { ago, badge, bar, el, line } from "./dom.js";

const FILTERS = { all: "", queued: "state=queued", running: "state=running&state=canceling&state=pausing", paused: "state=paused", succeeded: "state=succeeded", failed: "state=failed&state=expired&state=canceled" };
const EVERY_MS = 2000;

export function showList(page) {
  document.title = "Jobs · Noisemill";
  let filter = "all", limit = 50;
  const jobs = el("ul", { class: "jobs" });
  const workers = el("span", { class: "soft" });
  const more = el("button", { hidden: true, onclick: () => { limit = Math.min(limit + 50, 200); refresh(); } }, "Show more");
  const chips = Object.keys(FILTERS).map((name) => el("button", { class: "chip", onclick: () => { filter = name; refresh(); } }, name));
  page.replaceChildren(
    el("div", { class: "row" }, el("h1", {}, "Jobs"), el("span", { class: "grow" }), workers),
    el("div", { class: "chips" }, ...chips),
    el("section", { class: "card flush" }, jobs),
    el("div", { class: "row" }, more),
  );

  async function refresh() {
    chips.forEach((chip) => chip.setAttribute("aria-pressed", chip.textContent === filter));
    try {
      const found = await get(`/v1/jobs?limit=${limit}&${FILTERS[filter]}`);
      jobs.replaceChildren(...(found.data.length ? found.data.map(entry) : [empty(filter)]));
      more.hidden = !found.has_more || limit >= 200;
      workers.textContent = busy((await get("/v1/workers")).data);
    } catch (error) {
      if (error instanceof Refused) jobs.replaceChildren(el("li", { class: "empty bad" }, error.message));
    }
  }

  async function loop() {
    if (!document.hidden) await refresh();
    setTimeout(loop, EVERY_MS);
  }
  loop();
}

function entry(job) {
  return el("li", {}, el("a", { href: `/jobs/${job.id}` },
    el("span", { class: "state" }, badge(job.state)),
    el("span", { class: "what", title: job.id }, job.summary),
    el("span", { class: "how" }, bar(job), el("span", { class: "figures" }, line(job))),
    el("span", { class: "when", title: job.created_at }, ago(job.created_at))));
}

function empty(filter) {
  const hint = filter === "all" ? "No jobs yet. Submit one with `noisemill train`, or POST /v1/jobs." : `No ${filter} jobs.`;
  return el("li", { class: "empty" }, hint);
}

function busy(workers) {
  const alive = workers.filter((worker) => !["gone", "stopped"].includes(worker.state));
  if (!alive.length) return "no worker";
  const working = alive.filter((worker) => worker.state === "busy").length;
  return `${alive.length} worker${alive.length > 1 ? "s" : ""}, ${working} busy`;
}

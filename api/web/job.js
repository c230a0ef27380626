// One job: its progress, curves, images, attempts and log, as they happen.

import { buttons } from "./actions.js";
import { follow, get } from "./api.js";
import { Curves, draw } from "./chart.js";
import { ago, badge, bar, bytes, clock, duration, el, line, number, table } from "./dom.js";

const LOG_LENGTH = 300;
const QUEUE_EVERY_MS = 5000;
const IMAGE_KINDS = ["preview", "sheet", "sample"];
const NAMES = { rate: "steps/s" };

export async function showJob(page, id) {
  const path = `/v1/jobs/${id}`;
  const slots = Object.fromEntries(["head", "notice", "curves", "images", "facts", "attempts", "artifacts", "log"].map((name) => [name, el("section", { class: "card", hidden: true })]));
  slots.notice.classList.add("notice");
  page.replaceChildren(
    slots.head, slots.notice,
    el("div", { class: "columns" },
      el("div", { class: "stack" }, slots.images, slots.curves, slots.log),
      el("div", { class: "stack" }, slots.facts, slots.attempts, slots.artifacts)),
  );
  const view = { path, slots, curves: new Curves(), figure: null, artifacts: [], picked: null, log: [], waits: false };
  await refresh(view);
  const late = throttle(() => refresh(view), 700);
  const redraw = throttle(() => { showCurves(view); showLog(view); }, 250);
  // Whoever is before it in the queue makes no event of this job.
  const looking = setInterval(() => { if (view.waits && !document.hidden) late(); }, QUEUE_EVERY_MS);
  await follow(`${path}/events`, (event) => {
    view.curves.add(event);
    if (event.type !== "job.progress") view.log.push(event);
    redraw();
    late();
  });
  clearInterval(looking);
  await refresh(view);
}

async function refresh(view) {
  const job = await get(view.path);
  view.waits = job.queue !== null;
  document.title = `${job.summary} · Noisemill`;
  showHead(view, job);
  showNotice(view, job);
  showFacts(view, job);
  showAttempts(view, job);
  await refreshArtifacts(view);
}

function fill(slot, title, ...children) {
  slot.hidden = false;
  slot.replaceChildren(...(title ? [el("h2", {}, title)] : []), ...children.filter(Boolean));
}

function showHead(view, job) {
  const actions = buttons(job, () => refresh(view), (why) => showRefused(view, why));
  const { figures } = job.progress;
  const numbers = Object.entries(figures).filter(([name]) => name !== "eta_seconds").map(([name, value]) => figure(NAMES[name] ?? name.replaceAll("_", " "), number(value)));
  if (job.state === "running" && figures.eta_seconds) numbers.push(figure("left", duration(figures.eta_seconds)));
  fill(view.slots.head, "",
    el("div", { class: "row" }, el("h1", {}, job.summary), badge(job.state), el("span", { class: "grow" }), ...actions),
    el("p", { class: "soft" }, job.error ? "" : line(job) || "\u00a0"),
    bar(job, "large"),
    el("div", { class: "numbers" }, ...numbers));
}

const figure = (name, value) => el("div", {}, el("b", {}, value), el("span", {}, name));

function showNotice(view, job) {
  view.slots.notice.hidden = !job.error;
  if (!job.error) return;
  const { code, message, causes } = job.error;
  const tries = causes.map((one) => el("li", { value: one.attempt }, `${one.code}: ${one.message}`));
  fill(view.slots.notice, code.replaceAll("_", " "), el("p", {}, message), tries.length > 1 ? el("ol", {}, ...tries) : null);
}

function showRefused(view, why) {
  fill(view.slots.notice, "Not done", el("p", {}, why));
}

function showFacts(view, job) {
  const facts = {
    id: el("code", {}, job.id),
    type: job.type,
    priority: job.priority,
    labels: Object.entries(job.labels).map(([name, value]) => `${name}=${value}`).join(", "),
    created: `${ago(job.created_at)} (${new Date(job.created_at).toLocaleString()})`,
    attempt: `${job.attempt} of at most ${job.max_attempts}`,
    waited: job.metrics.queue_ms !== null ? duration(job.metrics.queue_ms / 1000) : "",
    "device time": job.metrics.device_seconds !== null ? duration(job.metrics.device_seconds) : "",
    took: job.completed_at && job.started_at ? duration((Date.parse(job.completed_at) - Date.parse(job.started_at)) / 1000) : "",
    "retry of": job.retry_of && jobLink(job.retry_of),
    "retried by": job.retried_by && jobLink(job.retried_by),
    needs: Object.keys(job.needs).length && el("span", {}, ...needs(job)),
    reproduces: job.reproduces && jobLink(job.reproduces.job_id),
    reproduction: reproduction(job),
    result: job.result?.model ?? job.result?.dataset ?? "",
  };
  const shown = Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  const spec = el("details", {}, el("summary", { class: "soft" }, "spec"), el("pre", {}, JSON.stringify(job.spec, null, 2)));
  spec.open = view.slots.facts.querySelector("details")?.open ?? false;
  fill(view.slots.facts, "Job", el("dl", { class: "facts" }, ...shown), spec);
}

/** The jobs whose models this one was submitted with, by the fields that named them. */
function needs(job) {
  return Object.entries(job.needs).flatMap(([field, id]) => [`${field}: `, jobLink(id), " "]);
}

/** Whether the job made the bytes of the one that it reproduces, and what of the two runs differs. */
function reproduction(job) {
  const found = job.result?.reproduction;
  if (!found) return job.reproduces?.reproducibility === "none" ? "the first job's bytes cannot be had again, it says" : "";
  const differing = Object.entries(found.differing).map(([name, one]) => `${name} (${JSON.stringify(one.expected)}, now ${JSON.stringify(one.found)})`);
  return found.identical ? "identical" : ["not identical", ...differing].join(", ");
}

const jobLink = (id) => el("a", { href: `/jobs/${id}` }, el("code", {}, id));

function showAttempts(view, job) {
  if (!job.attempts.length) return;
  const rows = job.attempts.map((one) => el("tr", {},
    el("td", {}, String(one.number)), el("td", { title: one.worker }, one.worker.split("@")[0]),
    el("td", {}, badge(one.outcome ?? "running")),
    el("td", {}, one.ended_at ? duration((Date.parse(one.ended_at) - Date.parse(one.started_at)) / 1000) : ago(one.started_at)),
    el("td", { class: "soft" }, one.error ? one.error.code : "")));
  fill(view.slots.attempts, "Attempts", table(["#", "worker", "outcome", "time", ""], rows));
}

async function refreshArtifacts(view) {
  const last = view.artifacts.at(-1)?.id;
  const first = await get(`${view.path}/artifacts?limit=200`);
  if (first.data.at(-1)?.id === last) return;
  view.artifacts = first.data;
  showImages(view);
  const rows = view.artifacts.slice(-40).reverse().map((one) => el("tr", {},
    el("td", {}, el("a", { href: one.url, target: "_blank", rel: "noreferrer" }, one.name)),
    el("td", { class: "soft" }, one.kind), el("td", { class: "soft" }, bytes(one.size_bytes))));
  fill(view.slots.artifacts, `Artifacts (${view.artifacts.length}${first.has_more ? "+" : ""})`, table(["name", "kind", "size"], rows));
}

function showImages(view) {
  const images = view.artifacts.filter((one) => one.media_type.startsWith("image/") && IMAGE_KINDS.includes(one.kind));
  if (!images.length) return;
  const newest = images.findLast((one) => one.kind === "sheet") ?? images.findLast((one) => one.kind === "preview") ?? images[0];
  const shown = images.find((one) => one.id === view.picked) ?? newest;
  const strip = images.slice(-60).map((one) => el("button", {
    title: one.name, "aria-pressed": String(one.id === shown.id),
    onclick: () => { view.picked = one.id === newest.id ? null : one.id; showImages(view); },
  }, picture(one, {})));
  const step = shown.details.step === undefined ? "" : ` · step ${number(shown.details.step)}`;
  const row = el("div", { class: "strip" }, ...strip);
  fill(view.slots.images, "Images", picture(shown, { class: "shown" }), el("p", { class: "soft" }, shown.name + step), row);
  if (!view.picked) row.scrollLeft = row.scrollWidth;
}

/** An image that fetches a fresh link when its own has expired. */
function picture(artifact, attributes) {
  const image = el("img", { ...attributes, src: artifact.url, alt: artifact.name, loading: "lazy" });
  image.addEventListener("error", async () => { image.src = (await get(`/v1/artifacts/${artifact.id}`)).url; }, { once: true });
  return image;
}

function showCurves(view) {
  const names = view.curves.names;
  if (!names.length) return;
  const name = names.includes(view.figure) ? view.figure : names[0];
  const chips = names.map((one) => el("button", {
    class: "chip", "aria-pressed": String(one === name), onclick: () => { view.figure = one; showCurves(view); },
  }, one.replaceAll("_", " ")));
  view.slots.curves.hidden = false;
  const style = getComputedStyle(view.slots.curves);
  const width = view.slots.curves.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  fill(view.slots.curves, "Curves", el("div", { class: "chips" }, ...chips), ...draw(view.curves.figures.get(name), width));
}

function showLog(view) {
  const slot = view.slots.log;
  const before = slot.querySelector(".log");
  const atEnd = !before || before.scrollTop + before.clientHeight > before.scrollHeight - 20;
  const list = el("ul", { class: "log" }, ...view.log.slice(-LOG_LENGTH).map((event) => el("li", {},
    el("span", { class: "soft mono" }, clock(event.created_at)),
    el("span", { class: "soft kind" }, event.type.replace("job.", "")),
    el("span", { class: "said" }, say(event)))));
  fill(slot, "Log", list);
  list.scrollTop = atEnd ? list.scrollHeight : before.scrollTop;
}

function say({ type, data }) {
  if (type === "job.state") return [data.state, data.worker && `by ${data.worker}`, data.error && `${data.error.code}: ${data.error.message}`].filter(Boolean).join(" ");
  if (type === "job.log") return data.message;
  if (type === "job.metric") return `step ${number(data.step)}, ${data.split}: ${Object.entries(data.values).map(([name, value]) => `${name} ${number(value)}`).join(", ")}`;
  return data.name ?? JSON.stringify(data);
}

/** Run at most once per pause, and once more at the end. */
function throttle(act, pause) {
  let timer = null;
  return () => { timer ??= setTimeout(async () => { try { await act(); } finally { timer = null; } }, pause); };
}

// Models: what each name stands for, by which gate its aliases move, and how they were moved.

import { get, Refused } from "./api.js";
import { ago, el, number, table } from "./dom.js";

export async function showModels(page) {
  document.title = "Models · Noisemill";
  const found = await told(page, () => get("/v1/models?limit=200"));
  if (!found) return;
  const rows = found.data.map((model) => el("tr", {},
    el("td", {}, el("a", { href: `/models/${model.name}` }, model.name)),
    el("td", {}, String(model.latest)),
    el("td", { class: "soft" }, model.latest_version?.family ?? ""),
    el("td", { class: "wraps" }, Object.entries(model.aliases).map(([alias, version]) => `${alias}: ${version}`).join(", ")),
    el("td", { class: "soft", title: model.created_at }, ago(model.created_at))));
  const shown = rows.length ? table(["model", "newest", "family", "aliases", "since"], rows) : el("p", { class: "empty" }, "No models yet. Train one with `noisemill train`.");
  page.replaceChildren(el("h1", {}, "Models"), el("section", { class: "card" }, shown));
}

export async function showModel(page, name) {
  document.title = `${name} · Noisemill`;
  const path = `/v1/models/${encodeURIComponent(name)}`;
  const [versions, aliases] = await told(page, () => Promise.all([get(`${path}/versions?limit=50`), get(`${path}/aliases?limit=50`)])) ?? [];
  if (!versions) return;
  const moves = await Promise.all(aliases.data.map((one) => get(`${path}/aliases/${encodeURIComponent(one.alias)}/moves?limit=20`)));
  const rows = versions.data.map((one) => el("tr", {},
    el("td", {}, one.ref), el("td", { class: "soft" }, one.family), el("td", {}, ...job(one.job_id)),
    el("td", { class: "wraps" }, aliases.data.filter((alias) => alias.version === one.version).map((alias) => alias.alias).join(", ")),
    el("td", { class: "soft", title: one.created_at }, ago(one.created_at))));
  page.replaceChildren(
    el("h1", {}, name),
    el("section", { class: "card" }, el("h2", {}, "Versions"), table(["version", "family", "trained by", "aliases", "since"], rows)),
    ...aliases.data.map((alias, place) => card(alias, moves[place].data)),
  );
}

function card(alias, moves) {
  const rows = moves.map((move) => el("tr", {},
    el("td", { title: move.created_at }, ago(move.created_at)),
    el("td", {}, `${move.from_version ?? "–"} → ${move.to_version ?? "–"}`),
    el("td", { class: "soft" }, move.key_hint),
    el("td", { class: "wraps" }, ...move.checks.map((check) => el("div", {}, `${check.reason} `, ...(check.evaluation ? job(check.evaluation) : []))))));
  return el("section", { class: "card" },
    el("h2", { class: "as-is" }, `${alias.ref} is version ${alias.version}`),
    el("p", { class: "soft" }, alias.gate.length ? `Gate: ${alias.gate.map(bound).join(", ")}` : "No gate: it moves to any version."),
    table(["when", "moved", "key", "what it showed"], rows));
}

const job = (id) => [el("a", { href: `/jobs/${id}` }, el("code", {}, `${id.slice(0, 12)}…`))];

function bound({ metric, at_most, at_least, better, dataset }) {
  const where = dataset ? ` on ${dataset}` : "";
  if (at_most !== undefined) return `${metric} ≤ ${number(at_most)}${where}`;
  if (at_least !== undefined) return `${metric} ≥ ${number(at_least)}${where}`;
  return `${metric} no worse${better ? ` (${better} is better)` : ""}${where}`;
}

/** What was asked for; where that was refused, the page says why. */
async function told(page, ask) {
  try {
    return await ask();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    page.replaceChildren(el("p", { class: "empty bad" }, error.message));
    return null;
  }
}

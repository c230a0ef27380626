// Which page this is, and what all pages have.

import { forgetKey } from "./api.js";
import { el } from "./dom.js";
import { showJob } from "./job.js";
import { showList } from "./list.js";
import { showModel, showModels } from "./models.js";

const THEME = "noisemill-theme";

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

setTheme(localStorage.getItem(THEME));
document.getElementById("theme").addEventListener("click", () => {
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark";
  localStorage.setItem(THEME, isDark ? "light" : "dark");
  setTheme(localStorage.getItem(THEME));
});
document.getElementById("forget").addEventListener("click", () => { forgetKey(); location.reload(); });

const flower = document.querySelector('meta[name="flower"]').content;
if (/^https?:\/\//.test(flower)) {
  const link = document.getElementById("flower");
  link.href = flower;
  link.hidden = false;
}

const page = document.getElementById("page");
const [, kind, id] = location.pathname.match(/^\/(jobs|models)(?:\/([^/]+))?$/) ?? [];
const show = kind === "models" ? (id ? showModel : showModels) : (id ? showJob : showList);
Promise.resolve(show(page, id)).catch((error) => {
  page.replaceChildren(el("p", { class: "empty bad" }, error.message));
});

// The two switches of every page: its colours and its language.

import { byId, icon } from "./dom.js";
import { language, say, setLanguage } from "./words.js";

const THEMES = ["system", "light", "dark"];
const THEME = "turbos-theme";
const THEME_ICONS = {
  system: "M10 3a7 7 0 1 0 0 14zM10 3a7 7 0 0 1 0 14",
  light: "M10 6.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7zM10 2v1.5M10 16.5V18M2 10h1.5M16.5 10H18M4.3 4.3l1.1 1.1M14.6 14.6l1.1 1.1M4.3 15.7l1.1-1.1M14.6 5.4l1.1-1.1",
  dark: "M16.5 12.2A7 7 0 0 1 7.8 3.5a7 7 0 1 0 8.7 8.7z",
};

function showTheme() {
  const name = localStorage.getItem(THEME) ?? "system";
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").replaceChildren(icon(THEME_ICONS[name]));
  byId("theme").title = say("theme", { name: say(name) });
  byId("theme").setAttribute("aria-label", byId("theme").title);
}

function nextTheme() {
  const place = THEMES.indexOf(localStorage.getItem(THEME) ?? "system");
  localStorage.setItem(THEME, THEMES[(place + 1) % THEMES.length]);
  showTheme();
}

function showSwitches() {
  byId("language").textContent = language() === "zh" ? "English" : "中文";
  byId("language").lang = language() === "zh" ? "en" : "zh-CN";
  showTheme();
}

/** Show both switches, and let them switch. */
export function wireSwitches() {
  byId("theme").onclick = nextTheme;
  byId("language").onclick = () => setLanguage(language() === "zh" ? "en" : "zh");
  document.addEventListener("language", showSwitches);
  showSwitches();
}

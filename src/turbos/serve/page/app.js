// The page: tabs, theme, language, and which of the views the served model gets.

import { ask, Refusal } from "./api.js";
import { Chat, fit } from "./chat.js";
import { byId, h, trouble } from "./dom.js";
import { Meter } from "./meter.js";
import { Play } from "./play.js";
import { SessionList } from "./sessions.js";
import { wireSwitches } from "./theme.js";
import { say, sayAll, size } from "./words.js";

function showTab(name) {
  for (const tab of document.querySelectorAll("#tabs [role=tab]")) {
    const isShown = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(isShown));
    tab.tabIndex = isShown ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !isShown;
  }
  document.body.dataset.tab = name;
}

function wireTabs() {
  const tabs = [...document.querySelectorAll("#tabs [role=tab]")];
  for (const tab of tabs) tab.onclick = () => showTab(tab.id.slice(4));
  byId("tabs").onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const shown = tabs.filter((tab) => !tab.hidden);
    const next = shown[(shown.indexOf(document.activeElement) + step + shown.length) % shown.length];
    next.focus();
    next.click();
  };
}

function openSide(isOpen) {
  document.body.classList.toggle("side-open", isOpen);
  byId("open-side").setAttribute("aria-expanded", String(isOpen));
  byId("veil").hidden = !isOpen;
  if (isOpen) byId("new").focus();
}

function showFacts(facts) {
  byId("model-name").textContent = facts.model;
  const kv = facts.kv_bytes_per_token;
  const costs = [];
  if (facts.state_bytes) costs.push(say("stateFacts", { state: size(facts.state_bytes) }));
  if (kv) costs.push(say("perThousand", { kv: size(1000 * kv) }));
  byId("model-facts").textContent = costs.join(say("and"));
  byId("model-facts").title = facts.engine.join("\n");
}

function wireComposer(chat, facts) {
  const field = byId("question");
  field.oninput = () => fit(field);
  field.onkeydown = (event) => {
    // Enter that ends the composition of a Chinese word is no wish to send.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("composer").requestSubmit();
    }
    if (event.key === "ArrowUp" && !field.value) [...document.querySelectorAll(".turn.user .edit")].at(-1)?.click();
  };
  for (const dial of document.querySelectorAll("#dial [type=radio]")) {
    dial.disabled = !facts.thinks && dial.value !== "auto";
    dial.onchange = () => {
      byId("budget").hidden = document.querySelector("#dial :checked").value !== "budget";
    };
  }
  byId("dial").hidden = !facts.thinks;
  document.addEventListener("click", (event) => {
    if (!byId("options").contains(event.target)) byId("options").open = false;
  });
}

function showExamples() {
  const example = (text) => {
    const onclick = () => {
      byId("question").value = text;
      byId("composer").requestSubmit();
    };
    return h("button", { type: "button", textContent: text, onclick });
  };
  byId("examples").replaceChildren(...say("examples").map(example));
}

function wireKeys(chat) {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      byId("options").open = false;
      if (document.body.classList.contains("side-open")) openSide(false);
      else if (!event.target.closest(".edit, #sessions")) chat.stop();
    }
    if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      byId("new").click();
    }
  });
}

async function startChat(facts) {
  const list = new SessionList(open, (id) => id === chat.id && start());
  const chat = new Chat(async () => {
    list.current = chat.id;
    await list.refresh();
  });
  const start = () => {
    history.replaceState(null, "", location.pathname + location.search);
    chat.begin();
    list.mark(null);
    openSide(false);
  };
  async function open(id) {
    showTab("chat");
    openSide(false);
    try {
      await chat.open(id);
      history.replaceState(null, "", `#${id}`);
    } catch (error) {
      start();
      trouble("trouble", error instanceof Refusal && error.status === 404 ? say("lost") : error.message);
    }
    list.mark(chat.id);
  }
  byId("new").onclick = () => {
    showTab("chat");
    start();
  };
  byId("tab-chat").hidden = false;
  wireComposer(chat, facts);
  wireKeys(chat);
  document.addEventListener("language", () => {
    list.show();
    chat.show();
    showExamples();
  });
  showExamples();
  showTab("chat");
  await list.refresh();
  const wanted = decodeURIComponent(location.hash.slice(1));
  if (wanted) await open(wanted);
  else start();
  window.addEventListener("hashchange", () => open(decodeURIComponent(location.hash.slice(1))));
}

function startPlay(facts) {
  document.body.classList.add("plays");
  new Play(facts);
  byId("tab-play").hidden = false;
  showTab("play");
}

async function main() {
  sayAll();
  wireSwitches();
  wireTabs();
  byId("open-side").onclick = () => openSide(!document.body.classList.contains("side-open"));
  byId("veil").onclick = () => openSide(false);
  const facts = await ask("GET", "page/api/info");
  showFacts(facts);
  document.addEventListener("language", () => showFacts(facts));
  new Meter();
  if (facts.families.length) startPlay(facts);
  else await startChat(facts);
  document.body.classList.add("ready");
}

main().catch((error) => {
  showTab("chat");
  trouble("trouble", error instanceof Refusal ? error.message : `${say("away")} (${error.message})`);
});

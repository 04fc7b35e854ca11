// The list at the side: conversations that the server keeps, and what can be done with each.

import { ask } from "./api.js";
import { byId, h, icon, svg } from "./dom.js";
import { say } from "./words.js";

const FORK = "M6 4v12M6 12c0-4 8-2 8-7M12 7l2-2.5 2 2.5";
const DOTS = "M5 10h.01M10 10h.01M15 10h.01";

/** Shows the list; `open(id)` is called for one that is chosen, `removed(id)` after one is deleted. */
export class SessionList {
  constructor(open, removed) {
    this.open = open;
    this.removed = removed;
    this.sessions = [];
    this.current = null;
    document.addEventListener("click", (event) => {
      for (const menu of document.querySelectorAll(".session details[open]")) {
        if (!menu.contains(event.target)) menu.open = false;
      }
    });
  }

  /** Ask the server again. */
  async refresh() {
    const answer = await ask("GET", "v1/sessions");
    this.sessions = answer.data ?? answer.sessions ?? answer;
    this.show();
  }

  /** Mark the conversation that is open. */
  mark(id) {
    this.current = id;
    this.show();
  }

  show() {
    byId("sessions").replaceChildren(...this.sessions.map((session) => this.item(session)));
    byId("no-sessions").hidden = this.sessions.length > 0;
    const current = this.sessions.find(({ id }) => id === this.current);
    document.title = current?.title ? `${current.title} · TurboS` : "TurboS";
  }

  item(session) {
    const title = session.title || say("untitled");
    const link = h("a", { href: `#${session.id}`, title }, h("span", { className: "title", textContent: title }));
    if (session.parent) link.prepend(svg("svg", { viewBox: "0 0 20 20", class: "fork", role: "img", "aria-label": say("forked") }, svg("path", { d: FORK })));
    if (session.saved) link.append(h("span", { className: "dot", title: say("saved") }, h("span", { className: "unseen", textContent: say("saved") })));
    if (session.id === this.current) link.setAttribute("aria-current", "page");
    link.onclick = (event) => {
      event.preventDefault();
      this.open(session.id);
    };
    return h("li", { className: "session" }, link, this.menu(session, title));
  }

  menu(session, title) {
    const summary = h("summary", { "aria-label": say("menu", { title }) }, icon(DOTS));
    const details = h("details", {}, summary);
    const entry = (key, act) => {
      const onclick = async () => {
        details.open = false;
        await act();
      };
      return h("button", { type: "button", textContent: say(key), className: key, onclick });
    };
    details.append(
      h("div", { className: "card" },
        entry("rename", () => this.rename(session, link(details))),
        entry("save", () => this.act(session, "POST", "/save")),
        entry("remove", () => this.remove(session, title)),
      ),
    );
    details.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      details.open = false;
      summary.focus();
    };
    return details;
  }

  // The title becomes a field in its place.
  rename(session, place) {
    const field = h("input", { value: session.title ?? "", maxLength: 200, "aria-label": say("renameTo") });
    const done = async (keep) => {
      field.onblur = null;
      if (keep && field.value.trim()) await this.act(session, "PATCH", "", { title: field.value.trim() });
      else this.show();
    };
    field.onblur = () => done(true);
    field.onkeydown = (event) => {
      if (event.key === "Enter") done(true);
      if (event.key === "Escape") done(false);
    };
    place.replaceWith(field);
    field.select();
  }

  async remove(session, title) {
    if (!window.confirm(say("removeSure", { title }))) return;
    await this.act(session, "DELETE", "");
    this.removed(session.id);
  }

  async act(session, method, path, body) {
    await ask(method, `v1/sessions/${session.id}${path}`, body);
    await this.refresh();
  }
}

function link(details) {
  return details.closest("li").querySelector("a");
}

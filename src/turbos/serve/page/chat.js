// The chat: one conversation at a time, kept by the server. What is shown is what the server has.

import { ask, events, Refusal } from "./api.js";
import { announce, byId, h, trouble } from "./dom.js";
import { ModelTurn, userTurn } from "./turns.js";
import { few, say, size } from "./words.js";

/** Shows the conversation `this.id`; `changed()` is called when the list of them is. */
export class Chat {
  constructor(changed) {
    this.changed = changed;
    this.id = null;
    this.turns = [];
    this.running = null;
    byId("composer").onsubmit = (event) => {
      event.preventDefault();
      this.send(byId("question").value);
    };
    byId("stop").onclick = () => this.stop();
    this.keepLowest();
  }

  // Follow the answer down, unless somebody has scrolled up to read.
  keepLowest() {
    const scroll = byId("scroll");
    this.isLow = true;
    scroll.addEventListener("scroll", () => {
      this.isLow = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
    });
    new ResizeObserver(() => this.isLow && this.toEnd()).observe(byId("turns"));
  }

  toEnd() {
    const scroll = byId("scroll");
    scroll.scrollTop = scroll.scrollHeight;
    this.isLow = true;
  }

  /** Begin anew; the conversation comes into being with its first message. */
  begin() {
    this.leave();
    this.id = null;
    this.turns = [];
    this.show();
    this.gauge("");
    byId("question").focus();
  }

  /** Open a conversation of the server's. */
  async open(id) {
    this.leave();
    this.take(await ask("GET", `v1/sessions/${encodeURIComponent(id)}`));
  }

  // Show a session as the server has it.
  take(session) {
    this.id = session.id;
    this.turns = session.turns;
    this.show();
    this.gauge("");
    this.toEnd();
  }

  leave() {
    this.running?.abort();
    this.running = null;
    this.setRunning(false);
    trouble("trouble", "");
  }

  show() {
    const lastAnswer = this.turns.findLastIndex((turn) => turn.role === "assistant");
    byId("turns").replaceChildren(...this.turns.map((turn, place) => this.element(turn, place, place === lastAnswer)));
    // An answer that never came, because the server stopped before its first token, say.
    if (this.turns.at(-1)?.role === "user") byId("turns").append(this.openQuestion());
    byId("welcome").hidden = this.turns.length > 0;
  }

  element(turn, place, isLast) {
    if (turn.role === "assistant") return this.modelTurn(turn, isLast).element;
    if (turn.role === "user") return userTurn(turn, (text) => this.fork(place, text));
    return h("li", { className: "turn other" }, h("pre", { textContent: turn.content }));
  }

  openQuestion() {
    const onclick = () => this.send(null);
    return h("li", { className: "bar" }, h("button", { type: "button", textContent: say("answerThis"), onclick }));
  }

  modelTurn(turn, isLast) {
    return isLast ? new ModelTurn(turn, () => this.undo(), () => this.retry()) : new ModelTurn(turn);
  }

  /** Ask the model; the conversation is made first where there is none. Without a text the last turn is answered. */
  async send(text) {
    if (this.running) return;
    if (text !== null && !text.trim()) return trouble("trouble", say("wanted"));
    trouble("trouble", "");
    // From here on a second Enter finds it running.
    this.running = new AbortController();
    this.setRunning(true);
    if (text !== null) {
      byId("question").value = "";
      fit(byId("question"));
    }
    try {
      await this.ask(text, this.running);
    } catch (error) {
      await this.failed(error, text);
    }
  }

  async ask(text, running) {
    if (this.id === null) {
      const session = await ask("POST", "v1/sessions", {});
      this.id = session.id;
      history.replaceState(null, "", `#${session.id}`);
      await this.changed();
    }
    const coming = this.showComing(text);
    const body = text === null ? settings() : { content: text, ...settings() };
    let finish = null;
    for await (const event of events(`v1/sessions/${this.id}/messages`, body, running.signal)) {
      if (this.running !== running) return;
      if (event.type === "error") throw new Refusal(500, event.message);
      if (event.type === "finish") finish = event;
      this.hear(event, coming);
    }
    await this.over(finish, coming);
  }

  showComing(text) {
    const coming = this.modelTurn(null, true);
    byId("welcome").hidden = true;
    for (const made of document.querySelectorAll(".turn.model .actions :is(.undo, .retry)")) made.remove();
    const place = this.turns.length;
    if (text === null) byId("turns").lastElementChild?.remove();
    else byId("turns").append(userTurn({ content: text }, (changed) => this.fork(place, changed)));
    byId("turns").append(coming.element);
    this.toEnd();
    this.gauge(say("reading"));
    announce(say("answering"));
    this.written = 0;
    this.started = null;
    return coming;
  }

  hear(event, coming) {
    // The first question gives the conversation its title.
    if (event.type === "start") this.changed().catch(() => {});
    else if (event.type === "reasoning") coming.think(event.text, event.tokens);
    else if (event.type === "content") coming.write(event.text);
    else if (event.type === "recast") coming.recast();
    else if (event.type === "tool") coming.call(event.call);
    else if (event.type === "html") coming.showHtml(event.html);
    else if (event.type === "notice") trouble("trouble", event.message);
    if (event.type === "reasoning" || event.type === "content") this.pace();
  }

  // Events come token by token; the exact figure follows at the end.
  pace() {
    this.started ??= performance.now();
    this.written += 1;
    const seconds = (performance.now() - this.started) / 1e3;
    if (seconds > 0.5) this.gauge(say("gaugeWriting", { rate: few((this.written - 1) / seconds) }));
  }

  async over(finish, coming) {
    this.running = null;
    this.setRunning(false);
    coming.end(finish?.reason ?? "error", finish?.detail ?? "");
    announce(say("answered", { text: coming.answer.textContent.slice(0, 600) }));
    if (finish) this.gauge(this.summary(finish));
    await this.reread();
  }

  summary({ usage, tokens_per_second, state_bytes }) {
    return say("gauge", {
      new: usage.prompt_tokens - usage.cached_tokens,
      all: usage.prompt_tokens,
      wrote: usage.completion_tokens,
      rate: tokens_per_second === null ? "–" : few(tokens_per_second),
      state: size(state_bytes),
    });
  }

  // What the server has kept, without drawing again what is on the page already.
  async reread() {
    const session = await ask("GET", `v1/sessions/${this.id}`);
    this.turns = session.turns;
    await this.changed();
  }

  /** End the answer that is coming; what was written so far stays, and its stream says how it ended. */
  async stop() {
    if (this.running && this.id !== null) await this.act(() => ask("POST", `v1/sessions/${this.id}/stop`));
  }

  // What was refused before it began returns to its field; what the server has kept of the rest is shown.
  async failed(error, text) {
    if (error.name === "AbortError") return;
    this.running = null;
    this.setRunning(false);
    this.gauge("");
    const count = this.turns.length;
    if (this.id !== null) await this.reread().catch(() => {});
    this.show();
    trouble("trouble", error instanceof Refusal ? error.message : say("away"));
    if (text && this.turns.length === count) byId("question").value ||= text;
    fit(byId("question"));
  }

  /** Take the last question and its answer back; the question returns to its field. */
  async undo() {
    if (this.running || this.id === null) return;
    await this.act(async () => {
      const session = await ask("POST", `v1/sessions/${this.id}/undo`);
      this.take(session);
      byId("question").value ||= session.undone;
      fit(byId("question"));
      byId("question").focus();
      await this.changed();
    });
  }

  /** Another answer to the last question. */
  async retry() {
    if (this.running || this.id === null) return;
    await this.act(async () => {
      const session = await ask("POST", `v1/sessions/${this.id}/undo`);
      this.take(session);
      await this.send(session.undone);
    });
  }

  /** Go on from before a turn with other words, in a conversation of its own. */
  async fork(place, text) {
    if (this.running || this.id === null) return;
    await this.act(async () => {
      const session = await ask("POST", `v1/sessions/${this.id}/fork`, { turn: place });
      history.replaceState(null, "", `#${session.id}`);
      await this.open(session.id);
      await this.changed();
      await this.send(text);
    });
  }

  async act(work) {
    try {
      await work();
    } catch (error) {
      await this.failed(error, null);
    }
  }

  setRunning(isRunning) {
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    byId("turns").setAttribute("aria-busy", String(isRunning));
  }

  gauge(text) {
    byId("gauge").textContent = text;
  }
}

/** The dial and the options, as the server wants them. */
function settings() {
  const dial = document.querySelector("#dial input:checked").value;
  const found = { thinking: dial === "budget" ? `budget ${byId("budget").value}` : dial };
  if (byId("temperature").value !== "") found.temperature = Number(byId("temperature").value);
  if (byId("longest").value !== "") found.max_tokens = Number(byId("longest").value);
  return found;
}

/** Let a field be as high as its text, up to a part of the window. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, window.innerHeight * 0.4)}px`;
}

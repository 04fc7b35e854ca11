// One turn on the page: what the user said, or what the model thought and wrote, also while it comes.

import { ask } from "./api.js";
import { h, icon, setHtml } from "./dom.js";
import { say } from "./words.js";

const PENCIL = "M4 16l1-4 8-8 3 3-8 8-4 1zM11.5 5.5l3 3";
const SHEETS = "M8 7h8v9H8zM5 13H4V4h8v1";
const AGAIN = "M15.5 10a5.5 5.5 0 1 1-1.7-4M14 3v3h-3";
const BACK = "M8 5L4 9l4 4M4 9h8a4 4 0 0 1 0 8H9";

/** Milliseconds between two looks at an answer that is coming; longer where rendering takes long. */
const LOOK_EVERY = 500;

/** A turn of the user's; `onEdit(text)` is called with the words of a fork. */
export function userTurn(turn, onEdit) {
  const words = h("div", { className: "words", textContent: turn.content });
  const element = h("li", { className: "turn user" }, h("h2", { className: "unseen", textContent: say("you") }), words);
  const edit = button("edit", PENCIL, () => editTurn(element, words, turn.content, onEdit));
  element.append(h("div", { className: "actions" }, edit));
  return element;
}

function button(key, path, onclick) {
  const made = h("button", { type: "button", className: `icon small-icon ${key}`, onclick, title: say(key) }, icon(path));
  made.setAttribute("aria-label", say(key));
  return made;
}

// The words become a field; Escape and Cancel leave them as they were.
function editTurn(element, words, text, onEdit) {
  const field = h("textarea", { value: text, rows: Math.min(8, text.split("\n").length + 1), "aria-label": say("editing") });
  const cancel = h("button", { type: "button", textContent: say("cancel") });
  const go = h("button", { type: "submit", className: "main", textContent: say("saveFork") });
  const form = h("form", { className: "edit" }, field, h("div", { className: "bar" }, cancel, go));
  const close = () => {
    form.replaceWith(words);
    element.classList.remove("editing");
    element.querySelector(".edit")?.focus();
  };
  cancel.onclick = close;
  form.onkeydown = (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  };
  form.onsubmit = (event) => {
    event.preventDefault();
    if (field.value.trim()) onEdit(field.value);
  };
  element.classList.add("editing");
  words.replaceWith(form);
  field.focus();
}

/** A turn of the model's: `turn` is whole, or null for one that is coming. */
export class ModelTurn {
  constructor(turn, onUndo = null, onRetry = null) {
    this.thought = h("div", { className: "thought" });
    this.count = h("span", {});
    this.thinking = h("details", { className: "thinking", hidden: true }, h("summary", {}, this.count), this.thought);
    this.answer = h("div", { className: "answer" });
    this.calls = h("div", { className: "calls" });
    this.note = h("p", { className: "note", hidden: true });
    this.actions = h("div", { className: "actions" });
    this.element = h(
      "li", { className: "turn model" },
      h("h2", { className: "unseen", textContent: say("model") }),
      this.thinking, this.answer, this.calls, this.note, this.actions,
    );
    this.text = "";
    this.onUndo = onUndo;
    this.onRetry = onRetry;
    this.tokens = 0;
    this.isWriting = false;
    if (turn) this.showWhole(turn);
    else this.begin();
  }

  showWhole(turn) {
    this.text = turn.content;
    this.thought.textContent = turn.thinking ?? "";
    this.tokens = turn.thinking_tokens ?? 0;
    setHtml(this.answer, turn.html);
    for (const call of turn.tool_calls ?? []) this.call(call);
    this.end(turn.finish ?? "stop", turn.detail ?? "");
  }

  begin() {
    this.isWriting = true;
    this.element.classList.add("writing");
    this.rendered = 0;
    this.tail = document.createTextNode("");
    this.body = h("div", { className: "body" });
    this.answer.append(this.body, h("span", { className: "tail" }, this.tail));
  }

  /** More thinking; `tokens` is the count so far. */
  think(text, tokens) {
    this.thought.append(text);
    this.tokens = tokens;
    this.thinking.hidden = false;
    this.element.classList.add("is-thinking");
    this.count.textContent = say("isThinking", { n: tokens });
  }

  /** More of the answer. */
  write(text) {
    this.endThinking();
    this.text += text;
    this.tail.data += text;
    this.look();
  }

  /** All that was written so far was thinking. */
  recast() {
    this.thought.append(this.text);
    this.thinking.hidden = false;
    this.text = "";
    this.rendered = 0;
    this.tail.data = "";
    this.body.replaceChildren();
  }

  /** A call of a tool. */
  call(call) {
    this.calls.append(h("pre", { textContent: typeof call === "string" ? call : JSON.stringify(call, null, 2) }));
  }

  endThinking() {
    this.element.classList.remove("is-thinking");
    this.count.textContent = say("thought", { n: this.tokens });
  }

  // Now and then what is there is rendered; what came since stands behind it as plain text.
  look() {
    if (this.looking || !this.isWriting) return;
    this.looking = setTimeout(async () => {
      const text = this.text;
      const start = performance.now();
      try {
        const { html } = await ask("POST", "page/api/render", { text });
        if (this.isWriting && this.text.startsWith(text)) {
          // A line break at its end would be a blank before the tail.
          setHtml(this.body, html.trimEnd());
          this.rendered = text.length;
          this.tail.data = this.text.slice(text.length);
        }
      } catch {
        // The plain text is there, and the end of the answer brings the whole once more.
      }
      this.looking = undefined;
      this.pace = Math.max(LOOK_EVERY, 4 * (performance.now() - start));
      if (this.text.length > this.rendered) this.look();
    }, this.pace ?? LOOK_EVERY);
  }

  /** The whole answer as HTML. */
  showHtml(html) {
    this.isWriting = false;
    setHtml(this.answer, html);
  }

  /** It is over: "stop", "length", "cancelled" or "error". */
  end(finish, reason = "") {
    this.isWriting = false;
    clearTimeout(this.looking);
    this.element.classList.remove("writing", "is-thinking");
    this.thinking.hidden = !this.thought.textContent;
    this.endThinking();
    const words = { length: say("cut"), cancelled: say("stopped"), error: say("failed") }[finish] ?? "";
    this.note.textContent = reason ? `${words}: ${reason}` : words;
    this.note.hidden = !words;
    this.actions.replaceChildren(button("copy", SHEETS, (event) => this.copy(event.currentTarget)));
    if (this.onRetry) this.actions.append(button("retry", AGAIN, this.onRetry));
    if (this.onUndo) this.actions.append(button("undo", BACK, this.onUndo));
  }

  async copy(made) {
    await navigator.clipboard.writeText(this.text);
    made.title = say("copied");
    made.classList.add("done");
    setTimeout(() => made.classList.remove("done"), 1200);
  }
}

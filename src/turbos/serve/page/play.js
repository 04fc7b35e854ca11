// The play tab: a problem of a family that the model knows, answered three ways side by side.

import { events, Refusal } from "./api.js";
import { announce, byId, h, trouble } from "./dom.js";
import { few, say } from "./words.js";

const TITLES = { auto: "modeAuto", on: "modeOn", off: "modeOff" };

/** Draws problems and shows the answers. */
export class Play {
  constructor(facts) {
    this.families = facts.families;
    this.modes = facts.modes;
    this.running = null;
    this.resetScore();
    byId("family").replaceChildren(...this.families.map(({ name }) => h("option", { value: name, textContent: name.replaceAll("_", " ") })));
    byId("family").onchange = () => {
      this.showLevels();
      this.deal();
    };
    byId("level").onchange = () => this.deal();
    byId("game").onsubmit = (event) => {
      event.preventDefault();
      this.deal();
    };
    document.addEventListener("language", () => this.sayAll());
    this.showLevels();
    this.showHands();
    this.sayAll();
    this.deal();
  }

  // Right answers of each mode, of one family at one level.
  resetScore() {
    this.score = { of: "", games: 0, auto: 0, on: 0, off: 0 };
  }

  sayAll() {
    byId("only").textContent = say("only", { n: this.families.length });
    this.showLevels(byId("level").value);
    for (const hand of this.hands.values()) hand.sayTitle();
    this.showScore();
  }

  showLevels(chosen) {
    const family = this.families.find(({ name }) => name === byId("family").value);
    const levels = Array.from({ length: family.levels }, (_, level) => level);
    const option = (level) => {
      const words = say(family.trained.includes(level) ? "trained" : "level", { n: level + 1 });
      return h("option", { value: String(level), textContent: words });
    };
    byId("level").replaceChildren(...levels.map(option));
    byId("level").value = chosen && Number(chosen) < family.levels ? chosen : String(family.trained[0] ?? 0);
  }

  showHands() {
    this.hands = new Map(this.modes.map((mode) => [mode, new Hand(mode)]));
    byId("hands").replaceChildren(...[...this.hands.values()].map((hand) => hand.element));
  }

  /** Another problem. */
  async deal() {
    this.running?.abort();
    const running = (this.running = new AbortController());
    trouble("play-trouble", "");
    this.showHands();
    const body = { family: byId("family").value, level: Number(byId("level").value) };
    if (this.score.of !== `${body.family}/${body.level}`) this.resetScore();
    this.score.of = `${body.family}/${body.level}`;
    this.showScore();
    try {
      for await (const event of events("page/api/play", body, running.signal)) {
        // The last of a game that was given up must not land in the next one.
        if (this.running !== running) return;
        this.take(event);
      }
      if (this.running !== running) return;
      this.score.games += 1;
      this.showScore();
    } catch (error) {
      if (this.running !== running) return;
      trouble("play-trouble", error instanceof Refusal ? error.message : say("away"));
    }
  }

  take(event) {
    if (event.type === "error") throw new Refusal(500, event.message);
    if (event.type === "problem") {
      byId("problem").textContent = event.question;
      byId("problem").dataset.seed = event.seed;
      return;
    }
    const hand = this.hands.get(event.mode);
    if (event.type === "judged") {
      hand.judge(event);
      if (event.verdict === "pass") this.score[event.mode] += 1;
    } else hand.take(event);
  }

  showScore() {
    const { games } = this.score;
    for (const [mode, hand] of this.hands) {
      hand.tally.textContent = games ? say("tally", { right: this.score[mode], games }) : "";
    }
  }
}

/** One mode's answer. */
class Hand {
  constructor(mode) {
    this.mode = mode;
    this.heading = h("h2");
    this.tally = h("span", { className: "tally" });
    this.verdict = h("span", { className: "verdict" });
    this.thought = h("div", { className: "thought" });
    this.answer = h("div", { className: "said" });
    this.counts = h("p", { className: "quiet" });
    this.element = h(
      "article", { className: `hand ${mode}` },
      h("div", { className: "hand-head" }, this.heading, this.tally, this.verdict),
      this.thought, this.answer, this.counts,
    );
    this.sayTitle();
  }

  sayTitle() {
    this.heading.textContent = say(TITLES[this.mode]);
  }

  take({ type, text }) {
    this.element.classList.add("writing");
    if (type === "reasoning") {
      this.thought.append(text);
      this.thought.scrollTop = this.thought.scrollHeight;
    } else if (type === "content") this.answer.append(text);
    else {
      this.thought.append(this.answer.textContent);
      this.answer.textContent = "";
    }
  }

  judge({ verdict, reason, right, thinking_tokens, answer_tokens, seconds }) {
    this.element.classList.remove("writing");
    this.element.classList.add(verdict);
    const words = say({ pass: "right", fail: "wrong" }[verdict] ?? "unjudged");
    this.verdict.textContent = words;
    this.counts.textContent = say("counts", { thinking: thinking_tokens, answer: answer_tokens, seconds: few(seconds) });
    if (verdict === "fail") {
      const more = reason === "the turn was not ended" ? `${say("unended")}. ` : "";
      this.counts.append(h("span", { className: "truth", textContent: ` ${more}${say("rightAnswer", { answer: right })}` }));
    }
    announce(`${this.heading.textContent}: ${words}`);
  }
}

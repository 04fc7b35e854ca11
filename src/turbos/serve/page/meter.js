// The meter tab: what a text costs this model and its attention twin.

import { ask, Refusal } from "./api.js";
import { byId, h, svg, trouble } from "./dom.js";
import { few, say, size } from "./words.js";

const LENGTHS = [null, 2048, 8192, 32768, 131072];
const WIDTH = 640;
const HEIGHT = 190;
const EDGE = { left: 58, right: 12, top: 10, bottom: 26 };

/** Reads the text's length and shows what the server measured. */
export class Meter {
  constructor() {
    this.found = null;
    byId("lengths").append(...LENGTHS.map((tokens) => this.choice(tokens)));
    byId("metering").onsubmit = (event) => {
      event.preventDefault();
      this.measure();
    };
    document.addEventListener("language", () => {
      byId("lengths").querySelector("span").textContent = say("asPasted");
      if (this.found) this.show(this.found);
    });
  }

  choice(tokens) {
    const words = tokens === null ? say("asPasted") : `${tokens / 1024}k`;
    const input = h("input", { type: "radio", name: "tokens", value: tokens ?? "", checked: tokens === null });
    return h("label", {}, input, h("span", { textContent: words }));
  }

  /** Ask the server; it measures for a second or a few. */
  async measure() {
    const chosen = document.querySelector("#lengths input:checked").value;
    const text = byId("text").value;
    trouble("meter-trouble", "");
    if (!chosen && !text) return trouble("meter-trouble", say("wanted"));
    const made = byId("measure");
    made.disabled = true;
    made.textContent = say("measuring");
    try {
      const body = chosen ? { text, tokens: Number(chosen) } : { text };
      this.found = await ask("POST", "page/api/meter", body);
      this.show(this.found);
    } catch (error) {
      trouble("meter-trouble", error instanceof Refusal ? error.message : say("away"));
    }
    made.disabled = false;
    made.textContent = say("measure");
  }

  show({ text_tokens, tokens, model, twin }) {
    const pasted = text_tokens && text_tokens !== tokens ? `${say("pastedTokens", { n: text_tokens.toLocaleString() })} ` : "";
    const shown = [
      h("h2", { textContent: `${pasted}${say("atTokens", { n: tokens.toLocaleString() })}` }),
      table(tokens, model, twin),
    ];
    if (twin) shown.push(chart(tokens, model, twin));
    else shown.push(h("p", { className: "quiet", textContent: say("noTwin") }));
    byId("readings").replaceChildren(...shown);
  }
}

function table(tokens, model, twin) {
  const models = twin ? [model, twin] : [model];
  const head = h("tr", {}, h("td"), ...models.map((_, place) => h("th", { scope: "col", textContent: say(place ? "twin" : "thisModel") })));
  const memory = row("memory", models.map((one) => [size(one.bytes), held(tokens, one)]));
  const time = row("perToken", models.map((one) => [one.ms_per_token === null ? "–" : `${few(one.ms_per_token)} ms`, one.ms_per_token === null ? say("unmeasured") : ""]));
  if (twin) {
    memory.append(h("td", { className: "gain", textContent: say("less", { n: few(twin.bytes / model.bytes) }) }));
    time.append(h("td", { className: "gain", textContent: gain(model.ms_per_token, twin.ms_per_token) }));
    head.append(h("td"));
  }
  return h("table", { className: "readings" }, h("thead", {}, head), h("tbody", {}, memory, time));
}

function row(key, cells) {
  const cell = ([figure, note]) => h("td", {}, h("strong", { textContent: figure }), h("small", { textContent: note }));
  return h("tr", {}, h("th", { scope: "row", textContent: say(key) }), ...cells.map(cell));
}

function held(tokens, one) {
  return say("held", { state: size(one.state_bytes), kv: size(tokens * one.kv_bytes_per_token) });
}

function gain(ours, theirs) {
  if (ours === null || theirs === null) return "";
  const times = theirs / ours;
  return times >= 1 ? say("faster", { n: few(times) }) : say("slower", { n: few(ours / theirs) });
}

// Memory over length, both axes linear, so that what grows is seen to grow.
function chart(tokens, model, twin) {
  const longest = Math.max(tokens * 1.25, 1024);
  const most = Math.max(bytesAt(model, longest), bytesAt(twin, longest));
  const x = (count) => EDGE.left + (count / longest) * (WIDTH - EDGE.left - EDGE.right);
  const y = (bytes) => HEIGHT - EDGE.bottom - (bytes / most) * (HEIGHT - EDGE.top - EDGE.bottom);
  const line = (one, name) => svg("path", { class: name, d: `M${x(0)} ${y(bytesAt(one, 0))}L${x(longest)} ${y(bytesAt(one, longest))}` });
  const dot = (one, name) => svg("circle", { class: name, cx: x(tokens), cy: y(bytesAt(one, tokens)), r: 4.5 });
  const words = (at, up, anchor, text) => svg("text", { x: at, y: up, "text-anchor": anchor }, text);
  return svg(
    "svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": say("chart") },
    svg("path", { class: "axis", d: `M${x(0)} ${y(most)}V${y(0)}H${x(longest)}` }),
    svg("path", { class: "grid", d: `M${x(0)} ${y(most / 2)}H${x(longest)}M${x(0)} ${y(most)}H${x(longest)}` }),
    svg("path", { class: "here", d: `M${x(tokens)} ${y(0)}V${y(most)}` }),
    line(twin, "twin"), line(model, "own"), dot(twin, "twin"), dot(model, "own"),
    words(EDGE.left - 8, y(most) + 4, "end", size(most)), words(EDGE.left - 8, y(most / 2) + 4, "end", size(most / 2)),
    words(EDGE.left - 8, y(0) + 4, "end", "0"),
    words(x(tokens), HEIGHT - 8, "middle", `${tokens.toLocaleString()} ${say("tokensAxis")}`),
    words(x(longest * 0.55), y(bytesAt(twin, longest * 0.55)) - 10, "end", say("twin")),
    words(x(longest), y(bytesAt(model, longest)) - 10, "end", say("thisModel")),
  );
}

function bytesAt(one, tokens) {
  return one.state_bytes + tokens * one.kv_bytes_per_token;
}

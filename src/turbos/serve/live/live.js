// The live page: asks every few seconds what the run is doing, and draws what has changed.

import { announce, byId, h, trouble } from "../page/dom.js";
import { wireSwitches } from "../page/theme.js";
import { language, learn, say, sayAll } from "../page/words.js";
import { chart, legend, ticks } from "./charts.js";
import { CHINESE, ENGLISH } from "./live-words.js";

const EVERY = 2500;
const LOOKS = ["own", "second", "third"];
const CURVES = {
  "pretrain loss": ["pretrainLoss", "lossUnit"], "sft loss": ["sftLoss", "lossUnit"],
  "rl reward": ["rlReward", "rewardUnit"], "rl length": ["rlLength", "lengthUnit"],
};
const FIGURES = {
  loss: "trainingLoss", "held_out_loss/think": "heldOutThink", "held_out_loss/short": "heldOutShort",
  reward: "reward", thinking_tokens: "thinkingTokens", completion_tokens: "completionTokens",
};
const STAGES = ["fetch", "tokenizer", "pretrain", "sft", "rl", "report"];

let run = null;
let chosen = null;
let isAway = false;
const drawn = new Map();

// Draw a part again only if what it shows has changed, so that a selection in it stays.
function redraw(name, facts, draw) {
  const text = JSON.stringify([facts, language()]);
  if (drawn.get(name) === text) return;
  drawn.set(name, text);
  draw();
}

function stageName(name) {
  const [first, second] = name.split(" ");
  const known = (one) => (STAGES.includes(one) || one === "evaluate" ? say(one) : one);
  return second ? `${known(first)}: ${known(second)}` : known(first);
}

function time(seconds) {
  return seconds < 90 ? say("seconds", { n: Math.round(seconds) }) : say("minutes", { n: (seconds / 60).toFixed(1) });
}

function percent(share) {
  return `${Math.round(100 * share)}%`;
}

function showStatus() {
  byId("model-name").textContent = run.run;
  const running = run.stages.find(({ state }) => state === "running");
  const spent = time(run.seconds);
  if (run.state === "done") byId("status").textContent = say("doneStatus", { spent });
  else if (!running) byId("status").textContent = say("waiting");
  else byId("status").textContent = say("runningStatus", { stage: stageName(running.name), spent, left: time(run.seconds_left) });
  byId("ready").hidden = !run.model;
}

function stageItem(stage) {
  // What an exam is about its place says; a screen reader hears it in full.
  const isExam = stage.name.startsWith("evaluate ");
  const bar = h("progress", { max: 1, "aria-label": stageName(stage.name) });
  if (stage.share !== null) bar.value = stage.share;
  else if (stage.state === "waiting") bar.value = 0;
  else bar.value = Math.min(0.95, stage.seconds / Math.max(1, 60 * stage.minutes));
  const facts = [];
  if (stage.state === "running" && stage.steps) facts.push(say("stepOf", { step: stage.step, steps: stage.steps }));
  else if (stage.state === "waiting") facts.push(say("expected", { time: time(60 * stage.minutes) }));
  else facts.push(time(stage.seconds));
  const item = h("li", { className: stage.state }, h("span", { textContent: isExam ? say("evaluate") : stageName(stage.name), title: stageName(stage.name) }), bar, h("small", { textContent: facts.join(" · ") }));
  if (stage.state === "running") item.setAttribute("aria-current", "step");
  return item;
}

function range(series) {
  const values = series.flatMap(({ points }) => points.map(([, value]) => value));
  // The first steps of a loss are far above the rest; they may leave the picture.
  const sorted = [...values].sort((one, other) => one - other);
  const high = sorted[Math.floor(0.985 * (sorted.length - 1))];
  const marks = ticks(Math.min(0, sorted[0]), high);
  const step = marks.length > 1 ? marks[1] - marks[0] : 1;
  return [marks[0], Math.max(high, marks.at(-1) + (high > marks.at(-1) ? step : 0))];
}

function figure(title, unit, ...content) {
  const caption = h("figcaption", {}, h("strong", { textContent: title }), h("small", { textContent: unit }));
  return h("figure", {}, caption, ...content);
}

function curve({ stage, title, steps, series }) {
  const [titleKey, unitKey] = CURVES[`${stage} ${title}`];
  const name = say(titleKey);
  const found = series.filter(({ points }) => points.length);
  if (!found.length) return figure(name, say(unitKey), h("p", { className: "quiet none", textContent: say("nothingYet") }));
  const lines = found.map(({ name, points }, place) => ({ look: LOOKS[place % LOOKS.length], points, dots: place > 0 && points.length < 20, name }));
  const last = lines[0].points.at(-1)[1];
  const picture = chart({
    label: say("curveChart", { title: name, last: last.toPrecision(3) }), width: 440, height: 196, series: lines,
    across: [0, steps ?? lines[0].points.at(-1)[0]], up: title === "reward" ? [0, 1] : range(found), axis: say("stepAxis"), percent: title === "reward",
  });
  const words = (one) => (FIGURES[one.name] ? say(FIGURES[one.name]) : one.name);
  const lastOf = (one) => (title === "reward" ? percent(one.points.at(-1)[1]) : Number(one.points.at(-1)[1].toPrecision(3)));
  return figure(name, say(unitKey), picture, legend(lines.map((one) => [one.look, `${words(one)} ${lastOf(one)}`])));
}

function showCurves() {
  byId("curves").replaceChildren(...run.curves.map(curve));
}

// Stages that have left something of a kind, in order, and the one of them that is shown.
function stagesOf(found) {
  const stages = STAGES.filter((name) => found[name]?.length);
  return { stages, shown: stages.includes(chosen) ? chosen : stages.at(-1) };
}

// A choice of the stage to show; what is chosen holds for all parts of the page.
function pills(id, stages, shown) {
  const pill = (name) => {
    const onchange = () => {
      chosen = name;
      show();
    };
    return h("label", {}, h("input", { type: "radio", name: id, value: name, checked: name === shown, onchange }), h("span", { textContent: say(name) }));
  };
  const inputs = [...byId(id).querySelectorAll("input")];
  const isSame = inputs.map(({ value }) => value).join() === stages.join() && byId(id).dataset.language === language();
  // The same buttons stay, so that the keyboard keeps its place.
  if (isSame) for (const input of inputs) input.checked = input.value === shown;
  else byId(id).replaceChildren(byId(id).querySelector("legend"), ...stages.map(pill));
  byId(id).dataset.language = language();
  byId(id).hidden = !stages.length;
}

function notYet() {
  return h("p", { className: "quiet none", textContent: say("afterPretrain", { stage: say("pretrain") }) });
}

function showThinking() {
  const { stages, shown } = stagesOf(run.thinking);
  pills("thinking-of", stages, shown);
  if (!shown) return byId("thinking").replaceChildren(notYet());
  const families = [...new Set(run.thinking[shown].map(({ family }) => family))];
  byId("thinking").replaceChildren(...families.map((family) => thinkingFigure(family, run.thinking[shown].filter((one) => one.family === family))));
}

function thinkingFigure(family, rates) {
  const isTrained = ([at]) => run.trained.includes(`${family}/${at - 1}`) || run.trained.includes(family);
  const points = (name) => rates.filter((one) => typeof one[name] === "number").map((one) => [one.level + 1, one[name]]);
  const thinks = points("rate");
  const right = points("accuracy");
  const name = family.replaceAll("_", " ");
  const names = rates.map(({ level, thinking_tokens }) => [String(level + 1), String(Math.round(thinking_tokens ?? 0))]);
  const picture = chart({
    label: say("thinksChart", { family: name, thinks: thinks.map(([, rate]) => percent(rate)).join(", ") }), width: 190, height: 175,
    series: [{ look: "second", points: right, dots: true }, { look: "own", points: thinks, dots: true, rings: thinks.filter(isTrained) }],
    across: [0.6, rates.length + 0.4], up: [0, 1], names, beside: ["", say("shortTokens")], axis: "", percent: true,
  });
  return figure(name, "", picture, legend([["own", say("thinks")], ["second", say("reward")]]));
}

function showScores() {
  const { stages } = stagesOf(run.scores);
  if (!stages.length) return byId("scores").replaceChildren(notYet());
  const keys = [...new Set(stages.flatMap((name) => run.scores[name].map(({ family, level, mode }) => `${family}/${level} ${mode}`)))].sort(byFamily);
  const head = h("tr", {}, h("th", { scope: "col", textContent: say("problems") }), h("th", { scope: "col", textContent: say("thinking") }));
  head.append(...stages.map((name) => h("th", { scope: "col", className: "figure", textContent: say(name) })));
  const rows = keys.map((key, place) => scoreRow(key, keys[place - 1], stages));
  byId("scores").replaceChildren(h("table", { className: "scores" }, h("thead", {}, head), h("tbody", {}, ...rows)));
}

// The modes of a family stand together, families in the order in which they were measured.
function byFamily(one, other) {
  const order = run.families;
  const place = (key) => order.indexOf(key.split(" ")[0]);
  return place(one) - place(other);
}

function scoreRow(key, before, stages) {
  const [problem, mode] = key.split(" ");
  const isFirst = before?.split(" ")[0] !== problem;
  const [family, level] = problem.split("/");
  const name = h("th", { scope: "row" }, family.replaceAll("_", " "), h("small", { textContent: say("levelOf", { n: Number(level) + 1 }) }));
  const row = h("tr", { className: isFirst ? "first" : "" }, name, h("td", { textContent: say(mode === "on" ? "onMode" : "offMode") }));
  if (!isFirst) name.className = "repeated";
  for (const stage of stages) {
    const found = run.scores[stage].find((one) => `${one.family}/${one.level} ${one.mode}` === key);
    row.append(scoreCell(found, mode));
  }
  return row;
}

function scoreCell(score, mode) {
  if (!score || typeof score.accuracy !== "number") return h("td", { className: "figure", textContent: "–" });
  // A number's picture: a screen reader has the number.
  const bar = h("progress", { max: 1, value: score.accuracy, "aria-hidden": "true" });
  const text = h("strong", { textContent: `${(100 * score.accuracy).toFixed(0)} ± ${(100 * (score.stderr ?? 0)).toFixed(0)}` });
  const tokens = mode === "on" ? say("tokensOf", { n: Math.round(score.thinking_tokens ?? 0) }) : "";
  return h("td", { className: "figure" }, text, bar, h("small", { textContent: tokens }));
}

function showSamples() {
  const { stages, shown } = stagesOf(run.samples);
  pills("samples-of", stages, shown);
  byId("samples").replaceChildren(...(shown ? run.samples[shown].map(sample) : [notYet()]));
}

function sample({ question, right, answers }) {
  const head = h("p", { className: "problem" }, question, h("small", { textContent: say("rightIs", { answer: right }) }));
  return h("article", { className: "sample" }, head, h("div", { className: "pair" }, ...answers.map(hand)));
}

function hand({ mode, thinking, content, verdict }) {
  const words = say({ pass: "right", fail: "wrong" }[verdict] ?? "unjudged");
  return h(
    "div", { className: `hand ${verdict}` },
    h("div", { className: "hand-head" }, h("h3", { textContent: say(mode === "on" ? "thinkingOn" : "thinkingOff") }), h("span", { className: "verdict", textContent: words })),
    h("div", { className: "thought", textContent: thinking.trim() }),
    h("div", { className: "said", textContent: content.trim() || say("silent") }),
  );
}

function show() {
  if (!run) return;
  showStatus();
  redraw("plan", run.stages, () => byId("plan").replaceChildren(...run.stages.map(stageItem)));
  redraw("curves", run.curves, showCurves);
  redraw("thinking", [run.thinking, run.trained, chosen], showThinking);
  redraw("scores", run.scores, showScores);
  redraw("samples", [run.samples, chosen], showSamples);
}

function tellDone(before) {
  const was = new Map(before?.stages.map(({ name, state }) => [name, state]));
  const over = run.stages.filter(({ name, state }) => state === "done" && was.get(name) && was.get(name) !== "done");
  if (over.length) announce(over.map(({ name }) => say("stageDone", { stage: stageName(name) })).join(" "));
}

function showAway() {
  trouble("trouble", isAway ? say(run?.state === "done" ? "ended" : "gone") : "");
  if (isAway) byId("ready").hidden = true;
}

async function look() {
  try {
    const answer = await fetch("api/run");
    if (!answer.ok) throw new Error(answer.statusText);
    const before = run;
    run = await answer.json();
    isAway = false;
    show();
    tellDone(before);
  } catch {
    isAway = true;
  }
  showAway();
}

async function watch() {
  for (;;) {
    // Nobody looks at a hidden page, and the run has better things to do.
    if (!document.hidden) await look();
    document.body.classList.add("ready");
    await new Promise((resolve) => setTimeout(resolve, EVERY));
  }
}

learn(ENGLISH, CHINESE);
sayAll();
wireSwitches();
document.addEventListener("language", () => {
  show();
  showAway();
});
document.addEventListener("visibilitychange", () => document.hidden || look());
watch();

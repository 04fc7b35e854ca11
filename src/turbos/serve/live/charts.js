// Line charts as SVG: made by calls, so that no style and no script stands inline.

import { h, svg } from "../page/dom.js";

const EDGE = { left: 40, right: 12, top: 10, bottom: 34 };
const SMOOTH_FROM = 60;

/** Round numbers from `low` to `high`, some four of them. */
export function ticks(low, high) {
  const span = high - low || 1;
  const rough = span / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * span; n += 1) found.push(Number((n * step).toPrecision(12)));
  return found;
}

// Means over a fortieth of the curve: what a noisy one is about.
function smooth(points) {
  const half = Math.max(1, Math.round(points.length / 60));
  return points.map(([step], place) => {
    const near = points.slice(Math.max(0, place - half), place + half + 1);
    return [step, near.reduce((sum, [, value]) => sum + value, 0) / near.length];
  });
}

// A curve that begins above the picture is drawn from where it enters it.
function path(all, x, y, high) {
  const points = all.slice(Math.max(0, all.findIndex(([, value]) => value <= high)));
  return points.map(([at, value], place) => `${place ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

/**
 * A chart of `series` ({ look, points, dots, rings }), x over `across` and y over `up` (both [low, high]).
 * `names` are texts (lines of them) at x = 1, 2 ...; without them the ticks are numbers.
 * `beside` says what those lines are.
 */
export function chart({ label, width, height, series, across, up, names, beside, axis, percent }) {
  const x = (at) => EDGE.left + ((at - across[0]) / (across[1] - across[0] || 1)) * (width - EDGE.left - EDGE.right);
  const y = (value) => height - EDGE.bottom - ((Math.min(Math.max(value, up[0]), up[1]) - up[0]) / (up[1] - up[0] || 1)) * (height - EDGE.top - EDGE.bottom);
  const words = (at, high, anchor, text) => svg("text", { x: at, y: high, "text-anchor": anchor }, text);
  const parts = [];
  for (const tick of ticks(...up)) {
    parts.push(svg("path", { class: "grid", d: `M${EDGE.left} ${y(tick)}H${width - EDGE.right}` }));
    parts.push(words(EDGE.left - 7, y(tick) + 4, "end", percent ? `${Math.round(100 * tick)}%` : String(tick)));
  }
  const places = names ? names.map((texts, place) => [place + 1, ...texts]) : ticks(...across).map((tick) => [tick, tick.toLocaleString()]);
  for (const [at, ...texts] of places) texts.forEach((text, line) => parts.push(words(x(at), height - EDGE.bottom + 16 + 14 * line, "middle", text)));
  (beside ?? []).forEach((text, line) => parts.push(words(0, height - EDGE.bottom + 16 + 14 * line, "start", text)));
  parts.push(words((EDGE.left + width - EDGE.right) / 2, height - 3, "middle", axis));
  parts.push(svg("path", { class: "axis", d: `M${EDGE.left} ${y(up[0])}H${width - EDGE.right}` }));
  for (const { look, points, dots, rings } of series) {
    const isNoisy = points.length >= SMOOTH_FROM;
    if (isNoisy) parts.push(svg("path", { class: `${look} pale`, d: path(points, x, y, up[1]) }));
    parts.push(svg("path", { class: look, d: path(isNoisy ? smooth(points) : points, x, y, up[1]) }));
    if (dots || points.length === 1) for (const [at, value] of points) parts.push(svg("circle", { class: `${look} dot`, cx: x(at), cy: y(value), r: 2.5 }));
    for (const [at, value] of rings ?? []) parts.push(svg("circle", { class: `${look} ring`, cx: x(at), cy: y(value), r: 6 }));
  }
  return svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label }, ...parts);
}

/** Which line is which: pairs of a look and a text. */
export function legend(entries) {
  const swatch = (look) => svg("svg", { class: "chart swatch", viewBox: "0 0 18 8", "aria-hidden": "true" }, svg("path", { class: look, d: "M1 4H17" }));
  return h("p", { className: "legend" }, ...entries.map(([look, text]) => h("span", {}, swatch(look), text)));
}

// Making and finding elements. HTML from the server enters the document through `setHtml` alone; all other text is text.

/** The element of an id that the page has. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found;
}

/** A new element: `h("button", { type: "button", onclick: go }, "Go")`. Properties with a dash are attributes. */
export function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value);
    else element[key] = value;
  }
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** A new SVG element with attributes. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A small drawing for a button: the lines of one path. */
export function icon(path) {
  return svg("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, svg("path", { d: path }));
}

// The browser takes HTML from this policy only (see the server's Content-Security-Policy).
const policy = window.trustedTypes
  ? window.trustedTypes.createPolicy("turbos", { createHTML: (html) => html })
  : { createHTML: (html) => html };

/** Show HTML that the server has sanitised. */
export function setHtml(element, html) {
  element.innerHTML = policy.createHTML(html);
}

/** Say something to a screen reader. */
export function announce(text) {
  byId("announce").textContent = text;
}

/** Show a mistake in one of the page's alerts; an empty text hides it. */
export function trouble(id, text) {
  const place = byId(id);
  place.textContent = text;
  place.hidden = !text;
}

// Talking with the server: JSON, and events that stream. A key that the server wants is asked for once per tab.

import { byId } from "./dom.js";

const KEY = "turbos-key";

/** What the server refused, in its own words. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Addresses are beside the page's own, so that a proxy may serve it under a path.
function address(path) {
  return new URL(path.replace(/^\//, ""), new URL(".", document.baseURI));
}

async function send(method, path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal };
  const answer = await fetch(address(path), options);
  if (answer.status === 401 && (await askForKey())) return send(method, path, body, signal);
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

async function refusal(answer) {
  let message = `${answer.status} ${answer.statusText}`;
  try {
    const found = await answer.json();
    message = found.error?.message ?? found.detail ?? message;
  } catch {
    // A proxy's own page of an error is no JSON; the status has to do.
  }
  return new Refusal(answer.status, String(message));
}

let asking = null;

// Several requests may be refused at once; they share one question.
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const field = byId("key");
    field.value = "";
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue === "ok" && field.value) sessionStorage.setItem(KEY, field.value);
      resolve(dialog.returnValue === "ok" && Boolean(field.value));
      dialog.returnValue = "";
    };
    dialog.showModal();
  });
  return asking;
}

/** A request with an answer in JSON; null where there is none. */
export async function ask(method, path, body) {
  const answer = await send(method, path, body);
  const text = await answer.text();
  return text ? JSON.parse(text) : null;
}

/** The events of a stream, until its end; `signal` lets it go. */
export async function* events(path, body, signal) {
  const answer = await send("POST", path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const event = read(part);
      if (event === null) return;
      if (event !== undefined) yield event;
    }
  }
}

// One event; null for the last, undefined for a comment that keeps the line open.
function read(part) {
  const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
  if (!data.length) return undefined;
  const text = data.join("\n");
  return text === "[DONE]" ? null : JSON.parse(text);
}

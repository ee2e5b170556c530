// Calls of the server that this page came from, and of no other: addresses are relative to the page.

import { local } from "./dom.js";

/** A call that failed. `status` is 0 where the server was not reached; `retryAfter` counts seconds. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }

  get needsKey() {
    return this.status === 401 || this.status === 403;
  }
}

export const key = {
  get: () => local.read("key", ""),
  set: (value) => local.write("key", value.trim()),
};

/** A call whose answer is fine; raises `ApiError` for any other, and an AbortError when `signal` says so. */
export async function call(path, { method = "GET", body, signal, keepalive } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    const text = body === undefined ? undefined : JSON.stringify(body);
    answer = await fetch(path, { method, headers, body: text, signal, keepalive, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(`The server at ${location.host} cannot be reached. Is it still running?`);
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

/** The JSON of an answer. */
export async function callJson(path, options) {
  const answer = await call(path, options);
  return answer.status === 204 ? null : answer.json();
}

async function failure(answer) {
  let message = "";
  try {
    const body = await answer.json();
    message = errorText(body);
  } catch {
    // Not JSON: something between here and the server has answered.
  }
  const seconds = Number(answer.headers.get("Retry-After"));
  return new ApiError(message || `The server answered ${answer.status} ${answer.statusText}.`, {
    status: answer.status,
    retryAfter: answer.status === 429 && seconds > 0 ? seconds : null,
  });
}

/** What an error body says. */
export function errorText(body) {
  const text = String(body?.error?.message ?? body?.error ?? body?.detail ?? "").trim();
  return text && text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

/** The data of each server-sent event of an answer. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

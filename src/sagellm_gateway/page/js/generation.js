// One answer: asks for it, and adds to it what comes.

import { ApiError, call, errorText, events } from "./api.js";

// Messages that came closer together than this came as one: their distance says nothing about the model.
const MEASURABLE_MS = 25;

/** An answer before its first word. */
export const emptyAnswer = (model) => ({ role: "assistant", content: "", model });

/**
 * Fill `answer` until it is complete or `signal` stops it; `changed()` is called for every change, `makeBody()` makes
 * the request. True for an answer that is whole. Never raises: what went wrong is in `answer.error`. Times are
 * milliseconds as this page sees them, the network included.
 */
export async function generate(answer, makeBody, signal, changed) {
  const began = performance.now();
  const timing = { began, first: null, last: null };
  try {
    const body = { ...(await makeBody()), stream: true, stream_options: { include_usage: true } };
    signal.throwIfAborted();
    timing.began = performance.now();
    const response = await call("v1/chat/completions", { method: "POST", signal, body });
    let isComplete = false;
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        isComplete = true;
        break;
      }
      add(answer, JSON.parse(data), timing);
      changed();
    }
    if (!isComplete) throw new ApiError("The connection broke before the answer was complete.");
  } catch (error) {
    if (error.name === "AbortError") answer.finish_reason = "stopped";
    else
      answer.error = {
        message: error.message,
        needsKey: Boolean(error.needsKey),
        retryAfter: error.retryAfter ?? null,
      };
  }
  finish(answer, timing);
  changed();
  return !answer.error && answer.finish_reason !== "stopped";
}

function add(answer, chunk, timing) {
  if (chunk.error) throw new ApiError(errorText(chunk) || "The server failed on this answer.");
  if (chunk.usage) answer.usage = { prompt: chunk.usage.prompt_tokens, completion: chunk.usage.completion_tokens };
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
  if (content || reasoning || calls) {
    timing.last = performance.now();
    timing.first ??= timing.last;
    answer.ttft_ms ??= timing.first - timing.began;
    // One message is one token or a few: near enough until the server says how many they were.
    answer.pieces = (answer.pieces ?? 0) + 1;
    answer.rate = rate(answer.pieces, timing);
  }
  if (reasoning) {
    answer.reasoning = (answer.reasoning ?? "") + reasoning;
    answer.reasoning_ms = timing.last - timing.began;
  }
  if (content) answer.content += content;
  for (const part of calls ?? []) addCall(answer, part);
  if (choice.finish_reason) answer.finish_reason = choice.finish_reason;
}

function addCall(answer, part) {
  answer.tool_calls ??= [];
  const known = (answer.tool_calls[part.index] ??= {
    id: part.id,
    type: "function",
    function: { name: "", arguments: "" },
  });
  known.function.name += part.function?.name ?? "";
  known.function.arguments += part.function?.arguments ?? "";
}

function finish(answer, timing) {
  answer.rate = rate(answer.usage?.completion ?? answer.pieces ?? 0, timing);
  answer.total_ms = performance.now() - timing.began;
}

/** Tokens a second after the first; null where that cannot be told. */
function rate(tokens, { first, last }) {
  const elapsed = last - first;
  return tokens > 1 && elapsed >= MEASURABLE_MS ? ((tokens - 1) * 1000) / elapsed : null;
}

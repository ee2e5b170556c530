// How one message looks: a question, an answer with what belongs to it, or what a tool returned.

import { versionsOf } from "./chats.js";
import { announce, copyButton, h, icon, iconButton } from "./dom.js";
import { count, figure, plural, seconds } from "./format.js";
import { Markdown, codeBlock, markdown } from "./markdown.js";

const ENDS = {
  length: "Cut off at the limit of tokens; raise “Max tokens” in the settings for longer answers.",
  stopped: "Stopped.",
  abort: "The server ended this answer early.",
  content_filter: "Held back by a filter.",
};

/** A question; `actions.edit(message, text)` asks it anew. */
export class QuestionView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = h("article", {
      class: `turn ${message.role}`,
      "aria-label": message.role === "tool" ? "Tool result" : "You",
    });
    this.update();
  }

  update() {
    const { content, role } = this.message;
    if (role === "tool") {
      this.element.replaceChildren(
        h(
          "div",
          { class: "tool-result" },
          h("span", { class: "label" }, "Tool result"),
          h("pre", { tabindex: "0" }, content),
        ),
      );
      return;
    }
    const actions = h(
      "div",
      { class: "actions" },
      iconButton("edit", "Edit and ask again", () => this.edit()),
      copyButton("Copy question", () => content),
    );
    this.element.replaceChildren(h("div", { class: "bubble", dir: "auto" }, content), actions);
  }

  edit() {
    const field = h("textarea", {
      class: "edit-field",
      "aria-label": "Edit your message",
      value: this.message.content,
      rows: "1",
    });
    const fit = () => fitHeight(field, 320);
    const cancel = () => (this.update(), this.element.querySelector("button").focus());
    const submit = () => field.value.trim() && this.actions.edit(this.message, field.value.trim());
    field.addEventListener("input", fit);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        submit();
      }
    });
    const buttons = h(
      "div",
      { class: "edit-buttons" },
      h("button", { type: "button", class: "quiet", onclick: cancel }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: submit }, "Ask again"),
    );
    this.element.replaceChildren(h("div", { class: "edit" }, field, buttons));
    fit();
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

/** An answer that may still grow. `actions`: regenerate(), show(place), answerTools(results), openKey(). */
export class AnswerView {
  #reasoning = null;
  #shownReasoning = "";

  constructor(message, actions, { isRunning, isLast }) {
    this.message = message;
    this.actions = actions;
    this.prose = h("div", { class: "prose", dir: "auto" });
    this.markdown = new Markdown(this.prose);
    this.above = h("div", { class: "above" });
    this.calls = h("div", { class: "calls" });
    this.notes = h("div", { class: "notes" });
    this.foot = h("footer", { class: "foot" });
    this.element = h(
      "article",
      { class: "turn assistant", "aria-label": "Answer" },
      this.above,
      this.prose,
      this.calls,
      this.notes,
      this.foot,
    );
    this.update({ isRunning, isLast });
  }

  update({ isRunning, isLast }) {
    const { message } = this;
    this.element.classList.toggle("running", isRunning);
    this.element.setAttribute("aria-busy", String(isRunning));
    const isSilent = isRunning && !message.content && !message.reasoning && !message.tool_calls;
    this.element.classList.toggle("silent", isSilent);
    this.#updateReasoning(isRunning);
    if (isRunning) this.markdown.update(message.content);
    else this.markdown.finish(message.content);
    this.#updateCalls(isRunning, isLast);
    this.notes.replaceChildren(...(isRunning ? [] : this.#noteElements(isLast)));
    this.foot.replaceChildren(...this.#footElements(isRunning, isLast));
  }

  #updateReasoning(isRunning) {
    const { reasoning, reasoning_ms: ms, content } = this.message;
    if (!reasoning) return;
    if (!this.#reasoning) {
      const summary = h("summary");
      const body = h("div", { class: "prose thought", dir: "auto" });
      this.#reasoning = { summary, markdown: new Markdown(body) };
      this.above.append(h("details", { class: "reasoning" }, summary, body));
    }
    const isThinking = isRunning && !content;
    this.#reasoning.summary.textContent = isThinking ? "Thinking…" : `Thought for ${seconds(ms ?? 0)}`;
    this.#reasoning.summary.classList.toggle("thinking", isThinking);
    if (reasoning !== this.#shownReasoning) this.#reasoning.markdown.update((this.#shownReasoning = reasoning));
  }

  #updateCalls(isRunning, isLast) {
    const { tool_calls: calls } = this.message;
    if (!calls?.length) return;
    const cards = calls.map((call) =>
      h(
        "section",
        { class: "call", "aria-label": `Call of ${call.function.name}` },
        h("div", { class: "call-head" }, icon("tool"), h("span", { class: "call-name" }, call.function.name)),
        codeBlock(pretty(call.function.arguments), "json"),
      ),
    );
    this.calls.replaceChildren(...cards);
    if (!isRunning && isLast) this.calls.append(this.#toolForm(calls));
  }

  /** The person at the page is the one who runs the tools. */
  #toolForm(calls) {
    const fields = calls.map((call) =>
      h("textarea", {
        rows: "2",
        required: true,
        "aria-label": `Result of ${call.function.name}`,
        placeholder: `What ${call.function.name} returned`,
      }),
    );
    const submit = (event) => {
      event.preventDefault();
      this.actions.answerTools(
        calls.map((call, index) => ({ role: "tool", tool_call_id: call.id, content: fields[index].value })),
      );
    };
    return h(
      "form",
      { class: "tool-form", onsubmit: submit },
      fields,
      h(
        "button",
        { class: "primary" },
        plural(calls.length, "result").replace(/^1 /, "Send ").replace(/^(\d)/, "Send $1"),
      ),
    );
  }

  #noteElements(isLast) {
    const { error, finish_reason: reason, content, tool_calls: calls, reasoning } = this.message;
    const notes = [];
    if (error) notes.push(this.#errorElement(error, isLast));
    else if (ENDS[reason]) notes.push(h("p", { class: "note" }, ENDS[reason]));
    else if (!content && !calls && !reasoning && reason)
      notes.push(h("p", { class: "note" }, "The model ended its answer without a word."));
    return notes;
  }

  #errorElement(error, isLast) {
    const wait = error.retryAfter ? ` Try again in ${plural(error.retryAfter, "second")}.` : "";
    const box = h("div", { class: "failure", role: "alert" }, h("p", {}, error.message + wait));
    const button = (label, run) => h("button", { type: "button", class: "link", onclick: run }, label);
    if (error.needsKey) box.append(button("Enter an API key", this.actions.openKey));
    else if (isLast) box.append(button("Try again", this.actions.regenerate));
    return box;
  }

  #footElements(isRunning, isLast) {
    const { message, actions } = this;
    const stats = h("span", { class: "stats" }, statsText(message));
    if (isRunning) return [stats];
    const parts = [];
    const all = versionsOf(message);
    const place = message.place ?? 0;
    if (all.length > 1) {
      parts.push(
        h(
          "span",
          { class: "versions", role: "group", "aria-label": "Answers to this question" },
          iconButton("left", "Previous answer", () => actions.show(message, place - 1), {
            disabled: !isLast || place === 0,
          }),
          h("span", {}, `${place + 1} / ${all.length}`),
          iconButton("right", "Next answer", () => actions.show(message, place + 1), {
            disabled: !isLast || place === all.length - 1,
          }),
        ),
      );
    }
    if (message.content) parts.push(copyButton("Copy answer", () => message.content));
    const offersAgain = message.error && !message.error.needsKey;
    if (isLast && !offersAgain) parts.push(iconButton("redo", "Answer again", actions.regenerate));
    return [h("div", { class: "actions" }, parts), stats];
  }
}

function statsText(message) {
  const tokens = message.usage?.completion ?? message.pieces;
  if (!tokens) return "";
  const parts = [plural(tokens, "token")];
  if (message.rate) parts.push(`${figure(message.rate)} tokens/s`);
  if (message.ttft_ms !== undefined) parts.push(`first after ${seconds(message.ttft_ms)}`);
  return parts.join(" · ");
}

/** What a screen reader says when an answer is complete. */
export function announceAnswer(message) {
  const text = markdown(message.content)
    .map((element) => element.textContent)
    .join("\n");
  announce(
    message.error
      ? message.error.message
      : `Answer: ${text.slice(0, 2000) || "empty"}. ${count(message.usage?.completion ?? 0)} tokens.`,
  );
}

/** Let a field be as high as its text, up to `limit` pixels. */
export function fitHeight(field, limit) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, limit)}px`;
  field.style.overflowY = field.scrollHeight > limit ? "auto" : "hidden";
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // still being written
  }
}

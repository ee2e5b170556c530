// The chat that is shown: its messages, the field below them, and the answers that are being written.

import { versionsOf, withVersion } from "./chats.js";
import { $, announce, h, icon, toast } from "./dom.js";
import { emptyAnswer, generate } from "./generation.js";
import { AnswerView, QuestionView, announceAnswer, fitHeight } from "./message.js";

const MAX_FIELD_PX = 240;
const NEAR_END_PX = 48;

const isTouch = matchMedia("(pointer: coarse)");

export class Conversation {
  session = null;
  #chats;
  #settings;
  #model;
  #started;
  #views = [];
  #runs = new Map(); // session -> AbortController of the answer that it is getting
  #isFollowing = true;
  #isPainting = false;

  /** `model()` is what to ask; `started(session)` is told when a chat gets its first message. */
  constructor({ chats, settings, model, started }) {
    this.#chats = chats;
    this.#settings = settings;
    this.#model = model;
    this.#started = started;
    this.#listen();
  }

  get isRunning() {
    return this.#runs.has(this.session);
  }

  isRunningIn(id) {
    return [...this.#runs.keys()].some((session) => session.id === id);
  }

  /** Show a chat. */
  show(session) {
    this.session = session;
    this.#render();
    this.#follow();
    if (!isTouch.matches) $("input").focus();
  }

  stop() {
    this.#runs.get(this.session)?.abort();
  }

  /** Ask what stands in the field; while an answer is written, stop it. */
  submit() {
    const text = $("input").value.trim();
    if (this.isRunning) this.stop();
    else if (text) this.ask(text);
  }

  ask(text) {
    if (!this.#add([{ role: "user", content: text }])) return;
    $("input").value = "";
    fitHeight($("input"), MAX_FIELD_PX);
    this.#paintComposer();
  }

  editLastQuestion() {
    this.#views.findLast((view) => view.message.role === "user")?.edit();
  }

  // ---- what the messages' buttons do

  #actions = {
    edit: (message, text) => {
      const { session } = this;
      const sampling = this.#sampling();
      if (!sampling) return;
      this.#end(session);
      const before = [...session.messages];
      this.#cut(session, before.indexOf(message));
      const numLost = before.length - session.messages.length - 2;
      session.messages.push({ role: "user", content: text });
      this.#answer(session, sampling, []);
      if (numLost > 0)
        toast("The messages after this one were removed.", {
          label: "Undo",
          run: () => this.#restore(session, before),
        });
    },
    regenerate: () => {
      const { session } = this;
      const sampling = this.#sampling();
      if (!sampling) return;
      const [earlier] = this.#cut(session, session.messages.length - 1);
      // An answer that failed before its first word is not worth keeping.
      const all = versionsOf(earlier).filter((answer) => answer.content || answer.tool_calls);
      this.#answer(session, sampling, all);
    },
    show: (message, place) => {
      const { session } = this;
      const [shown] = this.#cut(session, session.messages.indexOf(message));
      session.messages.push(withVersion(versionsOf(shown), place));
      this.#render();
      this.#save(session);
    },
    answerTools: (results) => this.#add(results),
    openKey: () => this.#settings.open("key"),
  };

  /** Take the messages from `place` on out. */
  #cut(session, place) {
    const removed = session.messages.splice(place);
    this.#chats.store.diverged(session, removed);
    return removed;
  }

  #restore(session, messages) {
    this.#end(session);
    this.#chats.store.diverged(
      session,
      messages.slice(messages.findIndex((message, index) => message !== session.messages[index])),
    );
    session.messages = messages;
    this.#save(session);
    if (session === this.session) this.#render();
  }

  /** Stop the answer that the session is getting, for it will not be wanted. */
  #end(session) {
    this.#runs.get(session)?.abort();
    this.#runs.delete(session);
  }

  // ---- answers

  /** Add messages and have them answered; false where the settings do not allow it. */
  #add(messages) {
    const sampling = this.#sampling();
    if (!sampling) return false;
    this.session.messages.push(...messages);
    this.#answer(this.session, sampling, []);
    return true;
  }

  #sampling() {
    try {
      return this.#settings.sampling();
    } catch (error) {
      toast(error.message);
      this.#settings.open("more");
      return null;
    }
  }

  async #answer(session, sampling, earlier) {
    const model = this.#model();
    const answer = withVersion([...earlier, emptyAnswer(model)], earlier.length);
    session.messages.push(answer);
    const controller = new AbortController();
    this.#runs.set(session, controller);
    this.#render();
    this.#follow();
    announce("Answering");
    await this.#save(session);
    this.#started(session);
    const makeBody = async () => ({ model, ...sampling, ...(await this.#chats.store.request(session)) });
    const isWhole = await generate(answer, makeBody, controller.signal, () => this.#paint(session));
    if (this.#runs.get(session) === controller) this.#runs.delete(session);
    if (session === this.session) this.#render({ keepLast: true });
    // It may have been taken back or deleted meanwhile.
    if (!session.messages.includes(answer)) return;
    if (session === this.session) announceAnswer(answer);
    this.#chats.store.settled(session, isWhole);
    if (this.#chats.has(session)) await this.#save(session);
  }

  async #save(session) {
    try {
      await this.#chats.save(session);
    } catch (error) {
      toast(`This chat could not be saved. ${error.message}`);
    }
  }

  // ---- what is seen

  #render({ keepLast = false } = {}) {
    const messages = this.session.messages;
    const old = new Map(this.#views.map((view) => [view.message, view]));
    this.#views = messages.map((message, index) => {
      const state = this.#stateOf(index);
      const known = old.get(message);
      if (known && (keepLast || message.role !== "assistant")) {
        known.update(state);
        return known;
      }
      return message.role === "assistant"
        ? new AnswerView(message, this.#actions, state)
        : new QuestionView(message, this.#actions);
    });
    $("transcript").replaceChildren(...this.#views.map((view) => view.element));
    $("welcome").hidden = messages.length > 0;
    this.#paintComposer();
    if (this.#isFollowing) this.#scrollToEnd();
  }

  #stateOf(index) {
    const isLast = index === this.session.messages.length - 1;
    return { isLast, isRunning: isLast && this.isRunning };
  }

  /** Show what came, once a frame. */
  #paint(session) {
    if (this.#isPainting || session !== this.session) return;
    this.#isPainting = true;
    requestAnimationFrame(() => {
      this.#isPainting = false;
      if (session !== this.session || !this.isRunning) return;
      this.#views.at(-1)?.update(this.#stateOf(this.#views.length - 1));
      if (this.#isFollowing) this.#scrollToEnd();
    });
  }

  #paintComposer() {
    const send = $("send");
    const label = this.isRunning ? "Stop" : "Send";
    if (send.getAttribute("aria-label") !== label || !send.firstChild) {
      send.setAttribute("aria-label", label);
      send.title = this.isRunning ? "Stop (Esc)" : "Send (Enter)";
      send.replaceChildren(icon(this.isRunning ? "stop" : "send"));
    }
    send.classList.toggle("stop", this.isRunning);
    send.disabled = !this.isRunning && !$("input").value.trim();
  }

  #follow() {
    this.#isFollowing = true;
    this.#scrollToEnd();
  }

  #scrollToEnd() {
    const scroller = $("scroller");
    scroller.scrollTop = scroller.scrollHeight;
  }

  #listen() {
    const input = $("input");
    const scroller = $("scroller");
    input.addEventListener("input", () => {
      fitHeight(input, MAX_FIELD_PX);
      this.#paintComposer();
    });
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter" && !event.shiftKey && !isTouch.matches) {
        event.preventDefault();
        if (!this.isRunning) this.submit();
      } else if (event.key === "ArrowUp" && !input.value && !this.isRunning) {
        event.preventDefault();
        this.editLastQuestion();
      }
    });
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    scroller.addEventListener("scroll", () => {
      const rest = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
      this.#isFollowing = rest < NEAR_END_PX;
      $("to-end").hidden = this.#isFollowing;
    });
    $("to-end").append(icon("down"));
    $("to-end").addEventListener("click", () => this.#follow());
    // A field or a picture that appears must not push the end out of sight.
    new ResizeObserver(() => this.#isFollowing && this.#scrollToEnd()).observe(scroller);
  }
}

/** What an empty chat shows. */
export function welcome({ model, error, retry, openKey, ask }) {
  if (error) {
    const button = error.needsKey
      ? h("button", { type: "button", class: "primary", onclick: openKey }, "Enter an API key")
      : h("button", { type: "button", class: "primary", onclick: retry }, "Try again");
    return [
      h("h2", {}, error.needsKey ? "This server asks for a key" : "No connection"),
      h("p", { class: "lead", role: "alert" }, error.message),
      button,
    ];
  }
  const starters = [
    "Explain in three sentences how a KV cache makes inference faster.",
    "Write a Python function that merges two sorted lists.",
    "Draft a short note that thanks a colleague for a careful review.",
  ];
  return [
    h("h2", {}, "What is on your mind?"),
    h(
      "p",
      { class: "lead" },
      model ? `${model.id} answers` : "",
      model?.max_model_len ? `, with ${model.max_model_len.toLocaleString("en")} tokens of context.` : ".",
    ),
    h(
      "ul",
      { class: "starters" },
      starters.map((text) => h("li", {}, h("button", { type: "button", onclick: () => ask(text) }, text))),
    ),
  ];
}

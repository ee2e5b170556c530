// Chats that the server keeps (`/sessions`): it adds each question and its answer by itself, so that a request brings
// only what is new. A message that the server is known to hold has `kept`. Wherever the two may differ, after an error,
// a stop or an edit, the session is `unsure`: the next request first cuts the server's back to what is known to be the
// same. What the server does not keep, the figures of an answer and those it replaced, is in this browser's storage.

import { callJson } from "./api.js";
import { newSession, toApi } from "./chats.js";
import { LocalSessions } from "./local_sessions.js";

const PAGE = 100;
const MAX_PAGES = 10;
const MAX_TITLE = 200;

const pathOf = (id) => `sessions/${encodeURIComponent(id)}`;

export class ServerSessions {
  #copies = new LocalSessions("server.");

  get listName() {
    return this.#copies.listName;
  }

  async list() {
    const entries = [];
    let after = "";
    for (let page = 0; page < MAX_PAGES; page++) {
      const { data, has_more: hasMore, last_id: last } = await callJson(`sessions?limit=${PAGE}${after}`);
      entries.push(...data.map(({ id, title, updated_at: updated }) => ({ id, title, updated: updated * 1000 })));
      if (!hasMore) break;
      after = `&after=${encodeURIComponent(last)}`;
    }
    return entries;
  }

  async load(id) {
    try {
      return merged(await callJson(pathOf(id)), await this.#copies.load(id));
    } catch (error) {
      if (error.status === 404) return null;
      throw error;
    }
  }

  async save(session) {
    const title = session.title.slice(0, MAX_TITLE);
    if (!session.onServer) {
      await callJson("sessions", { method: "POST", body: { id: session.id, ...(title && { title }) } });
      session.onServer = { title, system: "" };
    } else if (title && title !== session.onServer.title) {
      await callJson(pathOf(session.id), { method: "PATCH", body: { title } });
      session.onServer.title = title;
    }
    await this.#copies.save(session);
  }

  async add(session) {
    const title = session.title.slice(0, MAX_TITLE);
    const body = { id: session.id, ...(title && { title }), messages: toApi(session) };
    await callJson("sessions", { method: "POST", body });
    session.onServer = { title, system: session.system };
    this.settled(session, true);
    await this.#copies.save(session);
  }

  async remove(id) {
    await callJson(pathOf(id), { method: "DELETE" });
    await this.#copies.remove(id);
  }

  async request(session) {
    const { id, onServer, system, messages } = session;
    if (!onServer) return { messages: toApi(session) };
    // The server replaces a system prompt, but only by another.
    const isUnprompted = onServer.system && !system;
    const known = isUnprompted ? 0 : numKnown(messages);
    if (session.unsure || isUnprompted) {
      const keep =
        known && messages.slice(0, known).filter((message) => !isEmpty(message)).length + (onServer.system ? 1 : 0);
      try {
        await callJson(`${pathOf(id)}/clear`, { method: "POST", body: { keep } });
      } catch (error) {
        if (error.status !== 404) throw error;
        return this.#beginAgain(session);
      }
    }
    return { session_id: id, messages: toApi({ system, messages: messages.slice(known) }) };
  }

  /** The session has expired, or was deleted elsewhere: make it anew, and send all of it. */
  async #beginAgain(session) {
    session.onServer = null;
    this.diverged(session, session.messages);
    await this.save(session);
    return { session_id: session.id, messages: toApi(session) };
  }

  settled(session, isWhole) {
    session.unsure = !isWhole;
    if (!isWhole || !session.onServer) return;
    session.onServer.system = session.system;
    for (const message of session.messages) message.kept = true;
  }

  diverged(session, messages) {
    session.unsure = true;
    for (const message of messages) message.kept = false;
  }
}

// An answer without a word is not kept.
const isEmpty = (message) => message.role === "assistant" && !message.content && !message.tool_calls;

/** How many messages from the first on the server holds as well; the one to be answered is sent in any case. */
function numKnown(messages) {
  const first = messages.findIndex((message) => !message.kept && !isEmpty(message));
  const last = messages.findLastIndex((message) => !isEmpty(message));
  return first < 0 ? last : Math.min(first, last);
}

/** What the server has, with what `copy` knows besides. */
function merged({ id, title, created_at: created, updated_at: updated, messages }, copy) {
  const systems = messages.filter((message) => message.role === "system");
  const said = messages.filter((message) => message.role !== "system");
  const known = (copy?.messages ?? []).filter((message) => !isEmpty(message));
  const isSame = (message, index) =>
    known[index]?.role === message.role && (known[index].content || null) === (message.content || null);
  const system = systems.map((message) => textOf(message.content)).join("\n\n");
  const session = newSession({
    id,
    title,
    system,
    created: created * 1000,
    updated: updated * 1000,
    onServer: { title, system },
  });
  session.messages = said.map((message, index) =>
    isSame(message, index) ? { ...known[index], kept: true } : fromServer(message),
  );
  // A turn that failed is here alone; what the server once had and has no longer was taken out elsewhere.
  const rest = said.every(isSame) ? known.slice(said.length) : [];
  if (rest.length && rest.every((message) => !message.kept)) {
    session.messages.push(...rest);
    session.unsure = true;
  }
  return session;
}

function fromServer({ role, content, reasoning_content: reasoning, tool_calls: calls, tool_call_id: callId }) {
  return {
    role,
    content: textOf(content),
    kept: true,
    ...(reasoning && { reasoning }),
    ...(calls && { tool_calls: calls }),
    ...(callId && { tool_call_id: callId }),
  };
}

const textOf = (content) =>
  typeof content === "string" ? content : (content ?? []).map((part) => part.text ?? "").join("\n");

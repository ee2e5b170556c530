// The chats that the page knows, wherever they are kept.

const randomId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const TITLE_CHARACTERS = 60;

/** A chat before its first message; `save` makes it last. Times are milliseconds since 1970. */
export function newSession(fields = {}) {
  const now = Date.now();
  return { id: randomId(), title: "", created: now, updated: now, system: "", messages: [], ...fields };
}

/** A title from the first thing that was asked. */
export function titleOf(session) {
  const first = session.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > TITLE_CHARACTERS ? `${line.slice(0, TITLE_CHARACTERS - 1).trimEnd()}…` : line;
}

/** The messages of a session as the API takes them: without what is only for the eye. */
export function toApi({ system, messages }) {
  const said = system ? [{ role: "system", content: system }] : [];
  for (const { role, content, tool_calls: calls, tool_call_id: id } of messages) {
    if (role !== "assistant") said.push({ role, content, ...(id && { tool_call_id: id }) });
    else if (content || calls) said.push({ role, content: content || null, ...(calls && { tool_calls: calls }) });
  }
  return said;
}

/**
 * `store` keeps chats: `list`, `load`, `save`, `add` (as a whole, e.g. from a file), `remove`; `request(session)` gives
 * the fields of a chat request for what is new, `settled(session, isWhole)` hears how that ended, and
 * `diverged(session, messages)` that messages were taken out. `changed()` is called when the list changes.
 */
export class Chats {
  entries = []; // {id, title, updated}, latest first
  store;
  #open = new Map(); // id -> session; one object a chat, so that an answer goes on where nobody looks
  #changed;

  constructor(store, changed) {
    this.store = store;
    this.#changed = changed;
  }

  async refresh() {
    this.entries = (await this.store.list()).sort((a, b) => b.updated - a.updated);
    this.#changed();
  }

  async open(id) {
    const session = this.#open.get(id) ?? (await this.store.load(id));
    if (session) this.#open.set(id, session);
    return session;
  }

  async save(session) {
    session.updated = Date.now();
    session.title ||= titleOf(session);
    this.#open.set(session.id, session);
    await this.store.save(session);
    await this.refresh();
  }

  async rename(id, title) {
    const session = await this.open(id);
    session.title = title;
    await this.store.save(session);
    await this.refresh();
  }

  async remove(...ids) {
    for (const id of ids) {
      this.#open.delete(id);
      await this.store.remove(id);
    }
    await this.refresh();
  }

  /** Every chat as a whole. */
  async all() {
    const sessions = [];
    for (const entry of this.entries) sessions.push(await this.open(entry.id));
    return sessions.filter(Boolean);
  }

  /** Keep chats that came as a whole. */
  async add(sessions) {
    for (const session of sessions) await this.store.add(session);
    await this.refresh();
  }

  has(session) {
    return this.entries.some((entry) => entry.id === session.id);
  }
}

/** All answers to one question, in their order: the one shown and those it replaced. */
export function versionsOf({ others = [], place = 0, ...own }) {
  const all = [...others];
  all.splice(place, 0, own);
  return all;
}

/** The answer `place` of `all`, which carries the others with it. */
export const withVersion = (all, place) =>
  all.length === 1 ? all[0] : Object.assign(all[place], { others: all.filter((_, index) => index !== place), place });

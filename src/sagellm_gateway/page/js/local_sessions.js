// Chats in this browser's storage, one entry each.

import { toApi } from "./chats.js";
import { local } from "./dom.js";

export class LocalSessions {
  #list;
  #entry;

  /** `prefix` keeps several sets apart. */
  constructor(prefix = "") {
    this.#list = `${prefix}sessions`;
    this.#entry = (id) => `${prefix}session.${id}`;
  }

  /** The name under which the list is stored. */
  get listName() {
    return this.#list;
  }

  async list() {
    return local.read(this.#list, []);
  }

  async load(id) {
    return local.read(this.#entry(id));
  }

  async save(session) {
    const others = (await this.list()).filter((entry) => entry.id !== session.id);
    const { id, title, updated } = session;
    const isKept =
      local.write(this.#entry(id), session) && local.write(this.#list, [...others, { id, title, updated }]);
    if (!isKept) throw new Error("This browser's storage is full or blocked; export or delete chats.");
  }

  async add(session) {
    await this.save(session);
  }

  async remove(id) {
    local.write(
      this.#list,
      (await this.list()).filter((entry) => entry.id !== id),
    );
    local.remove(this.#entry(id));
  }

  async request(session) {
    return { messages: toApi(session) };
  }

  settled() {}

  diverged() {}
}

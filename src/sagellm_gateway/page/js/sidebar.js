// The list of chats, with what can be done to each.

import { exportText, markdownText } from "./chat_files.js";
import { $, download, h, icon, iconButton, openMenu, toast } from "./dom.js";
import { day } from "./format.js";

const ENOUGH_TO_SEARCH = 8;

const isNarrow = matchMedia("(max-width: 52rem)");

export class Sidebar {
  #chats;
  #go;
  #current = null;
  #isRunningIn;

  /** `go(id)` opens a chat, `go(null)` a new one. */
  constructor({ chats, go, isRunningIn }) {
    this.#chats = chats;
    this.#go = go;
    this.#isRunningIn = isRunningIn;
    $("new-chat").prepend(icon("plus"));
    $("to-dashboard").prepend(icon("chart"));
    $("open-sidebar").append(icon("menu"));
    $("close-sidebar").append(icon("close"));
    $("new-chat").addEventListener("click", () => go(null));
    $("find").addEventListener("input", () => this.paint());
    $("open-sidebar").addEventListener("click", () => this.toggle());
    $("close-sidebar").addEventListener("click", () => this.toggle(false));
    $("scrim").addEventListener("click", () => this.toggle(false));
    $("sidebar").addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !isNarrow.matches) return;
      event.stopPropagation();
      this.toggle(false);
    });
    isNarrow.addEventListener("change", () => this.toggle(!isNarrow.matches, { focus: false }));
    this.toggle(!isNarrow.matches, { focus: false });
  }

  toggle(isOpen = $("sidebar").inert, { focus = true } = {}) {
    $("sidebar").inert = !isOpen;
    $("scrim").hidden = !(isOpen && isNarrow.matches);
    $("open-sidebar").setAttribute("aria-expanded", String(isOpen));
    document.body.classList.toggle("without-sidebar", !isOpen);
    if (focus) $(isOpen ? "new-chat" : "open-sidebar").focus();
  }

  /** Put the sidebar away where it lies over the page. */
  yield() {
    if (isNarrow.matches && !$("sidebar").inert) this.toggle(false, { focus: false });
  }

  /** Show the list, with the chat `current` marked. */
  paint(current = this.#current) {
    this.#current = current;
    const { entries } = this.#chats;
    const wanted = $("find").value.trim().toLowerCase();
    $("find").hidden = entries.length < ENOUGH_TO_SEARCH && !wanted;
    const shown = entries.filter((entry) => entry.title.toLowerCase().includes(wanted));
    const groups = Object.entries(Object.groupBy(shown, (entry) => day(entry.updated)));
    const sections = groups.map(([title, group]) =>
      h(
        "section",
        {},
        h("h2", {}, title),
        h(
          "ul",
          {},
          group.map((entry) => this.#row(entry)),
        ),
      ),
    );
    $("sessions").replaceChildren(
      ...(sections.length ? sections : [h("p", { class: "empty" }, wanted ? "Nothing found." : "No chats yet.")]),
    );
  }

  #row(entry) {
    const isCurrent = entry.id === this.#current;
    const title = h(
      "a",
      { href: `#/chat/${entry.id}`, class: "session-title", "aria-current": isCurrent && "page", title: entry.title },
      entry.title || "Untitled",
    );
    const more = iconButton("more", `More for “${entry.title}”`, () => this.#menu(more, row, entry), {
      "aria-haspopup": "menu",
      "aria-expanded": "false",
    });
    const row = h(
      "li",
      { class: "session" },
      title,
      this.#isRunningIn(entry.id) && h("span", { class: "pulse", role: "img", "aria-label": "Answering" }),
      more,
    );
    return row;
  }

  #menu(button, row, entry) {
    const save = (kind) => async () => {
      const session = await this.#chats.open(entry.id);
      const name =
        (entry.title || "chat")
          .replace(/[^\p{L}\p{N}]+/gu, "-")
          .slice(0, 40)
          .replace(/^-|-$/g, "") || "chat";
      if (kind === "md") download(`${name}.md`, markdownText(session), "text/markdown");
      else download(`${name}.json`, exportText([session]), "application/json");
    };
    openMenu(button, [
      ["Rename", () => this.#rename(row, entry)],
      ["Export as JSON", save("json")],
      ["Export as Markdown", save("md")],
      ["Delete", () => this.#delete(entry), "danger"],
    ]);
  }

  #rename(row, entry) {
    let isDone = false;
    const end = async (isKept) => {
      if (isDone) return;
      isDone = true;
      const title = field.value.trim();
      if (isKept && title && title !== entry.title) await this.#chats.rename(entry.id, title);
      else this.paint();
      $("sessions").querySelector(`[href="#/chat/${entry.id}"]`)?.focus();
    };
    const field = h("input", {
      class: "rename",
      value: entry.title,
      "aria-label": "New title",
      maxlength: "200",
      onblur: () => end(true),
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.isComposing) end(true);
      if (event.key !== "Escape") return;
      event.stopPropagation();
      end(false);
    });
    row.replaceChildren(field);
    field.select();
    field.focus();
  }

  async #delete(entry) {
    const session = await this.#chats.open(entry.id);
    try {
      await this.#chats.remove(entry.id);
    } catch (error) {
      toast(`“${entry.title}” could not be deleted. ${error.message}`);
      return;
    }
    if (entry.id === this.#current) this.#go(null);
    toast(`“${entry.title}” was deleted.`, { label: "Undo", run: () => this.#chats.add([session]) });
  }
}

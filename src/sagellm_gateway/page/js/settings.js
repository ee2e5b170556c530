// How answers are drawn, what the model is told first, the key, and the data of this browser.

import { key } from "./api.js";
import { $, h, icon, iconButton, local, toast } from "./dom.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    help: "0 always takes the likeliest token; higher is freer.",
    min: 0,
    max: 2,
    step: 0.05,
    middle: 0.7,
  },
  {
    name: "top_p",
    label: "Top p",
    help: "Only the likeliest tokens with this total probability.",
    min: 0.05,
    max: 1,
    step: 0.05,
    middle: 1,
  },
  {
    name: "top_k",
    label: "Top k",
    help: "Only so many of the likeliest tokens; 0 is all.",
    min: 0,
    max: 200,
    step: 1,
    middle: 0,
  },
  {
    name: "max_tokens",
    label: "Max tokens",
    help: "The longest answer.",
    min: 16,
    max: 8192,
    step: 16,
    middle: 2048,
    most: 2 ** 31 - 1,
    least: 1,
  },
  {
    name: "seed",
    label: "Seed",
    help: "The same seed gives the same answer.",
    min: 0,
    step: 1,
    most: Number.MAX_SAFE_INTEGER,
    placeholder: "random",
  },
];

const PRESETS = {
  Default: {},
  Precise: { temperature: 0 },
  Balanced: { temperature: 0.7, top_p: 0.9 },
  Free: { temperature: 1.1, top_p: 0.95 },
};

const SAMPLED = ["temperature", "top_p", "top_k"];

const KEYS = [
  ["Enter", "Send"],
  ["Shift Enter", "New line"],
  ["Esc", "Stop the answer"],
  ["↑", "Edit the last question"],
  ["/", "To the message field"],
  ["Alt N", "New chat"],
];

/** The panel at the side. `data` are the actions on chats: exportAll, importFile, deleteAll. */
export class Settings {
  #values = local.read("sampling", { max_tokens: 2048 });
  #inputs = {};
  #presets = [];
  #session = null;
  #saveSession;
  #keyChanged;

  constructor({ saveSession, keyChanged, data }) {
    this.#saveSession = saveSession;
    this.#keyChanged = keyChanged;
    this.panel = $("settings");
    this.opener = $("open-settings");
    this.opener.append(icon("settings"));
    this.opener.addEventListener("click", () => (this.panel.hidden ? this.open() : this.close()));
    this.panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.close();
    });
    this.panel.append(
      h(
        "header",
        { class: "settings-head" },
        h("h2", {}, "Settings"),
        iconButton("close", "Close the settings", () => this.close()),
      ),
      h(
        "div",
        { class: "settings-body" },
        this.#systemPart(),
        this.#samplingPart(),
        this.#morePart(),
        this.#keyPart(),
        this.#dataPart(data),
        this.#helpPart(),
      ),
    );
    this.#paint();
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  /** Show the panel, and put the focus on the field `name`. */
  open(name = null) {
    this.panel.hidden = false;
    this.opener.setAttribute("aria-expanded", "true");
    document.body.classList.add("with-settings");
    const field = name && this.panel.querySelector(`[name=${name}]`);
    (field ?? this.panel.querySelector("button")).focus();
    field?.scrollIntoView({ block: "center" });
  }

  close() {
    this.panel.hidden = true;
    this.opener.setAttribute("aria-expanded", "false");
    document.body.classList.remove("with-settings");
    this.opener.focus();
  }

  /** Let the panel edit the system prompt of `session`. */
  show(session) {
    this.#session = session;
    this.system.value = session.system;
  }

  /** The system prompt of new chats. */
  get defaultSystem() {
    return local.read("system", "");
  }

  /** The fields of a request; raises where the further fields are no JSON object. */
  sampling() {
    const text = this.more.value.trim();
    let more = {};
    if (text) {
      try {
        more = JSON.parse(text);
      } catch (error) {
        throw new Error(`“More fields” is not valid JSON: ${error.message}.`);
      }
      if (typeof more !== "object" || more === null || Array.isArray(more))
        throw new Error("“More fields” must be a JSON object.");
    }
    return { ...this.#values, ...more };
  }

  // ---- parts

  #systemPart() {
    this.system = h("textarea", { name: "system", rows: "4", placeholder: "You are a helpful assistant." });
    this.system.addEventListener("input", () => {
      this.#session.system = this.system.value;
      this.#saveSession(this.#session);
    });
    const keep = h(
      "button",
      {
        type: "button",
        class: "link",
        onclick: () => (local.write("system", this.system.value), toast("New chats begin with this.")),
      },
      "Use for new chats",
    );
    return part("System prompt", label("What the model is told first", this.system), keep);
  }

  #samplingPart() {
    this.#presets = Object.entries(PRESETS).map(([name, values]) => {
      const button = h(
        "button",
        { type: "button", "aria-pressed": "false", onclick: () => this.#choose(values) },
        name,
      );
      return { button, values };
    });
    const group = h(
      "div",
      { class: "segments", role: "group", "aria-label": "Presets" },
      this.#presets.map((preset) => preset.button),
    );
    return part(
      "Sampling",
      group,
      FIELDS.map((field) => this.#row(field)),
    );
  }

  #row(field) {
    const id = `field-${field.name}`;
    const least = field.least ?? field.min;
    const number = h("input", {
      id,
      name: field.name,
      type: "number",
      min: least,
      max: field.most ?? field.max,
      step: field.step < 1 ? "any" : "1",
      placeholder: field.placeholder ?? "default",
      inputmode: "decimal",
      "aria-describedby": `${id}-help`,
    });
    const range =
      field.max &&
      h("input", {
        type: "range",
        min: field.min,
        max: field.max,
        step: field.step,
        "aria-label": field.label,
        tabindex: "-1",
      });
    number.addEventListener("input", () => {
      if (number.validity.valid) this.#set(field.name, number.value === "" ? undefined : Number(number.value), number);
    });
    range?.addEventListener("input", () => this.#set(field.name, Number(range.value)));
    this.#inputs[field.name] = { number, range, field };
    return h(
      "div",
      { class: "field" },
      h("label", { for: id }, field.label),
      number,
      range,
      h("p", { class: "help", id: `${id}-help` }, field.help),
    );
  }

  #morePart() {
    this.more = h("textarea", {
      name: "more",
      rows: "3",
      spellcheck: "false",
      class: "code-field",
      placeholder: '{"stop": ["\\n\\n"], "tools": []}',
      value: local.read("more", ""),
    });
    this.more.addEventListener("input", () => {
      local.write("more", this.more.value);
      let message = "";
      try {
        this.sampling();
      } catch (error) {
        message = error.message;
      }
      this.more.setCustomValidity(message);
      problem.textContent = message;
    });
    const problem = h("p", { class: "problem", role: "status" });
    return part("More fields", label("JSON that is added to each request", this.more), problem);
  }

  #keyPart() {
    const field = h("input", {
      name: "key",
      type: "password",
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "None",
      value: key.get(),
    });
    field.addEventListener("change", () => {
      key.set(field.value);
      this.#keyChanged();
    });
    const submit = (event) => (event.preventDefault(), field.blur());
    return part(
      "API key",
      h("form", { onsubmit: submit }, label("Kept in this browser and sent to this server only", field)),
    );
  }

  #dataPart({ exportAll, importFile, deleteAll }) {
    const file = h("input", {
      type: "file",
      accept: ".json,application/json",
      class: "hidden",
      tabindex: "-1",
      "aria-label": "File with chats",
    });
    file.addEventListener("change", async () => {
      if (file.files[0]) await importFile(file.files[0]);
      file.value = "";
    });
    const button = (text, onclick, kind = "quiet") => h("button", { type: "button", class: kind, onclick }, text);
    return part(
      "Chats",
      h(
        "div",
        { class: "buttons" },
        button("Export all", exportAll),
        button("Import", () => file.click()),
        button("Delete all", deleteAll, "quiet danger"),
        file,
      ),
    );
  }

  #helpPart() {
    const rows = KEYS.flatMap(([keys, does]) => [
      h(
        "dt",
        {},
        keys.split(" ").map((name) => h("kbd", {}, name)),
      ),
      h("dd", {}, does),
    ]);
    return part("Keyboard", h("dl", { class: "keys" }, rows));
  }

  // ---- values

  #set(name, value, source = null) {
    this.#values = { ...this.#values, [name]: value };
    if (value === undefined) delete this.#values[name];
    local.write("sampling", this.#values);
    this.#paint(source);
  }

  #choose(values) {
    const kept = Object.fromEntries(Object.entries(this.#values).filter(([name]) => !SAMPLED.includes(name)));
    this.#values = { ...kept, ...values };
    local.write("sampling", this.#values);
    this.#paint();
  }

  #paint(source = null) {
    for (const [name, { number, range, field }] of Object.entries(this.#inputs)) {
      const value = this.#values[name];
      if (number !== source) number.value = value ?? "";
      if (!range) continue;
      range.value = value ?? field.middle;
      range.classList.toggle("unset", value === undefined);
      range.style.setProperty("--share", `${(100 * (Number(range.value) - field.min)) / (field.max - field.min)}%`);
    }
    for (const { button, values } of this.#presets) {
      const isChosen = SAMPLED.every((name) => this.#values[name] === values[name]);
      button.setAttribute("aria-pressed", String(isChosen));
    }
  }
}

const part = (title, ...children) => h("section", { class: "part" }, h("h3", {}, title), children.flat());

const label = (text, field) => h("label", { class: "stacked" }, h("span", { class: "help" }, text), field);

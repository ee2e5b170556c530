// Markdown as elements. `marked` reads it; every token becomes an element made here, so HTML in an answer stays text
// and an address is a link only if it is one of the web. Text that grows is read from its last unfinished block on.

import { Marked } from "../vendor/marked.esm.js";
import { copyButton, h } from "./dom.js";
import { highlight } from "./highlight.js";

const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const MATH = /^(?:\\\[([\s\S]+?)\\\]|\\\(([\s\S]+?)\\\)|\$\$([\s\S]+?)\$\$)/;

const marked = new Marked({
  extensions: [
    {
      // Shown as it is written; without this, the backslashes would be eaten.
      name: "math",
      level: "inline",
      start: (text) => text.search(/\\[[(]|\$\$/),
      tokenizer(text) {
        const match = MATH.exec(text);
        return match && { type: "math", raw: match[0], text: (match[1] ?? match[2] ?? match[3]).trim() };
      },
    },
  ],
});

/** Shows a text that grows in `element`. */
export class Markdown {
  #element;
  #text = "";
  #read = 0; // characters whose blocks are final
  #open = []; // the elements of those that are not

  constructor(element) {
    this.#element = element;
  }

  /** Show `text`, which begins with what was shown before. */
  update(text) {
    if (text === this.#text) return;
    this.#text = text;
    const tokens = lex(text.slice(this.#read));
    const last = tokens.findLastIndex((token) => token.type !== "space");
    const isInPlace = this.#open.length === 1 && last <= 0 && growCode(this.#open[0], tokens[0]);
    if (isInPlace) return;
    for (const element of this.#open) element.remove();
    this.#open = [];
    for (const [index, token] of tokens.entries()) {
      const element = block(token);
      if (element) this.#element.append(element);
      if (index < last) this.#read += token.raw.length;
      else if (element) this.#open.push(element);
    }
  }

  /** Show `text`, which is complete: what names a link further down is known now. */
  finish(text) {
    this.update(text);
    const tokens = lex(text);
    if (tokens.some((token) => token.type === "def")) this.#element.replaceChildren(...blocks(tokens));
  }
}

/** The elements of a whole text. */
export const markdown = (text) => blocks(lex(text));

function lex(text) {
  try {
    return marked.lexer(text);
  } catch {
    // Nested beyond what the stack holds: nothing that anybody wants to read formatted.
    return [{ type: "html", raw: text, text }];
  }
}

const blocks = (tokens) => tokens.map(block).filter(Boolean);

function block(token) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading":
      // The page has headings of its own above these.
      return h(`h${Math.min(token.depth + 2, 6)}`, { class: `depth-${token.depth}` }, inline(token.tokens));
    case "paragraph":
      return h("p", {}, inline(token.tokens));
    case "text":
      return h("span", {}, token.tokens ? inline(token.tokens) : decode(token.text));
    case "code":
      return codeBlock(token.text, (token.lang ?? "").split(/\s/)[0]);
    case "blockquote":
      return h("blockquote", {}, blocks(token.tokens));
    case "checkbox":
      return checkbox(token);
    case "hr":
      return h("hr");
    case "list":
      return h(
        token.ordered ? "ol" : "ul",
        { start: token.ordered && token.start !== 1 ? token.start : null },
        token.items.map(item),
      );
    case "table":
      return table(token);
    default:
      return h("p", { class: "raw" }, token.raw.trim());
  }
}

const item = (token) => h("li", { class: token.task && "task" }, blocks(token.tokens));

const checkbox = ({ checked }) =>
  h("input", { type: "checkbox", disabled: true, checked, "aria-label": checked ? "Done" : "To do" });

function table(token) {
  const cell = (tag) => (entry, column) =>
    h(tag, { class: token.align[column] && `align-${token.align[column]}` }, inline(entry.tokens));
  const head = h("thead", {}, h("tr", {}, token.header.map(cell("th"))));
  const body = h(
    "tbody",
    {},
    token.rows.map((row) => h("tr", {}, row.map(cell("td")))),
  );
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, h("table", {}, head, body));
}

/** Code with its language and a button that copies it. */
export function codeBlock(text, language) {
  const code = h("code", {}, highlight(text, language));
  const copy = copyButton("Copy code", () => code.textContent);
  const figure = h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, language || "text"), copy),
    h("pre", { tabindex: "0" }, code),
  );
  figure.code = { element: code, language };
  return figure;
}

/** Whether `figure` is the code that `token` continues; then it shows all of it, and keeps its button and its place. */
function growCode(figure, token) {
  if (token?.type !== "code" || !figure.code || figure.code.language !== (token.lang ?? "").split(/\s/)[0])
    return false;
  figure.code.element.replaceChildren(...highlight(token.text, figure.code.language));
  return true;
}

function inline(tokens = []) {
  return tokens.map((token) => {
    switch (token.type) {
      case "text":
        return token.tokens ? h("span", {}, inline(token.tokens)) : decode(token.text);
      case "escape":
        return decode(token.text);
      case "strong":
      case "em":
      case "del":
        return h(token.type, {}, inline(token.tokens));
      case "checkbox":
        return checkbox(token);
      case "codespan":
        return h("code", {}, token.text);
      case "math":
        return h("code", { class: "math" }, token.text);
      case "br":
        return h("br");
      case "link":
        return link(token.href, inline(token.tokens), token.raw);
      case "image":
        // Not loaded: its address alone would tell its host what is read here.
        return link(token.href, [token.text || token.href], token.raw);
      default:
        return /^<br\s*\/?>$/i.test(token.raw) ? h("br") : token.raw;
    }
  });
}

function link(href, content, raw) {
  let address;
  try {
    address = new URL(href);
  } catch {
    return raw;
  }
  if (!["http:", "https:", "mailto:"].includes(address.protocol)) return raw;
  return h("a", { href: address.href, target: "_blank", rel: "noopener noreferrer nofollow" }, content);
}

const decode = (text) =>
  text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w{2,5}));/gi, (entity, decimal, hex, name) => {
    if (name) return ENTITIES[name.toLowerCase()] ?? entity;
    const point = decimal ? Number(decimal) : parseInt(hex, 16);
    return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : entity;
  });

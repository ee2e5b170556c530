// Colours for code, calm ones: comments, texts, numbers and keywords of a family of languages. No grammar is parsed;
// what is not sure stays plain.

import { h } from "./dom.js";

const STRINGS = String.raw`"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'`;
const NUMBER = String.raw`\b(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const C_COMMENT = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
const HASH_COMMENT = String.raw`(?<![\w$])#[^\n]*`;

const family = (comment, string, keywords, flags = "g") => {
  const words = keywords.split(" ").join("|");
  return new RegExp(
    `(?<comment>${comment})|(?<string>${string})|(?<number>${NUMBER})|\\b(?<keyword>${words})\\b`,
    flags,
  );
};

const C_LIKE = family(
  C_COMMENT,
  String.raw`${STRINGS}|${"`"}(?:\\.|[^${"`"}\\])*${"`"}`,
  "abstract as async auto await bool boolean break case catch chan char class const constexpr continue default defer delete do double else enum export extends extern false final finally float fn for from func function go if impl implements import in inline instanceof int interface let long loop match mod move mut namespace new nil null nullptr of operator override package private protected pub public range return self short signed sizeof static struct super switch template this throw throws trait true try type typedef typename typeof undefined union unsafe unsigned use using val var virtual void where while yield",
);
const PYTHON = family(
  HASH_COMMENT,
  String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|${STRINGS}`,
  "and as assert async await break case class continue def del elif else except finally for from global if import in is lambda match nonlocal not or pass raise return try while with yield None True False self",
);
const SHELL = family(
  HASH_COMMENT,
  STRINGS,
  "begin case cd cp def do done echo elif else elsif end esac exit export fi for function if in let local module mv require return rm set source then true false unless until when while yaml null",
);
const SQL = family(
  String.raw`--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`,
  STRINGS,
  "add alter and as asc between by case create delete desc distinct drop else end exists from full group having in index inner insert into is join key left like limit not null offset on or order outer primary references right select set table then union unique update values view when where with",
  "gi",
);
const MARKUP = family(String.raw`<!--[\s\S]*?(?:-->|$)`, STRINGS, "DOCTYPE", "g");
const DATA = family(String.raw`(?!)`, STRINGS, "true false null");

const FAMILIES = {
  py: PYTHON,
  python: PYTHON,
  sql: SQL,
  html: MARKUP,
  xml: MARKUP,
  svg: MARKUP,
  json: DATA,
  jsonl: DATA,
  css: C_LIKE,
};
for (const name of [
  "bash",
  "sh",
  "shell",
  "zsh",
  "console",
  "yaml",
  "yml",
  "toml",
  "ini",
  "ruby",
  "rb",
  "r",
  "dockerfile",
  "makefile",
])
  FAMILIES[name] = SHELL;
for (const name of [
  "c",
  "cpp",
  "c++",
  "cs",
  "csharp",
  "cuda",
  "dart",
  "go",
  "java",
  "javascript",
  "js",
  "jsx",
  "kotlin",
  "php",
  "rust",
  "rs",
  "scala",
  "swift",
  "ts",
  "tsx",
  "typescript",
  "zig",
])
  FAMILIES[name] = C_LIKE;

const MAX_CHARACTERS = 50_000;

/** The nodes of a piece of code in `language`; plain text where the language is not known. */
export function highlight(code, language) {
  const pattern = FAMILIES[language.toLowerCase()];
  if (!pattern || code.length > MAX_CHARACTERS) return [code];
  const nodes = [];
  let end = 0;
  for (const match of code.matchAll(pattern)) {
    const kind = Object.keys(match.groups).find((name) => match.groups[name] !== undefined);
    if (match.index > end) nodes.push(code.slice(end, match.index));
    nodes.push(h("span", { class: `code-${kind}` }, match[0]));
    end = match.index + match[0].length;
  }
  nodes.push(code.slice(end));
  return nodes;
}

// Elements, icons and the small things every part of the page needs. Nothing here, or anywhere in the page, sets HTML
// from text: elements are made one by one, so what a model writes can only ever be text.

const SVG = "http://www.w3.org/2000/svg";
const PROPERTIES = new Set(["value", "checked", "hidden", "disabled", "textContent", "inert"]);

/** The element with this id, which the page is known to have. */
export const $ = (id) => document.getElementById(id);

/** An element: `h("button", { class: "x", onclick }, "Text")`. Properties that are null or false are left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const ICONS = {
  menu: "M4 7h16M4 12h16M4 17h10",
  close: "M6 6l12 12M18 6L6 18",
  plus: "M12 5v14M5 12h14",
  settings: "M4 8h9M19 8h1M4 16h1M11 16h9M16 5.5v5M8 13.5v5",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M8 8h8v8H8z",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  check: "M5 13l4.5 4.5L19 7",
  redo: "M19 12a7 7 0 1 1-2-5M17.5 3v4.5H13",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  more: "M6 12h.01M12 12h.01M18 12h.01",
  down: "M12 5v14M6 13l6 6 6-6",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13",
  chart: "M4 20h16M7 16v-4M12 16V6M17 16V9",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 3v1.5M12 19.5V21M3 12h1.5M19.5 12H21M5.6 5.6l1.1 1.1M17.3 17.3l1.1 1.1M5.6 18.4l1.1-1.1M17.3 6.7l1.1-1.1",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  auto: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  tool: "M14 6.5a4 4 0 0 0-5 5L4.5 16 8 19.5l4.5-4.5a4 4 0 0 0 5-5L15 12.5 11.5 9z",
  download: "M12 4v11M7 10.5l5 5 5-5M5 20h14",
};

/** A line icon; decoration, so that its button needs a label. */
export function icon(name) {
  return svg("svg", { class: "icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A button that shows only an icon. */
export function iconButton(name, label, onclick, properties = {}) {
  const more = properties.class ? ` ${properties.class}` : "";
  return h(
    "button",
    { type: "button", "aria-label": label, title: label, onclick, ...properties, class: `icon-button${more}` },
    icon(name),
  );
}

/** Put text on the clipboard, also where the page is not served over HTTPS. */
export async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = h("textarea", { class: "hidden", value: text });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** A button that copies what `text()` returns and says so. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copyText(text());
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Have a screen reader say something when it is free. */
export function announce(text) {
  $("announcer").textContent = text;
}

/** Show a short notice with perhaps one thing to do about it. */
export function toast(text, action = null) {
  const box = h("div", { class: "toast" }, h("span", {}, text));
  if (action)
    box.append(
      h("button", { type: "button", class: "link", onclick: () => (box.remove(), action.run()) }, action.label),
    );
  $("toasts").replaceChildren(box);
  setTimeout(() => box.remove(), action ? 8000 : 4000);
}

/** Open a menu of `[label, run]` entries under `button`; the arrow keys, Esc and a click elsewhere work. */
export function openMenu(button, entries) {
  const close = () => (menu.remove(), button.setAttribute("aria-expanded", "false"));
  const items = entries.map(([label, run, kind]) =>
    h("button", { type: "button", role: "menuitem", class: kind, onclick: () => (menu.hidePopover(), run()) }, label),
  );
  const menu = h("div", { class: "menu", role: "menu", popover: "auto" }, items);
  menu.addEventListener("toggle", (event) => {
    if (event.newState === "closed") close();
  });
  menu.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    items[(items.indexOf(document.activeElement) + step + items.length) % items.length].focus();
  });
  document.body.append(menu);
  menu.showPopover();
  const at = button.getBoundingClientRect();
  const width = menu.offsetWidth;
  menu.style.left = `${Math.max(8, Math.min(at.right - width, innerWidth - width - 8))}px`;
  menu.style.top = `${Math.min(at.bottom + 4, innerHeight - menu.offsetHeight - 8)}px`;
  button.setAttribute("aria-expanded", "true");
  items[0].focus();
}

/** Let the browser save a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Local storage that may be blocked or full: reading then gives the fallback, writing is left undone. */
export const local = {
  read(name, fallback = null) {
    try {
      return JSON.parse(localStorage.getItem(`sagellm.${name}`)) ?? fallback;
    } catch {
      return fallback;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`sagellm.${name}`, JSON.stringify(value));
      return true;
    } catch {
      return false;
    }
  },
  remove(name) {
    try {
      localStorage.removeItem(`sagellm.${name}`);
    } catch {
      // Blocked: there was nothing.
    }
  },
};

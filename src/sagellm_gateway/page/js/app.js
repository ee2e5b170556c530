// Puts the page together: which chat or view the address names, the models, the theme and the keyboard.

import { callJson } from "./api.js";
import { exportText, readExport } from "./chat_files.js";
import { Chats, newSession } from "./chats.js";
import { Conversation, welcome } from "./conversation.js";
import { Dashboard } from "./dashboard.js";
import { $, download, h, icon, local, openMenu, toast } from "./dom.js";
import { plural } from "./format.js";
import { LocalSessions } from "./local_sessions.js";
import { ServerSessions } from "./server_sessions.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";

const THEMES = [
  ["auto", "As the system"],
  ["sun", "Light"],
  ["moon", "Dark"],
];
const THEME_NAMES = { auto: null, sun: "light", moon: "dark" };
const SAVE_AFTER_MS = 500;

let models = [];
let modelError = null;

// A server that keeps chats for good is the better place; one that keeps them in memory forgets them when it ends.
const store = document.documentElement.dataset.sessions === "server" ? new ServerSessions() : new LocalSessions();
const chats = new Chats(store, () => sidebar.paint());
const settings = new Settings({ saveSession: saveSoon, keyChanged, data: { exportAll, importFile, deleteAll } });
const conversation = new Conversation({ chats, settings, model: () => $("model").value || "default", started });
const sidebar = new Sidebar({ chats, go, isRunningIn: (id) => conversation.isRunningIn(id) });
const dashboard = new Dashboard($("dashboard"), { openKey: () => settings.open("key") });

// ---- where we are

function go(id) {
  const address = id ? `#/chat/${id}` : "#/";
  if (location.hash === address || (!id && !location.hash)) route();
  else location.hash = address;
}

/** A chat got its first message: it has an address from now on. */
function started(session) {
  if (session === conversation.session) history.replaceState(null, "", `#/chat/${session.id}`);
  sidebar.paint(session === conversation.session ? session.id : undefined);
}

async function route() {
  const [, view, id] = location.hash.split("/");
  const isDashboard = view === "dashboard";
  $("chat").hidden = isDashboard;
  $("dashboard").hidden = !isDashboard;
  $("heading").hidden = !isDashboard;
  $("model").parentElement.hidden = isDashboard;
  $("to-dashboard").classList.toggle("current", isDashboard);
  sidebar.yield();
  if (isDashboard) {
    document.title = "Dashboard · sageLLM";
    if (settings.isOpen) settings.close();
    sidebar.paint(null);
    dashboard.start();
    return;
  }
  dashboard.stop();
  const session = view === "chat" ? await openChat(id) : null;
  const shown = session ?? newSession({ system: settings.defaultSystem });
  document.title = shown.title ? `${shown.title} · sageLLM` : "sageLLM";
  sidebar.paint(session?.id ?? null);
  settings.show(shown);
  paintWelcome();
  conversation.show(shown);
}

async function openChat(id) {
  try {
    const session = await chats.open(id);
    if (!session) toast("This chat is not here any more.");
    return session;
  } catch (error) {
    toast(`This chat could not be opened. ${error.message}`);
    return null;
  }
}

// ---- models

/** Read what the server has. */
async function start() {
  try {
    [{ data: models }] = await Promise.all([callJson("v1/models"), chats.refresh()]);
    modelError = models.length ? null : new Error("No model is ready on this server yet.");
  } catch (error) {
    models = [];
    modelError = error;
  }
  const wanted = local.read("model");
  const options = models.map(({ id }) => h("option", { value: id }, id));
  $("model").replaceChildren(...(options.length ? options : [h("option", { value: "" }, "No model")]));
  if (models.some((model) => model.id === wanted)) $("model").value = wanted;
  paintWelcome();
}

function keyChanged() {
  start();
  if (!$("dashboard").hidden) dashboard.start();
}

function paintWelcome() {
  const model = models.find((entry) => entry.id === $("model").value);
  const parts = welcome({
    model,
    error: modelError,
    retry: start,
    openKey: () => settings.open("key"),
    ask: (text) => conversation.ask(text),
  });
  $("welcome").replaceChildren(...parts);
}

// ---- chats as files

let saving = null;

/** Keep a chat whose settings change, when they have stopped changing; one without messages is not kept. */
function saveSoon(session) {
  clearTimeout(saving);
  if (session.messages.length) saving = setTimeout(() => chats.save(session), SAVE_AFTER_MS);
}

async function exportAll() {
  const sessions = await chats.all();
  download(`sagellm-chats-${new Date().toISOString().slice(0, 10)}.json`, exportText(sessions), "application/json");
}

async function importFile(file) {
  try {
    const sessions = readExport(await file.text());
    await chats.add(sessions);
    toast(`${plural(sessions.length, "chat")} imported.`);
  } catch (error) {
    toast(`${file.name} could not be imported. ${error.message}`);
  }
}

async function deleteAll() {
  const sessions = await chats.all();
  if (!sessions.length) return;
  await chats.remove(...sessions.map((session) => session.id));
  go(null);
  toast(`${plural(sessions.length, "chat")} deleted.`, { label: "Undo", run: () => chats.add(sessions) });
}

// ---- theme and keyboard

function paintTheme() {
  const chosen = THEMES.find(([name]) => THEME_NAMES[name] === (document.documentElement.dataset.theme ?? null));
  $("theme").replaceChildren(icon(chosen[0]), "Appearance");
}

function chooseTheme(name) {
  const theme = THEME_NAMES[name];
  local.write("theme", theme);
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  paintTheme();
}

function onKey(event) {
  const isTyping = event.target.matches("input, textarea, select");
  if (event.key === "Escape") {
    if (conversation.isRunning) conversation.stop();
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    go(null);
  } else if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("input").focus();
  }
}

$("theme").addEventListener("click", () =>
  openMenu(
    $("theme"),
    THEMES.map(([name, label]) => [label, () => chooseTheme(name)]),
  ),
);
$("model").addEventListener("change", () => {
  local.write("model", $("model").value);
  paintWelcome();
});
document.addEventListener("keydown", onKey);
addEventListener("hashchange", route);
addEventListener("storage", (event) => event.key === `sagellm.${store.listName}` && chats.refresh());
paintTheme();
start();
route();

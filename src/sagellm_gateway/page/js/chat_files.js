// Chats as files: JSON to be read again, Markdown to be read by people.

import { newSession, titleOf } from "./chats.js";

const ROLES = ["user", "assistant", "tool"];
const PROMPTS = ["system", "developer"];

/** Chats as a file that `readExport` reads. */
export const exportText = (sessions) =>
  JSON.stringify({ format: "sagellm-chats", version: 1, sessions: sessions.map(bare) }, null, 2);

/** A chat without what is known of its store. */
const bare = (session) => ({
  ...session,
  onServer: undefined,
  unsure: undefined,
  messages: session.messages.map((message) => ({ ...message, kept: undefined })),
});

/** Chats of a file: ours, one of `/sessions/{id}/export`, or a bare list of messages. Raises for any other. */
export function readExport(text) {
  const data = JSON.parse(text);
  const entries = data?.sessions ?? (Array.isArray(data) && data[0]?.messages ? data : [data]);
  return entries.map((entry) => {
    const messages = Array.isArray(entry) ? entry : entry?.messages;
    if (!Array.isArray(messages) || !messages.every((message) => [...ROLES, ...PROMPTS].includes(message?.role))) {
      throw new Error("The file holds no chats: it needs “sessions” or “messages”.");
    }
    const prompts = messages
      .filter((message) => PROMPTS.includes(message.role))
      .map((message) => plainText(message.content));
    const said = messages.filter((message) => ROLES.includes(message.role));
    const session = newSession({
      system: String(entry.system ?? prompts.join("\n\n")),
      title: String(entry.title ?? ""),
      messages: said.map(readMessage),
    });
    session.created = Number(entry.created) || session.created;
    session.updated = Number(entry.updated) || session.updated;
    session.title ||= titleOf(session);
    return session;
  });
}

function readMessage({ reasoning_content: reasoning, ...message }) {
  return { ...message, content: plainText(message.content), ...(reasoning && { reasoning }) };
}

const plainText = (content) =>
  typeof content === "string" ? content : (content ?? []).map((part) => part.text ?? "").join("\n");

/** A chat as a document to read. */
export function markdownText({ title, system, messages }) {
  const names = { user: "You", assistant: "Assistant", tool: "Tool" };
  const calls = (message) =>
    (message.tool_calls ?? []).map((call) => `\n\n\`${call.function.name}(${call.function.arguments})\``).join("");
  const parts = messages.map((message) => `**${names[message.role]}**\n\n${message.content}${calls(message)}`);
  const prompt = system ? `> ${system.replaceAll("\n", "\n> ")}\n\n` : "";
  return `# ${title || "Chat"}\n\n${prompt}${parts.join("\n\n---\n\n")}\n`;
}

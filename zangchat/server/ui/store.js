// ---- state: chats and settings live in localStorage, in this browser only

const facts = JSON.parse(document.querySelector("meta[name=zangchat]").content);
const DEFAULTS = { temperature: facts.temperature, top_k: facts.top_k, top_p: facts.top_p, max_tokens: facts.max_tokens, system: "", theme: "auto", language: "", key: "" };
const CHAT = "zangchat.chat.", SETTINGS = "zangchat.settings", OLD_CHATS = "zangchat.chats";
const FRESH = 20_000;                      // milliseconds for which a reply that another tab writes is taken as alive

// newest first: {id, title, time, system, messages: [{role: "user", content} | {role: "assistant", replies: [reply, ...], shown}]}
// reply: {parts: [{type, text, by?, html?}], note?, error?, tokens?, rate?, writing?}; html is never stored
let chats = [];
let current = null;                        // the chat on screen; it joins `chats` with its first message
let editing = -1;                          // index of the user message being edited
let trouble = "";                          // why chats are not kept: "full", "notKept"
const known = new Map();                   // id -> the stored text that this tab read or wrote last
const unsaved = new Set();                 // chats that did not fit
const running = new Map();                 // chat -> {reply, controller} while this tab receives a reply

const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
const withoutHtml = (name, value) => (name === "html" ? undefined : value);
const replyOf = (message) => message.replies[message.shown];
const textOf = (message) => message.role === "user" ? message.content
  : replyOf(message).parts.filter((part) => part.type === "text").map((part) => part.text).join("");

function stored(key) {
  try { return localStorage.getItem(key); } catch { return null; }
}
function parsed(text) {
  try { return JSON.parse(text); } catch { return null; }
}

// ---- settings: only what is changed is written, over what other tabs have written

let settings = { ...DEFAULTS };
function loadSettings() {
  const found = parsed(stored(SETTINGS));
  settings = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) if (typeof found?.[name] === typeof DEFAULTS[name]) settings[name] = found[name];
}
function saveSettings(changed) {
  Object.assign(settings, changed);
  const found = parsed(stored(SETTINGS));
  try { localStorage.setItem(SETTINGS, JSON.stringify({ ...(typeof found === "object" ? found : {}), ...changed })); }
  catch { trouble ||= "notKept"; }
}

// ---- chats: one key each, so that tabs do not write over each other

function tidyReply(value) {
  const content = value?.parts ?? value?.content ?? value;
  const parts = typeof content === "string" ? (content ? [{ type: "text", text: content }] : []) : content;
  if (!Array.isArray(parts)) return null;
  const reply = { parts: parts.filter((part) => ["text", "python", "python_output"].includes(part?.type) && typeof part.text === "string")
    .map(({ type, text, by }) => (by === "model" ? { type, text, by } : { type, text })) };
  for (const name of ["note", "error", "tokens", "rate", "writing"]) if (value?.[name]) reply[name] = value[name];
  return reply;
}
function tidyMessage(value) {
  if (value?.role === "user") {
    const content = Array.isArray(value.content) ? value.content.map((part) => part?.text ?? "").join("") : value.content;
    return typeof content === "string" ? { role: "user", content } : null;
  }
  if (value?.role !== "assistant") return null;
  const replies = (Array.isArray(value.replies) ? value.replies : [value]).map(tidyReply).filter(Boolean);
  if (!replies.length) return null;
  const shown = Number.isInteger(value.shown) && replies[value.shown] ? value.shown : replies.length - 1;
  return { role: "assistant", replies, shown };
}
function tidyChat(value) {                 // a chat as it is stored, was stored, or is exported; null for anything else
  if (!Array.isArray(value?.messages)) return null;
  const messages = value.messages.map(tidyMessage).filter(Boolean);
  if (!messages.length) return null;
  const head = value.messages[0];
  const system = head?.role === "system" && typeof head.content === "string" ? head.content : value.system;
  return {
    id: typeof value.id === "string" && value.id ? value.id : newId(),
    title: typeof value.title === "string" && value.title.trim() ? value.title : titleOf(messages),
    time: Number.isFinite(value.time) ? value.time : Date.now(),
    system: typeof system === "string" ? system : "",
    messages,
  };
}
function titleOf(messages) {
  const first = messages.find((message) => message.role === "user");
  return (first?.content ?? "").trim().replace(/\s+/g, " ").slice(0, 60) || "…";
}
function byTime() { chats.sort((a, b) => b.time - a.time); }

function loadChats() {                     // take over what other tabs stored; chats keep their identity
  migrate();
  let keys = [];
  try { keys = Object.keys(localStorage).filter((key) => key.startsWith(CHAT)); } catch { trouble ||= "notKept"; }
  const ids = new Set(keys.map((key) => key.slice(CHAT.length)));
  for (const id of ids) takeOver(id, stored(CHAT + id));
  for (const chat of [...chats]) if (known.has(chat.id) && !ids.has(chat.id)) forget(chat);
  byTime();
}
function takeOver(id, text) {
  if (text === null || known.get(id) === text) return;
  const found = tidyChat(parsed(text));
  if (!found) return;                      // left as it is: perhaps another version of this page can read it
  found.id = id;
  known.set(id, text);
  const mine = chats.find((chat) => chat.id === id);
  if (!mine) chats.push(found);
  else if (running.has(mine)) Object.assign(mine, { title: found.title, system: found.system });
  else Object.assign(mine, found);
}
function forget(chat) {
  running.get(chat)?.controller.abort();
  chats = chats.filter((other) => other !== chat);
  known.delete(chat.id);
  unsaved.delete(chat);
}
function migrate() {                       // the chats of earlier versions of this page, all under one key
  const old = parsed(stored(OLD_CHATS));
  if (!Array.isArray(old)) return;
  const now = Date.now();
  const found = old.map((value, i) => [value, tidyChat({ time: now - i, ...value })]).filter(([, chat]) => chat);
  const strange = old.filter((value) => !found.some(([other]) => other === value));
  const write = () => found.every(([, chat]) => stored(CHAT + chat.id) !== null || put(CHAT + chat.id, JSON.stringify(chat)));
  let written = write();
  if (!written && put(OLD_CHATS, "[]")) written = write();   // no room for both
  if (!written) { put(OLD_CHATS, JSON.stringify(old)); return; }
  if (strange.length) put(OLD_CHATS, JSON.stringify(strange)); else localStorage.removeItem(OLD_CHATS);
}
function put(key, text) {
  try { localStorage.setItem(key, text); return true; }
  catch (error) { trouble = error.name === "QuotaExceededError" ? "full" : "notKept"; return false; }
}
function save(chat) {
  const before = stored(CHAT + chat.id), last = known.get(chat.id) ?? null;
  if (before !== null && before !== last) chat.id = newId();   // another tab wrote it unseen: both are kept
  const text = JSON.stringify(chat, withoutHtml);
  if (!put(CHAT + chat.id, text)) { unsaved.add(chat); return; }
  known.set(chat.id, text);
  unsaved.delete(chat);
  if (!unsaved.size) trouble = "";
}
function erase(chat) {
  const id = chat.id;
  forget(chat);
  try { localStorage.removeItem(CHAT + id); } catch { trouble ||= "notKept"; }
  for (const other of [...unsaved]) save(other);               // there may be room now
}
const last = (chat) => chat.messages.at(-1);
function isElsewhere(chat) {               // another tab writes a reply into this chat
  const message = last(chat);
  return !running.has(chat) && message?.role === "assistant" && Date.now() - (replyOf(message).writing ?? 0) < FRESH;
}
function endLost(chat) {                   // a reply whose tab is gone; whether there was one
  const message = last(chat);
  if (message?.role !== "assistant" || running.has(chat) || isElsewhere(chat)) return false;
  const reply = replyOf(message);
  if (!reply.writing) return false;
  delete reply.writing;
  reply.note ??= { key: "closed" };
  return true;
}

// ---- export and import

function exported(chat) {                  // a conversation as CustomJSON and chat_cli read it, with what only this page knows
  const messages = parsed(JSON.stringify(chat.messages, withoutHtml)).map((message) => {
    if (message.role === "user") return message;
    const { parts, ...more } = replyOf(message);
    const content = parts.some((part) => part.type !== "text") ? parts : textOf(message);
    return { role: "assistant", content, ...more, ...(message.replies.length > 1 && { replies: message.replies, shown: message.shown }) };
  });
  if (chat.system) messages.unshift({ role: "system", content: chat.system });
  return { messages, id: chat.id, title: chat.title, time: chat.time };
}
function asMarkdown(chat) {
  const blocks = [`# ${chat.title}`];
  if (chat.system) blocks.push(`> ${t("system")}: ${chat.system.replaceAll("\n", "\n> ")}`);
  for (const message of chat.messages) {
    blocks.push(`## ${t(message.role === "user" ? "you" : "model")}`);
    if (message.role === "user") { blocks.push(message.content); continue; }
    for (const part of grouped(replyOf(message).parts)) {
      if (part.type === "text") blocks.push(part.text.trim());
      else if (part.by) blocks.push(`*${t("madeUp")}:* \`${part.text}\``);
      else blocks.push(`*${t("calculator")}:* \`${part.text}${part.result === undefined ? "" : " = " + part.result}\``);
    }
  }
  return blocks.filter(Boolean).join("\n\n") + "\n";
}
function grouped(parts) {                  // a result belongs to the call before it, unless the model made it up
  const shown = [];
  for (const part of parts) {
    const before = shown.at(-1);
    if (part.type === "python_output" && !part.by && before?.type === "python" && before.result === undefined) before.result = part.text;
    else shown.push({ ...part });
  }
  return shown;
}
function conversationsIn(text) {           // a JSON list, one conversation, or one a line
  const whole = parsed(text);
  if (whole) return Array.isArray(whole) ? whole : [whole];
  return text.split("\n").filter((line) => line.trim()).map(parsed);
}
function importChats(text) {               // -> {n, known, bad}
  const found = conversationsIn(text);
  const chatsFound = found.map(tidyChat);
  const fresh = chatsFound.filter(Boolean).filter((chat) => {
    const same = chats.find((other) => other.id === chat.id);
    if (same && JSON.stringify(tidyChat(exported(same)).messages) === JSON.stringify(chat.messages)) return false;
    if (same) chat.id = newId();
    chats.push(chat);                      // at once: the file may hold it again
    save(chat);
    return true;
  });
  byTime();
  const bad = chatsFound.filter((chat) => !chat).length;
  return { n: fresh.length, known: found.length - fresh.length - bad, bad };
}

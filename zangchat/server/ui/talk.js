// ---- the server

const paths = (path) => location.pathname.replace(/\/?$/, "/") + path;   // below whatever a proxy serves the page under

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (/^[\x20-\x7e]+$/.test(settings.key)) headers.Authorization = "Bearer " + settings.key;   // fetch sends no others
  return fetch(paths(path), { method: "POST", headers, body: JSON.stringify(body), signal });
}
async function* serverEvents(response, alive) {   // the data of each server-sent event, parsed; comments and other fields are skipped
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    alive();
    const blocks = (buffer + value.replaceAll("\r", "")).split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}
class Refusal extends Error {
  constructor(error) {
    super(error.key ?? error.message);
    this.error = error;
  }
}
async function refusal(response) {
  const { status } = response;
  if (status === 401) return new Refusal({ key: settings.key ? "wrongKey" : "needsKey" });
  const error = parsed(await response.text())?.error;
  return new Refusal(typeof error?.message === "string" ? { code: error.code, message: sentence(error.message) } : { key: "refused", status });
}
const sentence = (text) => text[0].toUpperCase() + text.slice(1) + ".";

// ---- one reply

const size = (value) => new TextEncoder().encode(JSON.stringify(value)).length;
function request(chat) {                   // -> {body, leftOut}: only what was answered, and the question; of a long chat the end
  const messages = [];
  const add = (role, content) => {
    const before = messages.at(-1);
    if (before?.role === role && role === "user") before.content += "\n\n" + content;   // an answer that never came
    else messages.push({ role, content });
  };
  for (const message of chat.messages.slice(0, -1)) {
    if (message.role === "user") { add("user", message.content); continue; }
    const { parts, error } = replyOf(message);
    if (parts.some((part) => part.text)) add("assistant", parts.map(({ type, text }) => ({ type, text })));
    else if (error) messages.pop();        // a question that was refused
  }
  const system = chat.system.trim() ? [{ role: "system", content: chat.system.trim() }] : [];
  const { temperature, top_k, top_p, max_tokens } = settings;
  const body = { messages: [...system, ...messages.slice(-1)], temperature, top_k, top_p, max_tokens, render: true, truncate: true };
  const most = Math.min(messages.length, facts.max_messages - system.length);
  let from = Math.max(messages.length - 1, 0), room = facts.max_body - size(body);
  while (messages.length - from < most && (room -= size(messages[from - 1]) + 1) >= 0) from -= 1;
  if (from) from = Math.max(from, messages.findIndex(({ role }, i) => i >= from && role === "user"));
  body.messages = [...system, ...messages.slice(from)];
  return { body, leftOut: from };
}
async function ask(chat) {                 // the last message is the assistant's; its shown reply is empty and fills
  const reply = replyOf(last(chat));
  const controller = new AbortController();
  running.set(chat, { reply, controller });
  chat.time = Date.now();
  if (!chats.includes(chat)) chats.push(chat);
  byTime();
  const keep = () => { reply.writing = Date.now(); save(chat); };
  const alive = () => {
    if (known.has(chat.id) && stored(CHAT + chat.id) === null) forget(chat);   // deleted in another tab
    else if (Date.now() - reply.writing > 1000) keep();
  };
  const pulse = setInterval(alive, 5000);
  keep();
  draw();
  if (current === chat) { toEnd(); say(t("waiting")); }
  try {
    const { body, leftOut } = request(chat);
    if (leftOut) reply.note = { key: "leftOut", n: leftOut };
    const response = await post("chat/completions", body, controller.signal);
    if (!response.ok) throw await refusal(response);
    let ended = false;
    for await (const event of serverEvents(response, alive)) {
      take(reply, event);
      ended ||= Boolean(event.done);
      drawReply(chat);
    }
    if (!ended) throw new Refusal({ key: "lost" });
    if (!reply.parts.length) reply.note ??= { key: "silent" };
    if (current === chat) say(t("model") + ": " + textOf(last(chat)));
  } catch (error) {
    endEarly(reply, error);
    if (current === chat) say(reply.note ? noteText(reply.note) : "");
  } finally {
    clearInterval(pulse);
    running.delete(chat);
    delete reply.queued;
    delete reply.writing;
    if (chats.includes(chat)) save(chat);
    drawReply(chat);
    drawChats();
    drawComposer();
  }
}
function take(reply, event) {
  if (event.left_out) reply.note = { key: "leftOut", n: event.left_out + (reply.note?.n ?? 0) };
  if (event.queued) reply.queued = event.queued;
  if (event.parts) reply.parts = event.parts;
  if (event.tokens) reply.tokens = event.tokens;
  if (event.tokens_per_second) reply.rate = event.tokens_per_second;
  if (event.error) throw new Refusal({ message: sentence(event.error) });
  if (["length", "timeout"].includes(event.finish_reason)) reply.note = { key: event.finish_reason };
}
let leaving = false;                       // what fails while the page closes is no failure of the server
function endEarly(reply, error) {
  if (leaving) reply.note = { key: "closed" };
  else if (error.name === "AbortError") reply.note = { key: "stopped" };
  else if (error instanceof Refusal) reply.error = error.error;
  else if (error instanceof TypeError) reply.error = { key: reply.parts.length ? "lost" : "unreachable" };
  else throw error;
}
async function renderMissing(chat) {       // HTML is not stored: saved replies are rendered when they are shown
  const parts = chat.messages.filter((message) => message.role === "assistant").flatMap((message) => replyOf(message).parts)
    .filter((part) => part.type === "text" && part.html === undefined && part.text.length <= 16_000);
  if (isElsewhere(chat)) return;
  while (parts.length && current === chat) {
    const batch = [];
    for (let size = 0; parts[batch.length] && batch.length < 64 && (size += parts[batch.length].text.length) <= 50_000;) batch.push(parts[batch.length]);
    let response;
    try { response = await post("render", { texts: batch.map((part) => part.text) }); } catch { return; }   // the server is away: plain text
    if (!response.ok) return;
    const { html } = await response.json();
    parts.splice(0, html.length).forEach((part, i) => { part.html = html[i]; });
    if (current === chat) redrawSaid();
  }
}
function redrawSaid() {
  const follow = nearEnd();
  current.messages.forEach((message, i) => drawSaid(message, $("log").children[i].querySelector(".said")));
  if (follow) toEnd();
}

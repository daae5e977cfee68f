// ---- drawing

const $ = (id) => document.getElementById(id);
const PHONE = matchMedia("(hover: none) and (pointer: coarse)");
const ICONS = {
  drop: "M6 6l12 12M18 6L6 18",
  rename: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
  back: "M15 5l-7 7 7 7",
  on: "M9 5l7 7-7 7",
};

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}
function button(label, action, className) {
  const node = element("button", className, label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}
function iconButton(icon, label, action, className) {
  const node = button("", action, className);
  node.setAttribute("aria-label", label);
  node.innerHTML = `<svg class="icon" viewBox="0 0 24 24" aria-hidden="true"><path d="${ICONS[icon]}"/></svg>`;
  return node;
}
async function copy(text, node) {
  const done = await toClipboard(text);
  node.textContent = t(done ? "copied" : "notCopied");
  setTimeout(() => { node.textContent = t("copy"); }, 1200);
}
async function toClipboard(text) {
  try { await navigator.clipboard.writeText(text); return true; }
  catch { return copyBySelection(text); }  // plain http: browsers give their clipboard to https and localhost only
}
function copyBySelection(text) {
  const field = element("textarea", "heard");
  const focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return done;
}
function download(name, type, text) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function drawPart(part, node) {
  node.className = part.type === "text" ? "md" : "tool";
  if (part.type !== "text") {
    node.replaceChildren(element("span", "name", t(part.by ? "madeUp" : "calculator")), element("span", part.by ? "made-up" : "call", part.text));
    if (part.result !== undefined) node.append(element("span", "result", part.result));
  } else if (part.html === undefined) {    // until the server has rendered it
    node.classList.add("plain");
    node.textContent = part.text;
  } else {
    node.innerHTML = part.html;            // rendered and cleaned by the server; everything else is set as text
    for (const pre of node.querySelectorAll("pre")) {
      const code = pre.textContent;
      const frame = element("div", "code");
      pre.replaceWith(frame);
      frame.append(pre, button(t("copy"), (event) => copy(code, event.currentTarget)));
    }
  }
}
function drawSaid(message, node) {         // only what changed is touched, so that a selection survives while text streams in
  if (message.role === "user") { node.textContent = message.content; return; }
  const parts = grouped(replyOf(message).parts);
  while (node.children.length > parts.length) node.lastChild.remove();
  parts.forEach((part, i) => {
    const state = JSON.stringify(part);
    const child = node.children[i] || node.appendChild(element("div"));
    if (child.state !== state) { child.state = state; drawPart(part, child); }
  });
}
function drawMessage(chat, i) {
  const message = chat.messages[i];
  const node = element("article", "message " + message.role);
  node.setAttribute("aria-label", t(message.role === "user" ? "you" : "model"));
  const said = element("div", "said");
  const tail = element("div", "tail");
  node.append(said, tail);
  drawSaid(message, said);
  drawTail(chat, i, tail);
  return node;
}
function drawTail(chat, i, tail) {
  const message = chat.messages[i];
  const isLast = i === chat.messages.length - 1;
  tail.replaceChildren();
  if (message.role === "assistant") {
    const reply = replyOf(message);
    if (running.get(chat)?.reply === reply) { drawRunning(reply, tail); return; }
    if (isLast && isElsewhere(chat)) { tail.append(dots(t("elsewhere"), true)); return; }
    if (reply.note) tail.append(element("div", "note", noteText(reply.note)));
    if (reply.error) tail.append(errorBox(chat, reply.error, isLast));
  }
  tail.append(actions(chat, i, isLast));
}
function drawRunning(reply, tail) {
  if (!reply.parts.length) tail.append(dots(reply.queued ? t("queued", { n: reply.queued }) : t("waiting"), Boolean(reply.queued)));
  else if (reply.rate) tail.append(element("div", "pace", paceText(reply)));
}
function dots(label, shown) {
  const node = element("div", "waiting");
  node.append(element("i"), element("i"), element("i"));
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", label);
  if (shown) node.append(element("span", "", label));
  return node;
}
const noteText = (note) => (typeof note === "string" ? note : t(note.key, note));
const paceText = (reply) => t("tokens", reply) + (reply.rate ? " · " + t("pace", reply) : "");
function errorText(error) {
  if (typeof error === "string") return error;
  return words().errors[error.code] ?? (error.key ? t(error.key, error) : error.message);
}
function errorBox(chat, error, isLast) {
  const box = element("div", "error");
  box.setAttribute("role", "alert");
  box.append(element("span", "", errorText(error)));
  if (!isLast) return box;
  if (error.key === "needsKey" || error.key === "wrongKey") box.append(keyForm(chat));
  box.append(button(t("retry"), () => regenerate(chat)));
  return box;
}
function keyForm(chat) {                   // asked for where it is missing, then the question is sent again
  const form = element("form", "key");
  const field = element("input");
  field.type = "password";
  field.autocomplete = "off";
  field.setAttribute("aria-label", t("keyHere"));
  field.placeholder = t("keyHere");
  const use = element("button", "", t("useKey"));
  form.append(field, use);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!field.value.trim()) return;
    saveSettings({ key: field.value.trim() });
    regenerate(chat);
  });
  return form;
}
function actions(chat, i, isLast) {
  const message = chat.messages[i], row = element("div", "actions");
  if (message.role === "user") row.append(button(t("edit"), () => startEditing(i)));
  if (textOf(message)) row.append(button(t("copy"), (event) => copy(textOf(message), event.currentTarget)));
  if (message.role !== "assistant") return row;
  const reply = replyOf(message);
  if (isLast && !reply.error) row.append(button(t("regenerate"), () => regenerate(chat)));
  if (isLast && message.replies.length > 1) row.append(versions(chat, message));
  if (reply.tokens) row.append(element("span", "pace", paceText(reply)));
  return row;
}
function versions(chat, message) {
  const show = (n) => {
    message.shown = n;
    save(chat);
    draw();
    renderMissing(chat);
  };
  const node = element("span", "versions");
  const all = message.replies.length, n = message.shown;
  const back = iconButton("back", t("earlier"), () => show(n - 1)), on = iconButton("on", t("later"), () => show(n + 1));
  back.disabled = n === 0;
  on.disabled = n === all - 1;
  node.append(back, element("span", "", t("version", { shown: n + 1, all })), on);
  return node;
}
function draw() {
  const held = $("scroll").contains(document.activeElement);
  endLost(current);
  $("log").replaceChildren(...current.messages.map((_, i) => drawMessage(current, i)));
  $("welcome").hidden = current.messages.length > 0;
  $("title").textContent = current.messages.length ? current.title : "";
  drawChats();
  drawComposer();
  if (held) typeOn();
}
function drawReply(chat) {                 // the last message, while it grows
  if (current !== chat) return;
  const follow = nearEnd(), node = $("log").lastElementChild;
  drawSaid(last(chat), node.querySelector(".said"));
  drawTail(chat, chat.messages.length - 1, node.querySelector(".tail"));
  if (follow) toEnd();
}
function typeOn() {                        // where what was in focus is gone, the keyboard goes on here; on a phone it would cover the page
  if (!PHONE.matches) $("input").focus();
}
function holds(chat, text) {
  return [chat.title, ...chat.messages.map(textOf)].some((one) => one.toLowerCase().includes(text));
}
function drawChats() {
  const text = $("search").value.trim().toLowerCase();
  const found = text ? chats.filter((chat) => holds(chat, text)) : chats;
  $("search").hidden = !chats.length;
  $("none-found").hidden = !text || found.length > 0;
  $("chats").replaceChildren(...found.map((chat) => {
    const item = element("li", chat === current ? "current" : "");
    const open = button(chat.title, () => show(chat), "open");
    if (chat === current) open.setAttribute("aria-current", "true");
    if (running.has(chat)) {
      const dot = element("i", "busy");
      dot.setAttribute("role", "img");
      dot.setAttribute("aria-label", t("writing"));
      item.append(dot);
    }
    item.append(open, iconButton("rename", t("rename", chat), () => openChat(chat), "drop"), iconButton("drop", t("remove", chat), () => remove(chat), "drop"));
    return item;
  }));
}
function drawComposer() {
  const busy = running.has(current);
  $("arrow").toggleAttribute("hidden", busy);
  $("square").toggleAttribute("hidden", !busy);
  $("send").setAttribute("aria-label", t(busy ? "stop" : "send"));
  $("send").disabled = !busy && (!$("input").value.trim() || isElsewhere(current));
  if ($("send").disabled && document.activeElement === $("send")) typeOn();
  $("input").enterKeyHint = PHONE.matches ? "enter" : "send";
  $("editing").hidden = editing < 0;
  $("input").style.height = "auto";
  $("input").style.height = $("input").scrollHeight + "px";
  $("trouble").hidden = !trouble;
  $("trouble-text").textContent = trouble ? t(trouble) : "";
}
const nearEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 90;
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };
function say(text) { $("status").textContent = text; }
function hint(text) {
  $("hint").textContent = text;
  $("hint").hidden = !text;
}

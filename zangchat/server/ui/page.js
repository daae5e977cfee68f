// ---- chats

function show(chat) {
  stopEditing();
  current = chat;
  document.body.classList.remove("drawer");
  $("menu").setAttribute("aria-expanded", "false");
  draw();
  toEnd();
  renderMissing(chat);
}
function newChat() {
  show({ id: newId(), title: "", time: Date.now(), system: settings.system, messages: [] });
  typeOn();
}
function remove(chat) {
  erase(chat);
  if (chat === current) newChat(); else { drawChats(); drawComposer(); typeOn(); }
}
function startEditing(i) {
  if (running.has(current)) return;
  editing = i;
  $("input").value = current.messages[i].content;
  drawComposer();
  $("input").focus();
}
function stopEditing() {
  if (editing < 0) return;
  editing = -1;
  $("input").value = "";
  drawComposer();
}
function submit(text) {
  text = text.trim();
  if (!text || running.has(current) || isElsewhere(current)) return;
  if (editing < 0 && obey(text)) { drawComposer(); return; }
  if (editing >= 0) current.messages.length = editing;
  editing = -1;
  $("input").value = "";
  hint("");
  if (!current.messages.length && !current.title) current.title = titleOf([{ role: "user", content: text }]);
  current.messages.push({ role: "user", content: text }, { role: "assistant", replies: [{ parts: [] }], shown: 0 });
  ask(current);
}
function regenerate(chat) {                // a further version, unless there is nothing to keep of the last one
  if (running.has(chat) || isElsewhere(chat) || !chat.messages.length) return;
  const message = last(chat), fresh = { parts: [] };
  if (message.role === "user") chat.messages.push({ role: "assistant", replies: [fresh], shown: 0 });
  else if (replyOf(message).parts.length) message.shown = message.replies.push(fresh) - 1;
  else message.replies[message.shown] = fresh;
  ask(chat);
}

// ---- slash commands

const COMMANDS = {
  "/new": () => newChat(),
  "/regenerate": () => regenerate(current),
  "/system": (text) => { setSystem(current, text); hint(t(text ? "systemSet" : "systemUnset")); },
  "/temperature": (text) => setNumber("temperature", text, "temperatureSet"),
  "/topk": (text) => setNumber("top_k", text, "topKSet"),
  "/settings": () => openSettings(),
  "/help": () => hint(Object.entries(words().commands).map(([name, does]) => name + does).join("\n")),
};
const TAKING = ["/system", "/temperature", "/topk"];
let refused = "";                          // what was taken for a mistyped command; sent if it is entered again

function obey(text) {                      // whether it was a command; anything else that begins with / is a message
  const name = text.split(/\s/)[0], rest = text.slice(name.length).trim();
  const again = refused === text;
  refused = "";
  if (Object.hasOwn(COMMANDS, name) && (!rest || TAKING.includes(name))) {
    $("input").value = "";
    hint("");
    COMMANDS[name](rest);
    return true;
  }
  if (again || rest || !/^\/[a-z]+$/.test(name)) return false;
  refused = text;
  hint(t("noCommand", { name }));
  return true;
}
function setSystem(chat, text) {
  chat.system = text;
  if (chats.includes(chat)) save(chat);
}
function setNumber(name, text, done) {     // within the bounds of its field in the settings
  const { min, max, step } = $(name), value = Number(text), whole = step === "1";
  if (text === "" || !(value >= +min && value <= +max) || (whole && !Number.isInteger(value))) {
    hint(t(whole ? "wholeRange" : "range", { min, max }));
    return;
  }
  saveSettings({ [name]: value });
  hint(t(done, { value }));
}

// ---- settings

const FIELDS = ["temperature", "top_k", "top_p", "max_tokens", "system", "language", "theme", "key"];
function showSettings() {
  for (const name of FIELDS) $(name).value = settings[name];
  $("temperature-shown").value = (+settings.temperature).toFixed(2);
  $("top_p-shown").value = settings.top_p >= 1 ? t("off") : (+settings.top_p).toFixed(2);
}
function openSettings() {
  showSettings();
  $("settings").showModal();
}
const systemDark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  document.documentElement.dataset.theme = settings.theme === "auto" ? (systemDark.matches ? "dark" : "light") : settings.theme;
}
function applyLanguage() {
  translatePage();
  $("ideas").replaceChildren(...t("ideas").map((idea) => button(idea, () => submit(idea))));
  $("model").textContent = facts.model + " · " + t("context", { n: facts.context });
  hint("");
  if (current) draw();
}
function applySettings() {
  applyTheme();
  applyLanguage();
}
for (const name of FIELDS) {
  $(name).addEventListener("input", () => {
    const field = $(name);
    if (!field.checkValidity() || (field.type === "number" && field.value === "")) return;
    saveSettings({ [name]: typeof DEFAULTS[name] === "number" ? Number(field.value) : field.value });
    if (name === "language") applyLanguage();
    if (name === "system" && !current.messages.length) current.system = settings.system;
    if (field.type !== "number") showSettings();
    applyTheme();
  });
}

// ---- one chat: its title, its system prompt, its file

let opened = null;                         // the chat whose dialog is open
function openChat(chat) {
  opened = chat;
  $("chat-title").value = chat.title;
  $("chat-system").value = chat.system;
  for (const id of ["title-row", "chat-files"]) $(id).hidden = !chats.includes(chat);
  $("chat").showModal();
}
$("chat-title").addEventListener("input", () => {
  opened.title = $("chat-title").value.trim() || titleOf(opened.messages);
  if (chats.includes(opened)) save(opened);
  drawChats();
  if (opened === current) $("title").textContent = opened.title;
});
$("chat-system").addEventListener("input", () => setSystem(opened, $("chat-system").value));
const fileName = (chat, ending) => (chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").slice(0, 40) || "chat") + ending;
$("to-markdown").addEventListener("click", () => download(fileName(opened, ".md"), "text/markdown", asMarkdown(opened)));
$("to-json").addEventListener("click", () => download(fileName(opened, ".json"), "application/json", JSON.stringify([exported(opened)], null, 1)));
$("remove-chat").addEventListener("click", () => { $("chat").close(); remove(opened); });
function exportAll() { download("zangchat-chats.json", "application/json", JSON.stringify(chats.map(exported), null, 1)); }
$("export").addEventListener("click", exportAll);
$("rescue").addEventListener("click", exportAll);
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (!file) return;
  const result = importChats(await file.text());
  $("file").value = "";
  if (document.body.classList.contains("drawer")) toggleDrawer();
  drawChats();
  drawComposer();
  hint(result.n + result.known ? t("imported", result) : t("notChats", file));
});

// ---- wiring

const composing = (event) => event.isComposing || event.keyCode === 229;   // WebKit ends a composition before its Enter arrives
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const run = running.get(current);
  if (run) run.controller.abort(); else submit($("input").value);
});
$("input").addEventListener("input", () => { hint(""); refused = ""; drawComposer(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || composing(event)) return;
  if (PHONE.matches && !event.ctrlKey && !event.metaKey) return;   // a phone has no Shift+Enter: the button sends
  event.preventDefault();
  submit($("input").value);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || composing(event) || $("settings").open || $("chat").open) return;
  if (document.body.classList.contains("drawer")) toggleDrawer();
  else if (running.has(current)) running.get(current).controller.abort();
  else stopEditing();
});
function toggleDrawer() {
  $("menu").setAttribute("aria-expanded", String(document.body.classList.toggle("drawer")));
}
$("menu").addEventListener("click", toggleDrawer);
$("veil").addEventListener("click", toggleDrawer);
$("new").addEventListener("click", newChat);
$("search").addEventListener("input", drawChats);
$("unedit").addEventListener("click", stopEditing);
let atEnd = true;                          // and stays there when the room for the chat changes: for a note, for a phone's keyboard
$("scroll").addEventListener("scroll", () => { atEnd = nearEnd(); });
new ResizeObserver(() => { if (atEnd) toEnd(); }).observe($("scroll"));
$("configure").addEventListener("click", openSettings);
$("options").addEventListener("click", () => openChat(current));
$("defaults").addEventListener("click", () => {
  settings = { ...DEFAULTS, key: settings.key };
  put(SETTINGS, JSON.stringify({ key: settings.key }));   // the operator may change the others
  showSettings();
  applySettings();
});
systemDark.addEventListener("change", applyTheme);
addEventListener("languagechange", applyLanguage);

// ---- other tabs, and the end of this one

function refresh() {
  const before = known.get(current.id);
  loadChats();
  if (current.messages.length && !chats.includes(current)) { newChat(); return; }
  editing = current.messages[editing]?.role === "user" ? editing : -1;
  if ((endLost(current) || known.get(current.id) !== before) && !running.has(current)) { draw(); renderMissing(current); } else drawChats();
}
addEventListener("storage", ({ key }) => {
  if (key === SETTINGS || key === null) { loadSettings(); applySettings(); }
  if (key === null || key === OLD_CHATS || key.startsWith(CHAT)) refresh();
});
setInterval(() => {                        // another tab may have ended while it wrote
  if (endLost(current)) { draw(); renderMissing(current); }
}, 2000);
addEventListener("pagehide", () => {
  leaving = true;
  for (const [chat, { reply }] of running) {
    delete reply.writing;
    reply.note = { key: "closed" };
    save(chat);
  }
});
addEventListener("pageshow", () => {
  leaving = false;
  for (const { reply } of running.values()) {          // the browser kept the page: the reply goes on
    delete reply.note;
    reply.writing = Date.now();
  }
  if (current) refresh();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) for (const chat of running.keys()) save(chat); else refresh();
});

for (const image of document.querySelectorAll("img.logo")) image.src = paths("logo.svg");
$("language").append(...Object.entries(STRINGS).map(([name, { self }]) => new Option(self, name)));
$("key-row").hidden = !facts.needs_key;
loadSettings();
applyTheme();
loadChats();
newChat();
applyLanguage();

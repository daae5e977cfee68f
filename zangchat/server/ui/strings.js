// ---- words: a language is one block; a key that a block lacks is taken from English

const STRINGS = {
  en: {
    self: "English", tag: "en",
    chats: "Chats", newChat: "New chat", search: "Search chats", noneFound: "No chat holds these words.",
    exportAll: "Export", importChats: "Import", rename: "Rename {title}", remove: "Delete {title}",
    thisChat: "This chat", settings: "Settings", conversation: "Conversation", you: "You", model: "zangchat",
    welcome: "What is on your mind?", about: "A small language model, trained from nothing, running here.",
    ideas: ["Who are you?", "How many r are in strawberry?", "What is 12 * 34?", "Tell me a story about a fox and a lantern."],
    message: "Message", placeholder: "Message zangchat, or /help", send: "Send", stop: "Stop",
    fine: "Small models make things up. Chats are kept in this browser only.",
    edit: "Edit", editing: "Editing: what follows this message will be replaced", cancel: "Cancel",
    copy: "Copy", copied: "Copied", notCopied: "Not allowed", regenerate: "Regenerate", retry: "Try again",
    earlier: "Earlier version", later: "Later version", version: "{shown} of {all}",
    calculator: "calculator", madeUp: "not calculated: the model made this up",
    tokens: ({ tokens }) => `${tokens} ${tokens === 1 ? "token" : "tokens"}`, pace: "{rate} tokens/s",
    waiting: "Waiting for the model", writing: "A reply is being written",
    queued: ({ n }) => `In the queue, ${n} ${n === 1 ? "reply" : "replies"} before this one`,
    elsewhere: "A reply is being written in another tab.",
    leftOut: "The chat outgrew the model's memory: its oldest {n} messages were left out.",
    length: "The reply reached its longest allowed length.",
    timeout: "The reply took longer than the server allows.",
    silent: "The model had nothing to say.", stopped: "Stopped.",
    closed: "The page was closed while this reply arrived.",
    unreachable: "The server cannot be reached.", lost: "The connection to the server was lost.",
    refused: "The server answered {status}.",
    full: "This browser's storage is full: the newest messages are lost when this page closes. Export or delete chats.",
    notKept: "This browser keeps no chats: they are lost when this page closes.",
    key: "API key of this server", keyHere: "API key", useKey: "Use this key", needsKey: "This server requires an API key.",
    wrongKey: "The server does not accept this API key.",
    title: "Title", system: "System prompt", systemNone: "None", systemNew: "System prompt of new chats",
    exportMarkdown: "Export as Markdown", exportJson: "Export as JSON", removeChat: "Delete this chat", done: "Done",
    temperature: "Temperature", topK: "Top-k (0 = off)", topP: "Top-p", off: "off", maxTokens: "Longest reply, tokens",
    language: "Language · 语言", asBrowser: "As the browser", theme: "Appearance", asSystem: "As the system", light: "Light", dark: "Dark",
    defaults: "Defaults",
    imported: ({ n, known, bad }) => `${n} ${n === 1 ? "chat" : "chats"} imported` + (known ? `, ${known} here already` : "") + (bad ? `, ${bad} not understood` : "") + ".",
    notChats: "{name} holds no chats: export them from this page as JSON, or save them with chat_cli's /save.",
    context: "context {n}",
    noCommand: "There is no command {name}; /help lists them. Enter again sends it as a message.",
    range: "That takes a number between {min} and {max}.", wholeRange: "That takes a whole number between {min} and {max}.",
    temperatureSet: "Temperature {value}.", topKSet: "Top-k {value}.",
    systemSet: "The system prompt of this chat is set.", systemUnset: "This chat has no system prompt.",
    commands: {
      "/new": "  start a new chat", "/regenerate": "  answer the last message again",
      "/system": " TEXT  instructions in front of this chat (nothing: none)",
      "/temperature": " NUMBER  0 always takes the likeliest token", "/topk": " NUMBER  draw among that many tokens (0: all)",
      "/settings": "  all settings", "/help": "  this list",
    },
    errors: {},  // by the server's code; without one here, its own sentence is shown
  },
  zh: {
    self: "中文", tag: "zh-CN",
    chats: "对话", newChat: "新对话", search: "搜索对话", noneFound: "没有包含这些字的对话。",
    exportAll: "导出", importChats: "导入", rename: "重命名 {title}", remove: "删除 {title}",
    thisChat: "本对话", settings: "设置", conversation: "对话内容", you: "你", model: "zangchat",
    welcome: "想聊点什么？", about: "一个从零训练的小语言模型，就在这台机器上运行。",
    ideas: ["你是谁？", "单词 strawberry 里有几个 r？", "12 * 34 等于多少？", "大的反义词是什么？"],
    message: "消息", placeholder: "给 zangchat 发消息，或输入 /help", send: "发送", stop: "停止",
    fine: "小模型会编造内容。对话只保存在这个浏览器里。",
    edit: "编辑", editing: "正在编辑：这条消息之后的内容将被替换", cancel: "取消",
    copy: "复制", copied: "已复制", notCopied: "无法复制", regenerate: "重新生成", retry: "重试",
    earlier: "上一个版本", later: "下一个版本", version: "{shown} / {all}",
    calculator: "计算器", madeUp: "未经计算：这是模型编造的结果",
    tokens: ({ tokens }) => `${tokens} 个词元`, pace: "每秒 {rate} 个",
    waiting: "正在等待模型", writing: "正在生成回复",
    queued: ({ n }) => `排队中，前面还有 ${n} 个回复`,
    elsewhere: "另一个标签页正在生成回复。",
    leftOut: "对话超出了模型的上下文，最早的 {n} 条消息没有发送。",
    length: "回复达到了允许的最大长度。",
    timeout: "回复超过了服务器允许的时间。",
    silent: "模型没有回答。", stopped: "已停止。",
    closed: "回复生成时页面被关闭了。",
    unreachable: "无法连接服务器。", lost: "与服务器的连接中断了。",
    refused: "服务器返回了 {status}。",
    full: "浏览器的存储空间已满：关闭页面后，最新的消息会丢失。请导出或删除一些对话。",
    notKept: "这个浏览器不保存对话：关闭页面后对话会丢失。",
    key: "服务器的 API key", keyHere: "API key", useKey: "使用这个 key", needsKey: "这个服务器需要 API key。",
    wrongKey: "服务器不接受这个 API key。",
    title: "标题", system: "系统提示词", systemNone: "无", systemNew: "新对话的系统提示词",
    exportMarkdown: "导出为 Markdown", exportJson: "导出为 JSON", removeChat: "删除本对话", done: "完成",
    temperature: "温度", topK: "Top-k（0 = 关闭）", topP: "Top-p", off: "关闭", maxTokens: "回复的最大长度（词元）",
    language: "语言 · Language", asBrowser: "跟随浏览器", theme: "外观", asSystem: "跟随系统", light: "浅色", dark: "深色",
    defaults: "恢复默认",
    imported: ({ n, known, bad }) => `导入了 ${n} 个对话` + (known ? `，${known} 个已存在` : "") + (bad ? `，${bad} 个无法识别` : "") + "。",
    notChats: "{name} 里没有对话：请用本页面导出的 JSON，或 chat_cli 的 /save 保存的文件。",
    context: "上下文 {n}",
    noCommand: "没有 {name} 这个命令，/help 列出全部命令。再按一次回车会作为消息发送。",
    range: "请输入 {min} 到 {max} 之间的数。", wholeRange: "请输入 {min} 到 {max} 之间的整数。",
    temperatureSet: "温度 {value}。", topKSet: "Top-k {value}。",
    systemSet: "已设置本对话的系统提示词。", systemUnset: "本对话没有系统提示词。",
    commands: {
      "/new": "  开始新对话", "/regenerate": "  重新回答上一条消息",
      "/system": " 文字  放在本对话最前面的指示（留空则取消）",
      "/temperature": " 数字  0 表示总是取最可能的词元", "/topk": " 数字  只在最可能的若干个词元中抽取（0：全部）",
      "/settings": "  全部设置", "/help": "  显示这个列表",
    },
    errors: {
      context_length_exceeded: "消息超出了模型的上下文长度：请缩短消息，或开始新对话。",
      queue_full: "服务器正忙，请稍后再试。",
      too_large: "这次请求太大了：请开始新对话。",
      engine_error: "模型处理这条消息时出错了，原因见服务器的日志。",
    },
  },
};

function browserLanguage() {
  for (const tag of navigator.languages) {
    const name = tag.toLowerCase().split("-")[0];
    if (STRINGS[name]) return name;
  }
  return "en";
}
function words() { return STRINGS[settings.language] ?? STRINGS[browserLanguage()]; }
function t(key, values = {}) {
  const text = words()[key] ?? STRINGS.en[key] ?? key;
  if (typeof text === "function") return text(values);
  return typeof text === "string" ? text.replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all) : text;
}
function translatePage() {                 // by their keys: data-text, data-label, data-hint
  document.documentElement.lang = words().tag;
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = t(node.dataset.text);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
}

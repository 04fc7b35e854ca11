// What the page says, in English and Chinese. Elements name their words with data-say, data-say-label and data-say-hint.

const ENGLISH = {
  skip: "Skip to the conversation", conversations: "Conversations", newChat: "New chat",
  noSessions: "Conversations will be listed here.", openSide: "Show conversations", views: "Views",
  chat: "Chat", play: "Play", meter: "Meter", conversation: "Conversation",
  welcome: "What is on your mind?",
  welcomeText: "Conversations stay on this machine. Each one is a small state that can be forked, saved and resumed.",
  message: "Message", hint: "Write a message", thinking: "Thinking", auto: "Auto", on: "On", off: "Off",
  budget: "Budget", budgetTokens: "Tokens of thinking at most", options: "Options", temperature: "Temperature",
  longest: "Longest answer, tokens", send: "Send", stop: "Stop",
  you: "You", model: "Model", edit: "Edit and fork", copy: "Copy", copied: "Copied", undo: "Undo",
  saveFork: "Ask in a fork", cancel: "Cancel", editing: "Edit the message",
  isThinking: "Thinking … {n} tokens", thought: "Thought for {n} tokens", noThought: "Did not think",
  stopped: "stopped", cut: "cut off: no room for more", failed: "could not be finished",
  untitled: "New chat", rename: "Rename", remove: "Delete", save: "Save to disk", saved: "saved on disk",
  removeSure: "Delete “{title}”?", renameTo: "New name", menu: "Actions for {title}", forked: "a fork", lost: "This conversation is not on the server any more.",
  away: "The server does not answer. Is it still running?", wanted: "Write something first.",
  gauge: "read {new} new of {all} tokens · wrote {wrote} at {rate} tokens/s · state {state}",
  gaugeWriting: "writing · {rate} tokens/s", reading: "reading …",
  stateFacts: "State {state}", perThousand: "{kv} per 1,000 tokens", and: ", ",
  answered: "Answer: {text}", answering: "The model is answering",
  playTitle: "One problem, three ways to think",
  only: "This is a demo-sized model: it knows only these {n} families of problems. Each one is drawn from those it has never seen.",
  family: "Family", difficulty: "Difficulty", deal: "New problem", trained: "{n} (trained)", level: "{n}",
  modeAuto: "It decides", modeOn: "Thinking on", modeOff: "Thinking off", right: "Right", wrong: "Wrong",
  unjudged: "Not judged", counts: "{thinking} thinking + {answer} answer tokens · {seconds} s",
  rightAnswer: "The answer is {answer}", unended: "It did not come to an end",
  tally: "{right} of {games} right", retry: "Try again", answerThis: "Answer this",
  meterTitle: "What does a long text cost?",
  meterText: "A session holds a state of one size for its Mamba layers, and keys and values that grow with each token for its attention layers. The twin is the same model with attention in place of every Mamba layer.",
  text: "Text", textHint: "Paste a long text", length: "Length", asPasted: "As pasted", measure: "Measure",
  measuring: "Measuring …", thisModel: "This model", twin: "Attention twin", memory: "Session memory",
  perToken: "One more token", held: "{state} state + {kv} KV", unmeasured: "too large to measure here",
  less: "{n} times less memory", faster: "{n} times faster", atTokens: "At {n} tokens",
  noTwin: "This model has no Mamba layers: it is its own attention twin.", pastedTokens: "The text has {n} tokens.",
  slower: "{n} times the time", chart: "Memory over length: this model and its attention twin", tokensAxis: "tokens",
  keyTitle: "This server wants a key", key: "API key", goOn: "Continue", light: "Light", dark: "Dark", system: "System",
  theme: "Colours: {name}", examples: ["Why is the sky blue? Two sentences.", "Write a Python function that finds the median.", "用一句话解释什么是递归。"],
};

const CHINESE = {
  skip: "跳到对话", conversations: "对话", newChat: "新对话", noSessions: "对话会列在这里。", openSide: "显示对话列表",
  views: "视图", chat: "聊天", play: "试玩", meter: "计量", conversation: "对话", welcome: "想聊点什么？",
  welcomeText: "对话留在这台机器上。每段对话是一份很小的状态，可以分叉、保存和恢复。",
  message: "消息", hint: "输入消息", thinking: "思考", auto: "自动", on: "开", off: "关", budget: "预算",
  budgetTokens: "思考词元上限", options: "选项", temperature: "温度", longest: "回答最长词元数", send: "发送", stop: "停止",
  you: "你", model: "模型", edit: "修改并分叉", copy: "复制", copied: "已复制", undo: "撤销", saveFork: "在分叉中提问",
  cancel: "取消", editing: "修改消息", isThinking: "思考中……{n} 个词元", thought: "思考了 {n} 个词元", noThought: "没有思考",
  stopped: "已停止", cut: "被截断：没有更多空间", failed: "未能完成", untitled: "新对话", rename: "重命名", remove: "删除",
  save: "保存到磁盘", saved: "已存盘", removeSure: "删除“{title}”？", renameTo: "新名称", menu: "“{title}”的操作", forked: "分叉",
  lost: "服务器上已没有这段对话。", away: "服务器没有应答，它还在运行吗？", wanted: "请先输入内容。",
  gauge: "新读 {new} / 共 {all} 个词元 · 写了 {wrote} 个，{rate} 词元/秒 · 状态 {state}",
  gaugeWriting: "书写中 · {rate} 词元/秒", reading: "读取中……", stateFacts: "状态 {state}", and: "，",
  perThousand: "每千词元 {kv}", answered: "回答：{text}", answering: "模型正在回答",
  playTitle: "一道题，三种思考方式",
  only: "这是演示大小的模型：它只会这 {n} 类题。每道题都是它从未见过的。",
  family: "题型", difficulty: "难度", deal: "换一题", trained: "{n}（训练过）", level: "{n}", modeAuto: "自行决定",
  modeOn: "思考", modeOff: "不思考", right: "正确", wrong: "错误", unjudged: "无法判定",
  counts: "思考 {thinking} + 回答 {answer} 个词元 · {seconds} 秒", rightAnswer: "答案是 {answer}", unended: "没有写完",
  tally: "{games} 题对 {right} 题", retry: "重试", answerThis: "回答这个问题", meterTitle: "长文本要花多少？",
  meterText: "一段对话里，Mamba 层的状态大小不变，注意力层的键和值随每个词元增长。孪生模型把每个 Mamba 层换成注意力，其余相同。",
  text: "文本", textHint: "粘贴一段长文本", length: "长度", asPasted: "按原文", measure: "测量", measuring: "测量中……",
  thisModel: "本模型", twin: "注意力孪生", memory: "对话占用内存", perToken: "再写一个词元",
  held: "状态 {state} + 键值 {kv}", unmeasured: "太大，无法在此测量", less: "内存少 {n} 倍", faster: "快 {n} 倍",
  slower: "用时 {n} 倍", atTokens: "{n} 个词元时", noTwin: "本模型没有 Mamba 层：它就是自己的注意力孪生。",
  pastedTokens: "文本有 {n} 个词元。", chart: "内存与长度：本模型与注意力孪生", tokensAxis: "词元",
  keyTitle: "此服务器需要密钥", key: "API 密钥", goOn: "继续", light: "浅色", dark: "深色", system: "跟随系统",
  theme: "配色：{name}", examples: ["天空为什么是蓝色的？用两句话回答。", "写一个求中位数的 Python 函数。", "Explain recursion in one sentence."],
};

const CHOICE = "turbos-language";

/** "en" or "zh": what was chosen, else what the browser prefers. */
export function language() {
  return localStorage.getItem(CHOICE) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
}

/** The words of a key, with values in the places in braces. */
export function say(key, values = {}) {
  const words = (language() === "zh" ? CHINESE : ENGLISH)[key];
  if (words === undefined) throw new Error(`no words for ${key}`);
  if (typeof words !== "string") return words;
  return words.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** Add the words of another page. */
export function learn(english, chinese) {
  Object.assign(ENGLISH, english);
  Object.assign(CHINESE, chinese);
}

/** Choose a language; whoever listens for "language" on the document says its words again. */
export function setLanguage(name) {
  localStorage.setItem(CHOICE, name);
  sayAll();
  document.dispatchEvent(new Event("language"));
}

/** Put words into every element that names them. */
export function sayAll() {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  for (const element of document.querySelectorAll("[data-say-label]")) {
    element.setAttribute("aria-label", say(element.dataset.sayLabel));
    if (element.matches("button, summary")) element.title = say(element.dataset.sayLabel);
  }
  for (const element of document.querySelectorAll("[data-say-hint]")) element.placeholder = say(element.dataset.sayHint);
}

/** Bytes for people: "73 kB", "1.2 MB". */
export function size(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  const [unit, divisor] = bytes < 1e6 ? ["kB", 1e3] : bytes < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  const value = bytes / divisor;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ${unit}`;
}

/** A number with few digits: "0.42", "5.3", "57". */
export function few(value) {
  return value < 1 ? value.toFixed(2) : value < 20 ? value.toFixed(1) : String(Math.round(value));
}

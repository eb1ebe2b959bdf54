// What the browser keeps: conversations and settings across visits, the API key until the tab is closed.
//
// Every conversation has a key of its own, so that two tabs do not overwrite each other's. Where the browser keeps
// nothing (private windows, blocked storage) everything still works until the page is closed.

const CONVERSATION = "gptoss.conversation.";
const SETTINGS = "gptoss.settings";
const KEY = "gptoss.key";

const memory = new Map();
const cache = new Map(); // id -> conversation: one object each, which a running answer may hold

export const DEFAULTS = {
  model: "",
  effort: "medium",
  instructions: "",
  temperature: "",
  top_p: "",
  max_tokens: "",
  seed: "",
  format: "text",
  schema: '{\n  "type": "object",\n  "properties": {"answer": {"type": "integer"}},\n  "required": ["answer"],\n  "additionalProperties": false\n}',
  tools: "",
};

export function listConversations() {
  for (const name of names()) {
    const id = name.slice(CONVERSATION.length);
    if (!cache.has(id)) {
      const found = parse(read(name));
      if (Array.isArray(found?.messages)) {
        cache.set(id, { title: "", updated: 0, ...found, id, messages: found.messages.map(whole) });
      }
    }
  }
  return [...cache.values()].filter((c) => c.messages.length).sort((a, b) => b.updated - a.updated);
}

/** A message with everything that views expect. */
function whole(message) {
  return message?.role === "assistant"
    ? { content: "", reasoning: "", tool_calls: [], meta: {}, ...message }
    : { role: "user", content: "", ...message };
}

export function newConversation() {
  const id = `${Date.now().toString(36)}${Math.floor(Math.random() * 1e9).toString(36)}`;
  const now = Date.now();
  return { id, title: "", created: now, updated: now, messages: [] };
}

/** Returns false when the browser has no room left. */
export function saveConversation(conversation) {
  cache.set(conversation.id, conversation);
  return write(CONVERSATION + conversation.id, JSON.stringify(conversation));
}

export function removeConversation(id) {
  cache.delete(id);
  memory.delete(CONVERSATION + id);
  attempt(() => localStorage.removeItem(CONVERSATION + id));
}

/** Calls back when another tab changed a conversation; what this tab is `busy` with stays as it is. */
export function watchConversations(busy, changed) {
  window.addEventListener("storage", (event) => {
    if (!event.key?.startsWith(CONVERSATION)) return;
    const id = event.key.slice(CONVERSATION.length);
    if (busy(id)) return;
    cache.delete(id);
    changed(id);
  });
}

export function loadSettings() {
  return { ...DEFAULTS, ...(parse(read(SETTINGS)) ?? {}) };
}

export function saveSettings(settings) {
  write(SETTINGS, JSON.stringify(settings));
}

export function loadKey() {
  return attempt(() => sessionStorage.getItem(KEY)) ?? memory.get(KEY) ?? "";
}

export function saveKey(key) {
  memory.set(KEY, key);
  attempt(() => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)));
}

function names() {
  const stored = attempt(() => Object.keys(localStorage)) ?? [];
  return [...stored, ...memory.keys()].filter((name) => name.startsWith(CONVERSATION));
}

function read(name) {
  return attempt(() => localStorage.getItem(name)) ?? memory.get(name) ?? null;
}

function write(name, text) {
  const kept = attempt(() => {
    localStorage.setItem(name, text);
    return true;
  });
  if (!kept) memory.set(name, text);
  return kept === true;
}

function parse(text) {
  return attempt(() => JSON.parse(text));
}

function attempt(action) {
  try {
    return action();
  } catch {
    return undefined;
  }
}

// The page: one conversation at a time, answers that stream, and what the reader sets.

import { ApiError, listModels, streamCompletion } from "./api.js";
import { ask, openSettings, readTools } from "./dialogs.js";
import { element } from "./markdown.js";
import { assistantView, textButton, userView } from "./messages.js";
import { showSidebar } from "./sidebar.js";
import * as store from "./store.js";

const at = (id) => document.getElementById(id);
const [scroll, messages, welcome, prompt, send, stop] = ["scroll", "messages", "welcome", "prompt", "send", "stop"].map(at);

let settings = store.loadSettings();
let key = store.loadKey();
let conversation = store.newConversation();
let views = new Map(); // message -> view, of the open conversation
const runs = new Map(); // conversation id -> the answer that is being made
let follow = true; // keep the latest in sight

// ---- conversations

function openConversation(next) {
  conversation = next;
  views = new Map();
  messages.replaceChildren();
  follow = true;
  const hash = next.messages.length ? `#${next.id}` : "";
  if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
  document.body.classList.remove("open");
  at("menu").setAttribute("aria-expanded", "false");
  refresh();
  toEnd();
}

function openFromAddress() {
  const id = location.hash.slice(1);
  const found = store.listConversations().find((one) => one.id === id);
  if (found) openConversation(found);
  else if (!id) openConversation(store.newConversation());
}

function save() {
  if (store.saveConversation(conversation)) return;
  banner("This browser keeps no more conversations: export or delete some, or allow storage for this site.");
}

/** Shows the open conversation as it is now. */
function refresh() {
  const { messages: list } = conversation;
  for (const [message, view] of views) {
    if (list.includes(message)) continue;
    view.node.remove();
    views.delete(message);
  }
  const run = runs.get(conversation.id);
  const results = new Map(list.filter((m) => m.role === "tool").map((m) => [m.tool_call_id, m.content]));
  const lastUser = list.findLast((m) => m.role === "user");
  const lastAnswer = list.findLast((m) => m.role === "assistant");
  const waiting = waitingCalls(conversation);
  for (const message of list) {
    if (message.role === "tool") continue;
    if (!views.has(message)) {
      const view = message.role === "user" ? userView(message, (text) => edit(message, text)) : assistantView(message);
      views.set(message, view);
      messages.append(view.node);
    }
    views.get(message).update({
      running: run?.message === message,
      thinking: run?.thinking === undefined ? undefined : (performance.now() - run.thinking) / 1000,
      editable: !run && message === lastUser,
      last: !run && message === lastAnswer && message === list.findLast((m) => m.role !== "tool"),
      waiting: message === lastAnswer && waiting.length > 0,
      results,
      again: () => again(message),
      answer,
    });
  }
  welcome.hidden = list.length > 0;
  if (document.title !== (conversation.title || "gpt-oss")) {
    document.title = at("title").textContent = conversation.title || "gpt-oss";
  }
  showControls(run, waiting);
}

function showControls(run, waiting) {
  const held = stop.contains(document.activeElement) || send.contains(document.activeElement);
  send.hidden = Boolean(run);
  stop.hidden = !run;
  if (held) prompt.focus();
  send.disabled = !prompt.value.trim() || waiting.length > 0;
  prompt.placeholder = waiting.length ? "First give the result of the call above" : "Message";
}

function showList() {
  showSidebar(conversation.id, (id) => {
    openConversation(store.listConversations().find((one) => one.id === id));
    showList();
  }, (id) => {
    runs.get(id)?.controller.abort();
    if (id === conversation.id) openConversation(store.newConversation());
    showList();
  });
}

// ---- asking and answering

function submit(text) {
  if (!text || runs.has(conversation.id) || waitingCalls(conversation).length) return;
  conversation.messages.push({ role: "user", content: text });
  conversation.title ||= text.split("\n")[0].slice(0, 60);
  prompt.value = "";
  fit();
  makeAnswer();
}

function edit(message, text) {
  conversation.messages.length = conversation.messages.indexOf(message);
  submit(text);
}

function again(message) {
  conversation.messages.length = conversation.messages.indexOf(message);
  makeAnswer();
}

function answer(call, text) {
  conversation.messages.push({ role: "tool", tool_call_id: call.id, content: text });
  if (waitingCalls(conversation).length) {
    save();
    refresh();
  } else makeAnswer();
}

function waitingCalls({ messages: list }) {
  const last = list.findLast((m) => m.role !== "tool");
  if (last?.role !== "assistant" || last.meta.finish_reason !== "tool_calls") return [];
  const answered = new Set(list.filter((m) => m.role === "tool").map((m) => m.tool_call_id));
  return last.tool_calls.filter((call) => !answered.has(call.id));
}

/** Makes the next answer of the open conversation, which may be another one when it ends. */
async function makeAnswer() {
  const mine = conversation;
  banner("");
  const meta = { model: settings.model, effort: settings.effort, format: settings.format !== "text" };
  const message = { role: "assistant", content: "", reasoning: "", tool_calls: [], meta };
  const body = requestBody(mine.messages);
  mine.messages.push(message);
  mine.updated = Date.now();
  const controller = new AbortController();
  const run = { conversation: mine, message, controller, started: performance.now(), thinking: undefined };
  runs.set(mine.id, run);
  save();
  if (location.hash !== `#${mine.id}`) history.replaceState(null, "", `#${mine.id}`);
  follow = true;
  refresh();
  showList();
  toEnd();
  const clock = setInterval(draw, 100);
  try {
    for await (const chunk of streamCompletion(body, key, run.controller.signal)) {
      take(chunk, run);
      draw();
    }
  } catch (error) {
    if (run.controller.signal.aborted) meta.stopped = true;
    else if (error instanceof ApiError) Object.assign(meta, { error: withWait(error), status: error.status });
    else throw error;
  } finally {
    clearInterval(clock);
    meta.seconds = (performance.now() - run.started) / 1000;
    endThinking(run);
    runs.delete(mine.id);
    mine.updated = Date.now();
    if (store.listConversations().includes(mine)) store.saveConversation(mine);
    show();
    showList();
    at("status").textContent = meta.error ?? (meta.stopped ? "Stopped" : "");
  }
  if (meta.status === 401 && mine === conversation && (await askKey())) again(message);
}

function requestBody(list) {
  const body = { model: settings.model, messages: toApi(list), reasoning_effort: settings.effort };
  for (const [name, field] of [["temperature", "temperature"], ["top_p", "top_p"], ["max_tokens", "max_completion_tokens"], ["seed", "seed"]]) {
    if (settings[name] !== "") body[field] = Number(settings[name]);
  }
  const tools = readTools(settings.tools);
  if (tools.length) body.tools = tools;
  if (settings.format === "json_object") body.response_format = { type: "json_object" };
  if (settings.format === "json_schema") {
    const schema = JSON.parse(settings.schema);
    body.response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
  }
  return body;
}

/** What the API should know of a conversation: no failed answers, no calls without results. */
function toApi(list) {
  const answered = new Set(list.filter((m) => m.role === "tool").map((m) => m.tool_call_id));
  const out = settings.instructions ? [{ role: "system", content: settings.instructions }] : [];
  for (const message of list) {
    if (message.role !== "assistant") {
      out.push(message);
      continue;
    }
    const calls = message.tool_calls.filter((call) => answered.has(call.id));
    if (!message.content && !calls.length) continue;
    const sent = { role: "assistant", content: message.content || null };
    // reasoning matters to the model between a call and what follows from its result
    if (calls.length) Object.assign(sent, { tool_calls: calls }, message.reasoning && { reasoning: message.reasoning });
    out.push(sent);
  }
  return out;
}

function take(chunk, run) {
  const { message } = run;
  if (chunk.usage) message.meta.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const delta = choice.delta ?? {};
  const reasoning = delta.reasoning ?? delta.reasoning_content;
  if ((reasoning || delta.content || delta.tool_calls) && message.meta.first === undefined) {
    message.meta.first = (performance.now() - run.started) / 1000;
  }
  if (reasoning) {
    run.thinking ??= performance.now();
    message.reasoning += reasoning;
  }
  if (delta.content || delta.tool_calls) endThinking(run);
  message.content += delta.content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const place = Math.min(part.index ?? 0, message.tool_calls.length);
    const call = (message.tool_calls[place] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id ||= part.id ?? "";
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
  if (choice.finish_reason) message.meta.finish_reason = choice.finish_reason;
}

function endThinking(run) {
  if (run.thinking !== undefined) run.message.meta.thought ??= (performance.now() - run.thinking) / 1000;
}

function withWait(error) {
  return error.wait ? `${error.message} Try again in ${error.wait} s.` : error.message;
}

// ---- drawing

let drawing = false;

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    show();
  });
}

function show() {
  refresh();
  if (follow) toEnd();
  else at("latest").hidden = below() < 120;
}

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
  at("latest").hidden = true;
}

let lastTop = 0;
scroll.addEventListener("scroll", () => {
  const left = below();
  if (scroll.scrollTop < lastTop - 1 && left > 4) follow = false; // the reader went up
  else if (left < 40) follow = true;
  lastTop = scroll.scrollTop;
  at("latest").hidden = left < 120;
}, { passive: true });

/** Pixels of the conversation below what is in sight. */
function below() {
  return scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight;
}

function banner(text, ...buttons) {
  at("banner").hidden = !text;
  at("banner").replaceChildren(...(text ? [element("span", [text]), ...buttons] : []));
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, window.innerHeight * 0.4)}px`;
}

// ---- the server

async function askKey() {
  const given = await ask({
    title: "API key",
    text: key ? "The server did not accept the key." : "This server asks for an API key. It is kept until this tab is closed.",
    label: "Key",
    secret: true,
    action: "Continue",
  });
  if (!given?.trim()) return false;
  key = given.trim();
  store.saveKey(key);
  await connect();
  return true;
}

async function connect() {
  const select = at("model");
  try {
    const models = await listModels(key);
    select.replaceChildren(...models.map((id) => element("option", [id])));
    if (!models.includes(settings.model)) settings.model = models[0] ?? "";
    select.value = settings.model;
    banner("");
    suggest();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401 && (await askKey())) return;
    banner(error.message, textButton("Try again", "outlined", connect));
  }
}

function suggest() {
  const small = settings.model.startsWith("gpt-oss-tiny");
  const texts = small
    ? ["What is 347 + 285?", "Tom has 12 apples and buys 30 more. How many apples does he have?", "Who are you?"]
    : ["Explain attention sinks in three sentences", "Write a Python function that merges two sorted lists", "Plan a week of dinners for two, as a table"];
  at("suggestions").replaceChildren(...texts.map((text) => element("li", [textButton(text, "outlined", () => submit(text))])));
}

function change(next) {
  settings = { ...settings, ...next };
  store.saveSettings(settings);
  showActive();
}

function showActive() {
  const parts = [];
  if (settings.instructions) parts.push("instructions");
  if (settings.format !== "text") parts.push("JSON");
  const tools = settings.tools ? readTools(settings.tools).length : 0;
  if (tools) parts.push(`${tools} tool${tools === 1 ? "" : "s"}`);
  if (settings.temperature !== "") parts.push(`temperature ${settings.temperature}`);
  at("active").textContent = parts.join(" · ");
}

function nextTheme() {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("gptoss.theme", dataset.theme);
  } catch {
    // no storage: until the page is closed
  }
}

// ---- what the reader does

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit(prompt.value.trim());
});
prompt.addEventListener("input", () => {
  fit();
  send.disabled = !prompt.value.trim() || waitingCalls(conversation).length > 0;
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit(prompt.value.trim());
});
stop.addEventListener("click", () => runs.get(conversation.id)?.controller.abort());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("open")) toggleMenu(false);
  else runs.get(conversation.id)?.controller.abort();
});
at("latest").addEventListener("click", () => {
  follow = true;
  toEnd();
});
at("new").addEventListener("click", () => {
  openConversation(store.newConversation());
  showList();
  prompt.focus();
});
at("model").addEventListener("change", (event) => {
  change({ model: event.target.value });
  suggest();
});
at("effort").addEventListener("change", (event) => change({ effort: event.target.value }));
at("theme").addEventListener("click", nextTheme);
at("settings-open").addEventListener("click", () => openSettings(settings, key, (next, given) => {
  change(next);
  if (given === key) return;
  key = given;
  store.saveKey(key);
  connect();
}));

function toggleMenu(open) {
  const wide = matchMedia("(min-width: 56rem)").matches;
  if (wide) document.body.classList.toggle("closed");
  else document.body.classList.toggle("open", open);
  const shown = wide ? !document.body.classList.contains("closed") : document.body.classList.contains("open");
  at("menu").setAttribute("aria-expanded", String(shown));
  if (!wide && shown) at("new").focus();
}
at("menu").addEventListener("click", () => toggleMenu(!document.body.classList.contains("open")));
at("shade").addEventListener("click", () => toggleMenu(false));
window.addEventListener("popstate", () => {
  openFromAddress();
  showList();
});
window.addEventListener("pagehide", (event) => {
  for (const run of runs.values()) {
    if (!event.persisted) run.message.meta.stopped = true;
    store.saveConversation(run.conversation);
  }
});
store.watchConversations((id) => runs.has(id) || id === conversation.id, showList);

at("menu").setAttribute("aria-expanded", String(matchMedia("(min-width: 56rem)").matches));
at("effort").querySelector(`[value=${settings.effort}]`)?.click();
showActive();
openFromAddress();
showList();
connect();
if (matchMedia("(pointer: fine)").matches) prompt.focus();

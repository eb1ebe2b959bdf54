// How messages look: one view each, updated while the answer comes.

import { codeBlock, copyText, element, setCode, showMarkdown } from "./markdown.js";

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

/** A button with an icon; its label is spoken and shown on hover. */
export function iconButton(name, label, action) {
  const button = element("button", [icon(name)], "icon");
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => action(button));
  return button;
}

export function textButton(label, className, action) {
  const button = element("button", [label], className);
  button.type = "button";
  button.addEventListener("click", () => action(button));
  return button;
}

/** The user's message; `edit` is called with the new text. The state's `editable` says whether that is possible. */
export function userView(message, edit) {
  const bubble = element("div", [message.content], "bubble");
  const actions = element("div", [], "actions");
  const node = element("article", [bubble, actions], "message user");
  node.setAttribute("aria-label", "You");
  actions.append(iconButton("edit", "Edit and send again", () => openEditor(node, bubble, actions, edit)));
  const update = (state) => {
    actions.classList.toggle("away", !state.editable);
  };
  return { node, update };
}

function openEditor(node, bubble, actions, edit) {
  const box = element("textarea");
  box.value = bubble.textContent;
  box.setAttribute("aria-label", "Your message");
  box.rows = Math.min(10, box.value.split("\n").length + 1);
  const close = () => {
    form.remove();
    bubble.hidden = actions.hidden = false;
  };
  const cancel = textButton("Cancel", "outlined", close);
  const send = element("button", ["Send"], "filled");
  const form = element("form", [box, element("div", [cancel, send], "buttons")], "editor");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (box.value.trim()) edit(box.value.trim());
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
    event.stopPropagation();
  });
  bubble.hidden = actions.hidden = true;
  node.append(form);
  box.focus();
}

/**
 * The assistant's message: reasoning (folded), answer, tool calls, and what it took.
 *
 * `update(state)` shows the message as it is now. The state has `running`, `thinking` (seconds since the first of the
 * reasoning), `last` (it may be made again), `waiting` (for results of its calls), `results` (of tools, by call id) and the actions `again()` and
 * `answer(call, text)`.
 */
export function assistantView(message) {
  const label = element("span", [], "label");
  const thought = document.createTextNode("");
  const reasoning = element("details", [element("summary", [label]), element("div", [thought], "thought")], "reasoning");
  const answer = element("div", [], "answer");
  const calls = element("div", [], "calls");
  const notice = element("div", [], "notice");
  const numbers = element("span", [], "numbers");
  const actions = element("span", [], "actions");
  const node = element("article", [reasoning, answer, calls, notice, element("footer", [actions, numbers])],
    "message assistant");
  node.setAttribute("aria-label", "Answer");
  const cards = new Map();
  let shown = null;
  let finished = null;

  function update(state) {
    const { running } = state;
    node.setAttribute("aria-busy", String(running));
    node.classList.toggle("running", running);
    showReasoning(running, state.thinking);
    if (shown !== message.content) showAnswer();
    shown = message.content;
    for (const call of message.tool_calls) {
      if (!cards.has(call)) {
        cards.set(call, callCard(call));
        calls.append(cards.get(call).node);
      }
      cards.get(call).update(running, state);
    }
    if (!running) finish(state);
    const waits = running && !message.content && !message.reasoning && !message.tool_calls.length;
    node.classList.toggle("waiting", waits);
  }

  function showReasoning(running, seconds) {
    reasoning.hidden = !message.reasoning;
    if (reasoning.hidden) return;
    if (thought.data !== message.reasoning) {
      if (message.reasoning.startsWith(thought.data)) thought.appendData(message.reasoning.slice(thought.length));
      else thought.data = message.reasoning;
    }
    const live = running && message.meta.thought === undefined;
    reasoning.classList.toggle("live", live);
    const tokens = message.meta.usage?.completion_tokens_details?.reasoning_tokens;
    const took = live ? seconds : message.meta.thought;
    const text = `${live ? "Thinking" : "Thought"}${took === undefined ? "" : ` for ${took.toFixed(took < 0.1 ? 2 : 1)} s`}`
      + (tokens ? `, ${count(tokens, "token")}` : "");
    if (label.textContent !== text) label.textContent = text;
  }

  function showAnswer() {
    if (!message.meta.format) return showMarkdown(answer, message.content);
    showMarkdown(answer, `${FENCE}json\n${message.content}\n${FENCE}`);
  }

  function showJson() {
    try {
      const text = JSON.stringify(JSON.parse(message.content), null, 2);
      showMarkdown(answer, `${FENCE}json\n${text}\n${FENCE}`);
    } catch {
      // cut off, or not JSON: as it came
    }
  }

  function finish(state) {
    const { meta } = message;
    const now = JSON.stringify([meta, state.last, message.content.length]);
    if (now === finished) return; // focus and clicks survive
    finished = now;
    if (meta.format && message.content) showJson();
    numbers.textContent = describe(meta);
    numbers.title = [meta.model, meta.effort && `${meta.effort} effort`].filter(Boolean).join(", ");
    notice.replaceChildren();
    notice.className = `notice${meta.error ? " fault" : ""}`;
    const said = meta.error ?? ENDS[meta.stopped ? "stopped" : meta.finish_reason] ?? "";
    if (said) notice.append(element("span", [said]));
    if (meta.error && state.last) notice.append(textButton("Try again", "outlined", state.again));
    actions.replaceChildren();
    if (message.content) {
      actions.append(iconButton("copy", "Copy the answer", (button) => copyText(message.content, button, icon("check"))));
    }
    if (state.last && !meta.error) actions.append(iconButton("again", "Make this answer again", state.again));
  }

  return { node, update };
}

const FENCE = "`".repeat(64); // longer than any that an answer would hold
const ENDS = {
  length: "The answer was cut off: it reached the limit of tokens.",
  stopped: "Stopped.",
  content_filter: "The server withheld the rest.",
};

function describe(meta) {
  const usage = meta.usage;
  const parts = [];
  if (usage) {
    parts.push(count(usage.completion_tokens, "token"));
    const seconds = meta.seconds - meta.first;
    if (usage.completion_tokens > 1 && seconds > 0.05) {
      const rate = (usage.completion_tokens - 1) / seconds;
      parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en")} tokens/s`);
    }
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`prompt ${usage.prompt_tokens.toLocaleString("en")}${cached ? ` (${cached.toLocaleString("en")} cached)` : ""}`);
  }
  if (meta.first !== undefined) parts.push(`first after ${meta.first.toFixed(2)} s`);
  return parts.join(" · ");
}

function count(number, word) {
  return `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
}

/** One tool call: name, arguments, and its result or a box to type it. */
function callCard(call) {
  const name = element("strong");
  const head = element("div", [icon("tool"), element("span", ["Calls "]), name], "call-head");
  const given = codeBlock("", "arguments");
  const foot = element("div", [], "call-foot");
  const node = element("section", [head, given, foot], "call");
  let state = null;

  function update(running, next) {
    const { results } = next;
    name.textContent = call.function.name;
    node.setAttribute("aria-label", `Call of ${call.function.name}`);
    const text = running ? call.function.arguments : pretty(call.function.arguments);
    setCode(given, text, "arguments");
    const now = results.has(call.id) ? "answered" : next.waiting ? "waiting" : "open";
    if (now === state) return;
    state = now;
    foot.replaceChildren();
    if (now === "answered") foot.append(codeBlock(results.get(call.id), "result"));
    if (now === "waiting") foot.append(answerForm(call, next.answer));
  }
  return { node, update };
}

function answerForm(call, answer) {
  const box = element("textarea");
  box.rows = 2;
  box.name = "result";
  box.placeholder = "What the function returned";
  box.setAttribute("aria-label", `Result of ${call.function.name}`);
  const decline = textButton("Decline", "outlined", () => answer(call, "error: the user declined this call"));
  const send = element("button", ["Send result"], "filled");
  const form = element("form", [box, element("div", [decline, send], "buttons")]);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    answer(call, box.value);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  return form;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

// Dialogs: the settings, and one question at a time.

import { DEFAULTS } from "./store.js";

const EXAMPLE = [{
  type: "function",
  function: {
    name: "calculator",
    description: "Evaluates an arithmetic expression.",
    parameters: { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] },
  },
}];
const NAME = /^[A-Za-z0-9_-]{1,64}$/;

/** Asks; resolves to the text typed ("" where none is asked for), or null when the reader declined. */
export function ask({ title, text = "", label = "", value = "", secret = false, action, danger = false }) {
  const dialog = document.getElementById("ask");
  const form = dialog.querySelector("form");
  const input = form.elements.value;
  dialog.querySelector("#ask-title").textContent = title;
  dialog.querySelector("#ask-text").textContent = text;
  dialog.querySelector("#ask-label").textContent = label;
  input.parentElement.hidden = !label;
  input.type = secret ? "password" : "text";
  input.value = value;
  const button = form.querySelector("[type=submit]");
  button.textContent = action;
  button.classList.toggle("danger", danger);
  return new Promise((resolve) => {
    open(dialog, (accepted) => resolve(accepted ? input.value : null));
    if (label) input.select();
    else button.focus();
  });
}

/** Shows the settings; calls `save(settings, key)` with what was valid. */
export function openSettings(settings, key, save) {
  const dialog = document.getElementById("settings");
  const form = dialog.querySelector("form");
  const fields = form.elements;
  for (const name of Object.keys(DEFAULTS)) if (fields[name]) fields[name].value = settings[name];
  fields.key.value = key;
  const showSchema = () => {
    document.getElementById("schema-field").hidden = fields.format.value !== "json_schema";
  };
  fields.format.onchange = showSchema;
  document.getElementById("tools-example").onclick = () => {
    fields.tools.value = JSON.stringify(EXAMPLE, null, 2);
  };
  showSchema();
  fail(form, null, "");
  open(dialog, (accepted) => {
    if (!accepted) return true;
    const next = { ...settings };
    for (const name of Object.keys(DEFAULTS)) if (fields[name]) next[name] = fields[name].value.trim();
    const [fault, field] = check(next, fields);
    fail(form, field, fault);
    if (fault) return false;
    save(next, fields.key.value.trim());
    return true;
  });
}

function open(dialog, done) {
  const form = dialog.querySelector("form");
  let accepted = false;
  form.onsubmit = (event) => {
    event.preventDefault();
    accepted = true;
    if (done(true) !== false) dialog.close();
    else accepted = false;
  };
  form.querySelector("[value=cancel]").onclick = () => dialog.close();
  dialog.onclose = () => {
    if (!accepted) done(false);
  };
  dialog.showModal();
}

function check(settings, fields) {
  for (const [name, low, high] of [["temperature", 0, 2], ["top_p", 0, 1], ["max_tokens", 1, Infinity], ["seed", -Infinity, Infinity]]) {
    const value = Number(settings[name]);
    if (fields[name].validity.badInput || !Number.isFinite(value) || (settings[name] !== "" && (value < low || value > high))) {
      return [`${fields[name].labels[0].firstChild.textContent.trim()}: expected a number${high < Infinity ? ` from ${low} to ${high}` : low > -Infinity ? ` of ${low} or more` : ""}.`, fields[name]];
    }
  }
  try {
    readTools(settings.tools);
  } catch (error) {
    return [`Tools: ${error.message}`, fields.tools];
  }
  if (settings.format === "json_schema") {
    try {
      if (!isObject(JSON.parse(settings.schema))) throw new Error("expected a JSON object");
    } catch (error) {
      return [`JSON schema: ${error.message}`, fields.schema];
    }
  }
  return ["", null];
}

function fail(form, field, fault) {
  for (const one of form.elements) one.removeAttribute("aria-invalid");
  const line = form.querySelector(".fault");
  line.hidden = !fault;
  line.textContent = fault;
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

/** The tools as the API takes them; a bare function is wrapped. Throws an Error that says what is wrong. */
export function readTools(text) {
  if (!text) return [];
  const value = JSON.parse(text);
  const list = Array.isArray(value) ? value : [value];
  return list.map((tool) => {
    const body = isObject(tool) && "function" in tool ? tool.function : tool;
    if (!isObject(body) || !NAME.test(body.name ?? "")) {
      throw new Error("each function needs a name of letters, digits, _ and -");
    }
    return { type: "function", function: body };
  });
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

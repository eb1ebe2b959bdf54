// The list of conversations: open, rename, export, delete.

import { ask } from "./dialogs.js";
import { element } from "./markdown.js";
import { iconButton } from "./messages.js";
import { listConversations, removeConversation, saveConversation } from "./store.js";

/** Shows the list; `current` is the open conversation's id, `open(id)` and `gone(id)` say what the reader did. */
export function showSidebar(current, open, gone) {
  const list = document.getElementById("conversations");
  const items = listConversations().map((conversation) => {
    const title = element("button", [conversation.title || "Untitled"], "title");
    title.type = "button";
    title.title = conversation.title;
    title.addEventListener("click", () => open(conversation.id));
    const named = `“${conversation.title || "Untitled"}”`;
    const item = element("li", [title, element("span", [
      iconButton("edit", `Rename ${named}`, () => rename(conversation, () => showSidebar(current, open, gone))),
      iconButton("export", `Export ${named} as JSON`, () => download(conversation)),
      iconButton("delete", `Delete ${named}`, () => remove(conversation, gone)),
    ], "actions")]);
    if (conversation.id === current) {
      item.className = "current";
      title.setAttribute("aria-current", "page");
    }
    return item;
  });
  list.replaceChildren(...items);
}

async function rename(conversation, done) {
  const title = await ask({ title: "Rename", label: "Title", value: conversation.title, action: "Rename" });
  if (!title?.trim()) return;
  conversation.title = title.trim();
  saveConversation(conversation);
  done();
}

async function remove(conversation, gone) {
  const text = `“${conversation.title || "Untitled"}” is kept nowhere else.`;
  const answer = await ask({ title: "Delete this conversation?", text, action: "Delete", danger: true });
  if (answer === null) return;
  removeConversation(conversation.id);
  gone(conversation.id);
}

function download(conversation) {
  const text = JSON.stringify(conversation, null, 2);
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `${conversation.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation"}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

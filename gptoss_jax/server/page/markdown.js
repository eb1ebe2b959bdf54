// Markdown as DOM nodes, as it streams in.
//
// Model output is never HTML: every character ends in a text node or in the href of an http(s) link. Images are not
// loaded (they would tell another server what was said): they show as links. Nesting is bounded, work is linear.

const DEEPEST = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const DIVIDER = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?$/;

/** Shows `source` in `container`; blocks that did not change keep their nodes (selection, focus, scroll). */
export function showMarkdown(container, source) {
  const next = parseBlocks(source, 0);
  const shown = container.blocks ?? [];
  next.forEach((block, i) => {
    const old = shown[i];
    block.node = old?.node;
    if (old && old.kind === block.kind && old.raw === block.raw) return;
    if (old && old.kind === "code" && block.kind === "code") return setCode(block.node, block.text, block.language);
    block.node = renderBlock(block, 0);
    if (old) container.replaceChild(block.node, old.node);
    else container.append(block.node);
  });
  shown.slice(next.length).forEach((block) => block.node.remove());
  container.blocks = next;
}

/** A block of code with its language and a button that copies it. */
export function codeBlock(text, language) {
  return renderCode({ text, language });
}

function parseBlocks(source, depth) {
  const lines = source.split(/\r\n?|\n/);
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const start = at;
    const block = readBlock(lines, at, depth);
    at = block.end;
    blocks.push({ ...block, raw: lines.slice(start, at).join("\n") });
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  let found;
  if ((found = FENCE.exec(line))) return readCode(lines, at, found);
  if ((found = HEADING.exec(line))) return { kind: "heading", level: found[1].length, text: found[2].trim().replace(/(?:^|\s)#+$/, "").trim(), end: at + 1 };
  if (RULE.test(line)) return { kind: "rule", end: at + 1 };
  if (isTable(lines, at)) return readTable(lines, at);
  if (depth < DEEPEST && QUOTE.test(line)) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    const inner = lines.slice(at, end).map((l) => l.replace(QUOTE, ""));
    return { kind: "quote", children: parseBlocks(inner.join("\n"), depth + 1), end };
  }
  if (depth < DEEPEST && ITEM.test(line)) return readList(lines, at, depth);
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
  return { kind: "paragraph", text: lines.slice(at, end).map((l) => l.trimStart()).join("\n"), end };
}

function interrupts(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || isTable(lines, at)
    || (item !== null && item[3] !== "" && (/[-*+]/.test(item[2]) || /^1[.)]/.test(item[2])));
}

function readCode(lines, at, [, fence, info]) {
  const close = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !close.test(lines[end])) end++;
  const language = info.trim().split(/\s/)[0];
  return { kind: "code", language, text: lines.slice(at + 1, end).join("\n"), end: Math.min(end + 1, lines.length) };
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1].trim())
    && cells(lines[at]).length === cells(lines[at + 1]).length;
}

function readTable(lines, at) {
  const align = cells(lines[at + 1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "right") : ""));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  const rows = lines.slice(at + 2, end).map((line) => cells(line).slice(0, align.length));
  return { kind: "table", align, head: cells(lines[at]), rows, end };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function readList(lines, at, depth) {
  const [, indent, first] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first);
  const items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || /\d/.test(item[2]) !== ordered || width(item[1]) > width(indent) + 1 || RULE.test(lines[at])) break;
    const inset = width(item[1]) + item[2].length + 1;
    const inner = [lines[at].slice(item[0].length)];
    at++;
    while (at < lines.length) {
      const blank = !lines[at].trim();
      const next = lines[blank ? at + 1 : at];
      if (next === undefined) break;
      const inside = next.trim() !== "" && width(next) >= Math.min(inset, width(indent) + 2);
      const lazy = !blank && !ITEM.test(next) && !interrupts(lines, at);
      if (!inside && !lazy) break;
      inner.push(lines[at].slice(Math.min(inset, width(lines[at]))));
      at++;
    }
    items.push(parseBlocks(inner.join("\n"), depth + 1));
    if (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at++;
  }
  return { kind: "list", ordered, start: parseInt(first, 10), items, end: at };
}

function width(text) {
  return /^[ \t]*/.exec(text)[0].length;
}

function renderBlock(block, depth) {
  if (block.kind === "code") return renderCode(block);
  if (block.kind === "rule") return element("hr");
  if (block.kind === "heading") return element(`h${Math.min(block.level + 1, 6)}`, inline(block.text, depth));
  if (block.kind === "quote") return element("blockquote", renderAll(block.children));
  if (block.kind === "table") return renderTable(block, depth);
  if (block.kind !== "list") return element("p", inline(block.text, depth));
  const list = element(block.ordered ? "ol" : "ul", block.items.map((item) => element("li", tight(item))));
  if (block.ordered && block.start !== 1) list.start = block.start;
  return list;
}

function renderAll(blocks) {
  return blocks.map((block) => renderBlock(block, 0));
}

function tight(blocks) {
  return blocks.flatMap((b) => (b.kind === "paragraph" ? [element("span", inline(b.text, 0))] : [renderBlock(b, 0)]));
}

function renderCode(block) {
  const copy = element("button", ["Copy"]);
  copy.type = "button";
  copy.className = "copy";
  const code = element("code", [block.text]);
  copy.addEventListener("click", () => copyText(code.textContent, copy));
  const name = element("span", [block.language || "text"]);
  const head = element("div", [name, copy]);
  head.className = "code-head";
  const text = element("pre", [code]);
  text.tabIndex = 0;
  const node = element("figure", [head, text]);
  node.className = "code-block";
  return node;
}

/** Changes what a block of code shows. */
export function setCode(node, text, language) {
  const [name, code] = [node.querySelector("span"), node.querySelector("code")];
  if (name.textContent !== (language || "text")) name.textContent = language || "text";
  if (code.textContent !== text) code.textContent = text;
}

/** Copies, and shows `done` on the button for a moment. */
export async function copyText(text, button, done = "Copied") {
  if (button.disabled) return;
  const before = [...button.childNodes];
  button.disabled = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    if (!copySelected(text)) done = "No access"; // pages over plain http have no clipboard
  }
  button.replaceChildren(done);
  setTimeout(() => {
    button.replaceChildren(...before);
    button.disabled = false;
  }, 1200);
}

function copySelected(text) {
  const focused = document.activeElement;
  const box = element("textarea");
  box.value = text;
  document.body.append(box);
  box.select();
  const copied = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return copied;
}

function renderTable(block, depth) {
  const row = (texts, tag) => element("tr", block.align.map((align, i) => {
    const cell = element(tag, inline(texts[i] ?? "", depth));
    if (align) cell.className = align;
    return cell;
  }));
  const table = element("table", [element("thead", [row(block.head, "th")]),
    element("tbody", block.rows.map((texts) => row(texts, "td")))]);
  const wrap = element("div", [table]);
  wrap.className = "table";
  wrap.tabIndex = 0;
  return wrap;
}

const SPECIAL = /[\\`*_~[!\nh]/g;
const LINK = /!?\[((?:[^[\]\\]|\\[^])*)\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`|]{1,2000}/y;
const MARKS = [["***", "em"], ["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

/** Nodes of one run of text; `links` is false inside a link. */
function inline(text, depth, links = true) {
  const nodes = [];
  const missing = new Set(); // closing marks that do not come any more
  let plain = 0;
  let at = 0;
  const put = (until, node, next) => {
    if (until > plain) nodes.push(text.slice(plain, until));
    if (node !== null) nodes.push(node);
    plain = at = next;
  };
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const found = SPECIAL.exec(text);
    if (!found) break;
    at = found.index;
    if (found[0] === "\n") put(at, element("br"), at + 1);
    else if (found[0] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      put(at, null, at + 1);
      at++;
    } else {
      const read = found[0] === "`" ? readInlineCode(text, at, missing, put)
        : "[!h".includes(found[0]) ? links && (readLink(text, at, depth, put) || readAddress(text, at, put))
        : readMark(text, at, depth, missing, put);
      if (!read) at++;
    }
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

function readInlineCode(text, at, missing, put) {
  const span = codeSpan(text, at, missing);
  if (!span) return false;
  const code = text.slice(span.start, span.end).replaceAll("\n", " ");
  put(at, element("code", [/^ .* $/.test(code) ? code.slice(1, -1) : code]), span.next);
  return true;
}

/** Where the code lies that begins at `at`, or null. */
function codeSpan(text, at, missing) {
  let start = at;
  while (text[start] === "`") start++;
  const run = text.slice(at, start);
  if (missing.has(run)) return null;
  let end = text.indexOf(run, start);
  while (end >= 0 && text[end + run.length] === "`") {
    end += run.length;
    while (text[end] === "`") end++;
    end = text.indexOf(run, end);
  }
  if (end >= 0) return { start, end, next: end + run.length };
  missing.add(run);
  return null;
}

function readLink(text, at, depth, put) {
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  if (!found) return false;
  const label = depth < DEEPEST ? inline(found[1], depth + 1, false) : [found[1]];
  put(at, link(found[2], label.length ? label : [found[2]]) ?? found[0], LINK.lastIndex);
  return true;
}

function readAddress(text, at, put) {
  ADDRESS.lastIndex = at;
  if (/\w/.test(text[at - 1] ?? "") || !ADDRESS.test(text)) return false;
  let address = text.slice(at, ADDRESS.lastIndex).replace(/[.,;:!?*_~\]]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  const node = link(address, [address]);
  if (!node) return false;
  put(at, node, at + address.length);
  return true;
}

function readMark(text, at, depth, missing, put) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at) || missing.has(mark)) continue;
    const before = text[at - 1] ?? " ";
    const after = text[at + mark.length] ?? " ";
    if (/\s/.test(after) || depth >= DEEPEST || (mark[0] === "_" && /\w/.test(before))) continue;
    const end = closing(text, mark, at + mark.length, missing);
    if (end < 0) {
      missing.add(mark);
      continue;
    }
    const inner = inline(text.slice(at + mark.length, end), depth + 1);
    put(at, element(tag, mark === "***" ? [element("strong", inner)] : inner), end + mark.length);
    return true;
  }
  return false;
}

function closing(text, mark, from, missing) {
  let code = text.indexOf("`", from);
  for (let end = text.indexOf(mark, from); end >= 0; end = text.indexOf(mark, end + mark.length)) {
    while (code >= 0 && code < end) { // code binds closer than marks
      const span = codeSpan(text, code, missing);
      const next = span?.next ?? code + /^`+/.exec(text.slice(code))[0].length;
      if (next > end) end = text.indexOf(mark, next);
      code = text.indexOf("`", next);
      if (end < 0) return -1;
    }
    const after = text[end + mark.length] ?? " ";
    if (end === from || /\s/.test(text[end - 1]) || text[end - 1] === "\\") continue;
    if (mark[0] === "_" && /\w/.test(after)) continue;
    if (mark.length === 1 && after === mark) {
      end++; // half of a double mark
      continue;
    }
    return end;
  }
  return -1;
}

function link(address, label) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  const node = element("a", label);
  node.href = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  node.title = url.href;
  return node;
}

/** A node with children; strings become text nodes. */
export function element(tag, children = [], className = "") {
  const node = document.createElement(tag);
  node.append(...children);
  if (className) node.className = className;
  return node;
}

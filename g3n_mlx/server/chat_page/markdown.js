// Markdown: text to blocks, blocks to DOM nodes. CommonMark's everyday part, tables and strikethrough; HTML stays text.

const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}>[ \t]?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const FORMULA = /^ {0,3}(\\\[|\$\$)/; // to its end, over lines
const NOTE = /^ {0,3}\[\^([^\]\s]{1,40})\]:[ \t]*(.*)$/; // of a footnote
const DEEPEST = 12; // blocks inside each other; what is deeper is plain text

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  const beginsBlock = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || FORMULA.test(line) || NOTE.test(line);
  const isTable = (i) => lines[i].includes("|") && i + 1 < lines.length && lines[i + 1].includes("-")
    && DIVIDER.test(lines[i + 1]) && cellsOf(lines[i]).length === cellsOf(lines[i + 1]).length;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (isBlank(line)) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const [, indent, fence, info] = match;
      const end = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
      const code = [];
      for (at++; at < lines.length && !end.test(lines[at]); at++) {
        code.push(lines[at].replace(new RegExp(`^ {0,${indent.length}}`), ""));
      }
      at++;
      blocks.push({ kind: "code", language: info.trim().split(/\s/)[0], text: code.join("\n") });
    } else if ((match = FORMULA.exec(line)) && (match = formulaLines(lines, at, match[1]))) {
      blocks.push({ kind: "formula", text: match.text });
      at = match.end;
    } else if ((match = NOTE.exec(line))) {
      const words = [match[2].trim()];
      for (at++; at < lines.length && !isBlank(lines[at]) && !beginsBlock(lines[at]); at++) words.push(lines[at].trim());
      blocks.push({ kind: "note", label: match[1], text: words.join("\n") });
    } else if ((match = HEADING.exec(line))) {
      blocks.push({ kind: "heading", level: match[1].length, text: match[2] || "" });
      at++;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule" });
      at++;
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      const inner = [];
      while (at < lines.length && (QUOTE.test(lines[at]) || !(isBlank(lines[at]) || beginsBlock(lines[at])))) {
        inner.push(lines[at++].replace(QUOTE, ""));
      }
      blocks.push({ kind: "quote", blocks: parseBlocks(inner, depth + 1) });
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const list = parseList(lines, at, depth, beginsBlock);
      blocks.push(list.block);
      at = list.end;
    } else if (isTable(at)) {
      const sides = cellsOf(lines[at + 1]).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "center" : "right") : ""));
      const rows = [cellsOf(lines[at])];
      for (at += 2; at < lines.length && !isBlank(lines[at]) && lines[at].includes("|"); at++) rows.push(cellsOf(lines[at]));
      blocks.push({ kind: "table", sides, rows });
    } else {
      const words = [line.trim()];
      for (at++; at < lines.length; at++) {
        if (isBlank(lines[at]) || beginsBlock(lines[at]) || isTable(at)) break;
        if (ITEM.test(lines[at]) && /\S/.test(lines[at].replace(ITEM, ""))) break;
        words.push(lines[at].trim());
      }
      blocks.push({ kind: "paragraph", text: words.join("\n") });
    }
  }
  return blocks;
}

/** A formula that has its lines to itself: its text and the line behind it; null where it does not end so. */
function formulaLines(lines, at, opened) {
  const closed = opened === "$$" ? "$$" : "\\]", found = [];
  for (let i = at, rest = lines[at].trim().slice(2); i < lines.length && i < at + 200; rest = (lines[++i] || "").trim()) {
    if (i > at && isBlank(lines[i])) return null;
    const end = rest.indexOf(closed);
    if (end >= 0 && !/^[.,;]?$/.test(rest.slice(end + 2).trim())) return null;
    found.push(end < 0 ? rest : rest.slice(0, end));
    if (end >= 0) return { text: found.join("\n"), end: i + 1 };
  }
  return null;
}

function parseList(lines, at, depth, beginsBlock) {
  const [, margin, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark), items = [];
  const isNext = (line) => {
    const next = ITEM.exec(line);
    return next !== null && /\d/.test(next[2]) === ordered && next[1].length < margin.length + 2 && !RULE.test(line);
  };
  const nextText = (i) => {
    while (i < lines.length && isBlank(lines[i])) i++;
    return i;
  };
  while (at < lines.length && isNext(lines[at])) {
    const head = ITEM.exec(lines[at])[0];
    const inner = [lines[at].slice(head.length)];
    const strip = new RegExp(`^[ \\t]{0,${Math.max(head.length, margin.length + 2)}}`);
    for (at++; at < lines.length; at++) {
      if (isBlank(lines[at])) {
        const next = nextText(at);
        if (next === lines.length || indentOf(lines[next]) < margin.length + 2) break;
        inner.push("");
      } else if (indentOf(lines[at]) >= margin.length + 2) {
        inner.push(lines[at].replace(strip, ""));
      } else if (ITEM.test(lines[at]) || beginsBlock(lines[at])) {
        break;
      } else {
        inner.push(lines[at].trim());
      }
    }
    items.push(parseBlocks(inner, depth + 1));
    const next = nextText(at);
    if (next < lines.length && isNext(lines[next])) at = next;
  }
  return { block: { kind: "list", ordered, start: ordered ? parseInt(mark, 10) : 1, items }, end: at };
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  const cells = [];
  let from = 0;
  for (let at = 0; at < inner.length; at++) {
    if (inner[at] === "\\") at = escapeEnd(inner, at) - 1; // the bars of a formula divide no cells
    else if (inner[at] === "|") {
      cells.push(inner.slice(from, at));
      from = at + 1;
    }
  }
  cells.push(inner.slice(from));
  return cells.map((cell) => cell.trim().replace(/\\\|/g, "|"));
}

function render(block) {
  switch (block.kind) {
    case "code": {
      const code = make("code", "", ...coloured(block.text, block.language));
      const pre = make("pre", "", code);
      pre.tabIndex = 0; // long lines are scrolled by keyboard too
      return make("div", "block", make("div", "", make("span", "", block.language || "text"), copier(() => block.text)), pre);
    }
    case "heading": {
      const heading = make(`h${block.level}`);
      renderInline(block.text, heading);
      return heading;
    }
    case "formula":
      return formula(block.text, true);
    case "note": {
      const note = make("p", "note", noteLink(block.label, "backlink"), " ");
      renderInline(block.text, note);
      return note;
    }
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", "", ...block.blocks.map(render));
    case "list": {
      const list = make(block.ordered ? "ol" : "ul");
      if (block.start !== 1) list.start = block.start;
      for (const blocks of block.items) {
        const item = make("li");
        const [first, ...rest] = blocks;
        if (first && first.kind === "paragraph") {
          const box = /^\[([ xX])\] /.exec(first.text);
          renderInline(box ? (box[1] === " " ? "☐ " : "☑ ") + first.text.slice(4) : first.text, item);
        } else if (first) {
          item.append(render(first));
        }
        item.append(...rest.map(render));
        list.append(item);
      }
      return list;
    }
    case "table": {
      const [head, ...rows] = block.rows;
      const row = (cells, tag) => make("tr", "", ...block.sides.map((side, i) => {
        const cell = make(tag, side && `to-${side}`);
        renderInline(cells[i] || "", cell);
        return cell;
      }));
      const table = make("table", "", make("thead", "", row(head, "th")), make("tbody", "", ...rows.map((r) => row(r, "td"))));
      const scroll = make("div", "scroll", table);
      scroll.tabIndex = 0;
      return scroll;
    }
    default: {
      const paragraph = make("p");
      renderInline(block.text, paragraph);
      return paragraph;
    }
  }
}

const INLINE = /\\([!-/:-@[-`{-~])|(`+)|(!?)\[|<((?:https?:\/\/|mailto:)[^\s<>]+)>|(https?:\/\/[^\s<>"]+)|(\*{1,3}|_{1,3}|~~)|(\n|<br ?\/?>)|(\$\$?)|(&(?:#x[0-9a-fA-F]{1,6}|#\d{1,7}|\w{2,10});)/g;
const TARGET = /\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+(?:"[^"]*"|'[^']*'|\([^)]*\)))?\s*\)/y;
const STYLES = { "*": ["em"], _: ["em"], "**": ["strong"], __: ["strong"], "***": ["strong", "em"], ___: ["strong", "em"], "~~": ["del"] };

const FOOTMARK = /^\[\^([^\]\s]{1,40})\]/;

function renderInline(text, into, depth = 0, inLink = false) {
  const token = new RegExp(INLINE);
  const unclosed = new Set(); // what has no end from here on has none further on either
  let plain = 0, match, label;
  const upTo = (end) => { if (end > plain) into.append(text.slice(plain, end)); };
  const goOn = (end) => { plain = token.lastIndex = end; };
  while ((match = token.exec(text))) {
    const at = match.index;
    const [all, escaped, ticks, bang, angled, address, mark, , dollars, reference] = match;
    const opens = dollars || (escaped === "(" || escaped === "[" ? all : null);
    const inside = opens && !unclosed.has(opens) ? formulaEnd(text, at + all.length, opens) : null;
    if (opens && !inside && opens !== "$") unclosed.add(opens);
    if (inside) {
      upTo(at);
      into.append(formula(text.slice(at + all.length, inside.end), opens === "\\[" || opens === "$$"));
      goOn(inside.after);
    } else if (dollars) {
      continue;
    } else if (reference) {
      upTo(at);
      into.append(character(reference));
      goOn(at + all.length);
    } else if (escaped) {
      upTo(at);
      goOn(at + 1);
      token.lastIndex = at + 2;
    } else if (ticks) {
      const end = unclosed.has(ticks) ? -1 : codeEnd(text, at + ticks.length, ticks);
      if (end < 0) {
        unclosed.add(ticks);
        continue;
      }
      upTo(at);
      let code = text.slice(at + ticks.length, end).replace(/\n/g, " ");
      if (/^ .*[^ ].* $/.test(code)) code = code.slice(1, -1);
      into.append(make("code", "", code));
      goOn(end + ticks.length);
    } else if (bang === "" && text[at + 1] === "^" && (label = FOOTMARK.exec(text.slice(at, at + 50)))) {
      upTo(at);
      into.append(inLink ? make("sup", "", label[1]) : noteLink(label[1], "noteref"));
      goOn(at + label[0].length);
    } else if (bang !== undefined) {
      const end = inLink || unclosed.has("[") || depth > DEEPEST ? -1 : bracketEnd(text, at + all.length);
      if (end < 0) {
        unclosed.add("[");
        continue;
      }
      TARGET.lastIndex = end + 1;
      const target = TARGET.exec(text);
      if (!target) continue;
      const after = TARGET.lastIndex; // which links inside the label change
      upTo(at);
      const label = text.slice(at + all.length, end);
      const link = linkTo(target[1].replace(REFERENCE, character));
      renderInline(label || target[1], link, depth + 1, true); // a picture too: nothing is fetched
      into.append(link);
      goOn(after);
    } else if (angled || address) {
      if (inLink) continue;
      const url = angled || trimmed(address);
      upTo(at);
      const link = linkTo(url);
      link.append(url);
      into.append(link);
      goOn(at + (angled ? all.length : url.length));
    } else if (mark) {
      const word = /[\p{L}\p{N}]/u;
      const opens = /\S/.test(text[at + mark.length] || " ") && !(mark[0] === "_" && word.test(text[at - 1] || " "));
      const end = opens && !unclosed.has(mark) && depth <= DEEPEST ? styleEnd(text, at + mark.length, mark) : -1;
      if (end < 0) {
        if (opens) unclosed.add(mark);
        continue;
      }
      upTo(at);
      const nodes = STYLES[mark].map((tag) => make(tag));
      nodes.reduce((outer, inner) => (outer.append(inner), inner));
      renderInline(text.slice(at + mark.length, end), nodes.at(-1), depth + 1, inLink);
      into.append(nodes[0]);
      goOn(end + mark.length);
    } else {
      upTo(at);
      into.append(make("br"));
      goOn(at + all.length);
    }
  }
  upTo(text.length);
}

function trimmed(address) {
  // What ends a sentence or closes a bracket before the address ends no address.
  for (;;) {
    const shorter = address.replace(/[.,:;!?'"\]*_~]+$/, "");
    const unpaired = shorter.endsWith(")") && shorter.split(")").length > shorter.split("(").length;
    if (!unpaired) return shorter;
    address = shorter.slice(0, -1);
  }
}

function linkTo(url) {
  let known = null;
  try {
    known = ["http:", "https:", "mailto:"].includes(new URL(url).protocol);
  } catch { /* a relative address leads nowhere here */ }
  if (!known) return make("span");
  const link = make("a");
  link.href = url;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

/** Where an escaped character, or a formula that begins with a backslash, ends. */
function escapeEnd(text, at) {
  const closed = { "(": "\\)", "[": "\\]" }[text[at + 1]];
  const end = closed ? text.slice(at + 2, at + 2000).indexOf(closed) : -1;
  return end < 0 ? at + 2 : at + end + 4;
}

function codeEnd(text, from, ticks) {
  for (let at = from; (at = text.indexOf(ticks, at)) >= 0;) {
    let end = at;
    while (text[end] === "`") end++;
    if (end - at === ticks.length) return at;
    at = end;
  }
  return -1;
}

function bracketEnd(text, from) {
  for (let at = from, open = 1; at < text.length && at < from + 2000; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "[") open++;
    else if (text[at] === "]" && --open === 0) return at;
  }
  return -1;
}

function styleEnd(text, from, mark) {
  for (let at = from; at < text.length; at++) {
    if (text[at] === "\\") {
      at = escapeEnd(text, at) - 1;
    } else if (text[at] === "`") {
      let run = at;
      while (text[run] === "`") run++;
      const end = codeEnd(text, run, text.slice(at, run));
      at = (end < 0 ? run : end + run - at) - 1;
    } else if (text[at] === mark[0]) {
      let run = at;
      while (text[run] === mark[0]) run++;
      const fits = run - at === mark.length || (run - at === 3 && mark[0] !== "~");
      const inWord = mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[run] || " ");
      if (fits && at > from && !inWord && /\S/.test(text[at - 1])) return run - mark.length;
      at = run - 1;
    }
  }
  return -1;
}

/** Words that grow: blocks that stay the same keep their nodes, so that what is selected stays selected. */
class Words {
  constructor(node) {
    this.node = node;
    this.keys = [];
  }

  show(text) {
    const blocks = parseBlocks(text.replace(/\r\n?/g, "\n").split("\n"));
    const keys = blocks.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < keys.length && keys[same] === this.keys[same]) same++;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...blocks.slice(same).map(render));
    this.keys = keys;
    linkNotes(this.node);
  }
}

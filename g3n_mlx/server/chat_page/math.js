// LaTeX between \( \), \[ \], $$ $$ and $ $, as MathML: Temml makes the nodes, and trusts nothing in them.

const LONGEST_FORMULA = 5000; // characters; Temml's macros could make much of more

/** A formula's node, or its source as code where it is no LaTeX. */
function formula(source, displayMode) {
  const node = make(displayMode ? "div" : "span", displayMode ? "formula scroll" : "formula");
  try {
    if (source.length > LONGEST_FORMULA) throw new Error("too long");
    temml.render(source, node, { displayMode, throwOnError: true, trust: false, maxExpand: 200, maxSize: [20, 20] });
  } catch {
    node.replaceChildren(make("code", "", source));
  }
  return node;
}

/** Where a formula that begins before `from` ends, and its closing mark; null when nothing closes it. */
function formulaEnd(text, from, opened) {
  const closed = { "\\(": "\\)", "\\[": "\\]", $$: "$$", $: "$" }[opened];
  let end = text.indexOf(closed, from);
  if (opened === "$") {
    // A price is no formula: nothing blank inside the marks, no digit behind them, and all in one line.
    const line = text.indexOf("\n", from);
    if (/\s/.test(text[from] || " ") || (line >= 0 && line < end)) return null;
    if (end >= 0 && (/[\s\\]/.test(text[end - 1]) || /\d/.test(text[end + 1] || ""))) return null;
  }
  return end <= from ? null : { end, after: end + closed.length };
}

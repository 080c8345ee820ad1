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

const ENTITIES = {
  amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", copy: "©", reg: "®", trade: "™", hellip: "…",
  mdash: "—", ndash: "–", lsquo: "‘", rsquo: "’", ldquo: "“", rdquo: "”", laquo: "«", raquo: "»", bull: "•",
  middot: "·", sect: "§", para: "¶", deg: "°", plusmn: "±", times: "×", divide: "÷", minus: "−", ne: "≠", le: "≤",
  ge: "≥", asymp: "≈", equiv: "≡", infin: "∞", radic: "√", sum: "∑", prod: "∏", int: "∫", part: "∂", nabla: "∇",
  isin: "∈", cap: "∩", cup: "∪", sub: "⊂", sup: "⊃", forall: "∀", exist: "∃", empty: "∅", and: "∧", or: "∨", not: "¬",
  larr: "←", uarr: "↑", rarr: "→", darr: "↓", harr: "↔", rArr: "⇒", hArr: "⇔", euro: "€", pound: "£", yen: "¥",
  cent: "¢", micro: "µ", frac12: "½", frac14: "¼", frac34: "¾", sup2: "²", sup3: "³", alpha: "α", beta: "β",
  gamma: "γ", delta: "δ", epsilon: "ε", theta: "θ", lambda: "λ", mu: "μ", pi: "π", sigma: "σ", tau: "τ", phi: "φ",
  omega: "ω", Delta: "Δ", Sigma: "Σ", Omega: "Ω", check: "✓", hearts: "♥",
};

/** The character of a reference such as &amp; or &#8212;, or its text where it names none. */
function character(reference) {
  const [, hex, decimal, name] = /^&(?:#x([0-9a-f]+)|#(\d+)|(\w+));$/i.exec(reference);
  if (name) return Object.hasOwn(ENTITIES, name) ? ENTITIES[name] : reference;
  const code = hex ? parseInt(hex, 16) : parseInt(decimal, 10);
  return code > 0 && code <= 0x10ffff && !(code >= 0xd800 && code < 0xe000) ? String.fromCodePoint(code) : "\ufffd";
}

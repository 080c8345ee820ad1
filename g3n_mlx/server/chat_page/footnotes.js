// Footnotes: links from the text to a note and back again.

const cameFrom = new WeakMap(); // a note's link back: the link that the reader followed

/** A raised link; kind: "noteref" in the text, "backlink" at the note. It leads somewhere once `linkNotes` has found its other end. */
function noteLink(label, kind) {
  const link = make("a", kind, label);
  link.setAttribute("role", `doc-${kind}`);
  link.setAttribute("aria-label", kind === "noteref" ? `Footnote ${label}` : `Back to the text from footnote ${label}`);
  link.addEventListener("click", (event) => {
    event.preventDefault(); // the address names the conversation
    const origin = cameFrom.get(link);
    const ends = [...link.closest(".words").querySelectorAll(kind === "noteref" ? ".backlink" : ".noteref")];
    const end = origin?.isConnected ? origin : ends.find(({ textContent }) => textContent === label);
    if (kind === "noteref" && end) cameFrom.set(end, link);
    end?.focus();
  });
  return make("sup", "", link);
}

/** Makes links of those whose other end is there: a note may come later, or never. */
function linkNotes(root) {
  const labelsOf = (kind) => new Set([...root.querySelectorAll(`.${kind}`)].map(({ textContent }) => textContent));
  const both = labelsOf("noteref").intersection(labelsOf("backlink"));
  for (const link of root.querySelectorAll(".noteref, .backlink")) {
    if (both.has(link.textContent)) link.setAttribute("href", "#");
    else link.removeAttribute("href");
  }
}

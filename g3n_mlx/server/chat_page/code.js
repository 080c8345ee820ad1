// Colours of code: comments, strings, numbers and the words that most languages reserve. Names of other things stay plain.

const HASHED = new Set("py python sh bash shell zsh console yaml yml toml ini ruby rb r perl make makefile dockerfile".split(" "));
const DASHED = new Set("sql lua haskell hs ada".split(" "));
const UNCOLOURED = new Set(["", "text", "txt", "plain", "md", "markdown", "output"]);
const LONGEST_COLOURED = 50_000; // characters; what is longer stays plain

const KEYWORDS = new Set(`
  abstract and as assert async await begin break case catch class const continue def default del delete do done
  echo elif else elsif end enum except export extends extern false False fi final finally fn for foreach from
  func function global go goto if impl implements import in include instanceof interface is lambda let loop
  match mod module mut namespace new nil None nonlocal not null or package pass private protected pub public
  raise ref return self static struct super switch template then this throw throws trait true True try type
  typedef typeof union unless until unsafe use using var virtual void when where while with yield select insert
  update delete create table join group order by having limit values set SELECT INSERT UPDATE DELETE CREATE
  TABLE JOIN GROUP ORDER BY HAVING LIMIT VALUES SET FROM WHERE AND OR NOT NULL AS ON INTO
`.trim().split(/\s+/));

const COMMENTS = { hashed: "#[^\\n]*", dashed: "--[^\\n]*", slashed: "\\/\\/[^\\n]*|\\/\\*(?:[^*]|\\*(?!\\/))*(?:\\*\\/)?" };
const STRINGS = "\"\"\"[^]*?(?:\"\"\"|$)|'''[^]*?(?:'''|$)|\"(?:[^\"\\\\\\n]|\\\\.)*\"?|'(?:[^'\\\\\\n]|\\\\.)*'?|`(?:[^`\\\\]|\\\\.)*`?";

/** Text nodes and spans that make up the code. */
function coloured(text, language) {
  const name = language.toLowerCase();
  if (UNCOLOURED.has(name) || text.length > LONGEST_COLOURED) return [text];
  const comment = COMMENTS[HASHED.has(name) ? "hashed" : DASHED.has(name) ? "dashed" : "slashed"];
  const token = new RegExp(`(${comment})|(${STRINGS})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`, "g");
  const nodes = [];
  let plain = 0;
  for (const match of text.matchAll(token)) {
    const kind = match[1] ? "comment" : match[2] ? "string" : match[3] ? "number" : KEYWORDS.has(match[4]) ? "keyword" : "";
    if (!kind) continue;
    if (match.index > plain) nodes.push(text.slice(plain, match.index));
    nodes.push(make("span", `code-${kind}`, match[0]));
    plain = match.index + match[0].length;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

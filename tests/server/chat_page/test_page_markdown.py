"""What the chat page makes of markdown, LaTeX and code."""

import random

import pytest
from asking import ask, instead
from playwright.sync_api import expect

RENDER = """(sources) => sources.map((source) => {
  const node = make("div");
  new Words(node).show(source);
  return node.innerHTML;
})"""
OUT = 'target="_blank" rel="noopener noreferrer"'
MARKDOWN = [
    ("Hello", "<p>Hello</p>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("**b** *i* ~~d~~ `c`", "<p><strong>b</strong> <em>i</em> <del>d</del> <code>c</code></p>"),
    ("***b***", "<p><strong><em>b</em></strong></p>"),
    ("__b__ _i_ snake_case_name 2 * 3 * 4", "<p><strong>b</strong> <em>i</em> snake_case_name 2 * 3 * 4</p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"),
    ("**a `*` b**", "<p><strong>a <code>*</code> b</strong></p>"),
    ("**never closed", "<p>**never closed</p>"),
    (r"\*a\* \<b\>", "<p>*a* &lt;b&gt;</p>"),
    ("`` a ` b ``", "<p><code>a ` b</code></p>"),
    ("# One\n### Three ###", "<h1>One</h1><h3>Three</h3>"),
    ("#hashtag", "<p>#hashtag</p>"),
    ("---", "<hr>"),
    ("> a\n> b\nc\n\nd", "<blockquote><p>a<br>b<br>c</p></blockquote><p>d</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("* a\n\n* b\n\nc", "<ul><li>a</li><li>b</li></ul><p>c</p>"),
    ("3. a\n4. b\n\n   c", '<ol start="3"><li>a</li><li>b<p>c</p></li></ol>'),
    ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("text:\n- a\n- b", "<p>text:</p><ul><li>a</li><li>b</li></ul>"),
    ("- [ ] a\n- [x] b", "<ul><li>☐ a</li><li>☑ b</li></ul>"),
    ("[a](https://b.c/d)", f'<p><a href="https://b.c/d" {OUT}>a</a></p>'),
    ("[a](javascript:alert)", "<p><span>a</span></p>"),
    ("[a](JaVaScRiPt:alert%281%29)", "<p><span>a</span></p>"),
    ("[a](data:text/html,x)", "<p><span>a</span></p>"),
    ("[a](/relative)", "<p><span>a</span></p>"),
    ("![cat](https://b.c/d.png)", f'<p><a href="https://b.c/d.png" {OUT}>cat</a></p>'),
    ("<javascript:alert>", "<p>&lt;javascript:alert&gt;</p>"),
    ("see https://a.b/c_d(e).", f'<p>see <a href="https://a.b/c_d(e)" {OUT}>https://a.b/c_d(e)</a>.</p>'),
    ("(https://a.b/)", f'<p>(<a href="https://a.b/" {OUT}>https://a.b/</a>)</p>'),
    ('[a](https://b.c/"onclick="x)', f'<p><a href="https://b.c/&quot;onclick=&quot;x" {OUT}>a</a></p>'),
    ("[[a] (https://d.e) b](https://b.c/) d", f'<p><a href="https://b.c/" {OUT}>[a] (https://d.e) b</a> d</p>'),
    ("a[0] and [b] (c)", "<p>a[0] and [b] (c)</p>"),
    ("<b>x</b> &amp; <br>y", "<p>&lt;b&gt;x&lt;/b&gt; &amp; <br>y</p>"),
    (
        "| a | b |\n|---|--:|\n| 1 | 2 \\| 3 |\n| 4 |",
        '<div class="scroll" tabindex="0"><table><thead><tr><th>a</th><th class="to-right">b</th></tr></thead><tbody>'
        '<tr><td>1</td><td class="to-right">2 | 3</td></tr><tr><td>4</td><td class="to-right"></td></tr>'
        "</tbody></table></div>",
    ),
    ("a | b", "<p>a | b</p>"),
    (
        "&lt;i&gt; &#8364; &#x3c0; &none; &constructor; `&amp;`",
        "<p>&lt;i&gt; € π &amp;none; &amp;constructor; <code>&amp;amp;</code></p>",
    ),
    (
        "&Eacute;&uuml; &Omega;&sigma;&sigmaf; &sup2;&rArr; [a](https://b.c/?d=1&amp;e)",
        f'<p>Éü Ωσς ²⇒ <a href="https://b.c/?d=1&amp;e" {OUT}>a</a></p>',
    ),
    ("- [a[^1]](https://b.c/)", f'<ul><li><a href="https://b.c/" {OUT}>a<sup>1</sup></a></li></ul>'),
    ("$5 and $6, $ 7$", "<p>$5 and $6, $ 7$</p>"),
    ("", ""),
]


def test_markdown(still):
    rendered = still.evaluate(RENDER, [source for source, _ in MARKDOWN])
    assert rendered == [expected for _, expected in MARKDOWN]


def test_footnotes_lead_there_and_back_by_keyboard(visit, server):
    page = visit(server.url)
    instead(page, "One[^1], two[^b] and again[^1], none[^2].\n\n[^1]: Why *so*.\n[^b]: Because.")
    answer = ask(page, "Well?")
    address, focused = page.url, page.locator(":focus")
    expect(answer.locator(".noteref")).to_have_text(["1", "b", "1", "2"])
    assert answer.locator("sup a[href]").all_inner_texts() == ["1", "b", "1", "1", "b"]  # nothing has the number 2
    answer.locator(".noteref").nth(2).focus()
    page.keyboard.press("Enter")
    expect(focused).to_have_attribute("aria-label", "Back to the text from footnote 1")
    page.keyboard.press("Enter")
    expect(answer.locator(".noteref").nth(2)).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(answer.locator(".noteref").nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(focused).to_have_attribute("aria-label", "Back to the text from footnote b")
    assert page.url == address


def test_code_blocks(still):
    sources = ["```py\nx = [1]\n\n  y\n```\nafter", "~~~\n```\n~~~", "```\nopen\n  yet", "1. a\n   ```\n   b\n   ```"]
    texts = still.evaluate(
        """(sources) => sources.map((source) => {
          const node = make("div");
          new Words(node).show(source);
          return [node.querySelector("pre code").textContent, node.querySelector(".block span").textContent];
        })""",
        sources,
    )
    assert texts == [["x = [1]\n\n  y", "py"], ["```", "text"], ["open\n  yet", "text"], ["b", "text"]]


WRITTEN = r"* ** _ ~~ ` ``` # | |-|-| [ ]( ) ![ [^1] [^1]: \ --- = a b é🙂 <br> &lt; <script> </script> javascript: https://a.b/"
SPACED = ["\n", "\n\n", "- ", "1. ", "  ", "> ", "\t", "\x00", "\u2028", "<img src=x onerror=x>", "data:text/html,<b>"]
PIECES = WRITTEN.split() + SPACED
ALLOWED = "P BR STRONG EM DEL CODE PRE A SPAN UL OL LI BLOCKQUOTE HR DIV H1 H2 H3 H4 H5 H6"
ALLOWED += " SUP TABLE THEAD TBODY TR TH TD BUTTON svg path"


def test_any_text_renders_safely_and_the_same_however_it_comes(still):
    generator = random.Random(3)
    sources = ["".join(generator.choices(PIECES, k=generator.randint(1, 40))) for _ in range(400)]
    found = still.evaluate(
        """(sources) => {
          const tags = new Set(), attributes = new Set(), links = new Set(), differ = [];
          for (const source of sources) {
            const node = make("div"), growing = make("div"), words = new Words(growing);
            new Words(node).show(source);
            for (let end = 1; end <= source.length; end += 5) words.show(source.slice(0, end));
            words.show(source);
            if (node.innerHTML !== growing.innerHTML) differ.push(source);
            for (const inner of node.querySelectorAll(":not(math, math *)")) {
              tags.add(inner.tagName);
              if (inner.target) links.add(inner.protocol);
              if (!inner.closest("button")) for (const attribute of inner.attributes) attributes.add(attribute.name);
            }
          }
          return { tags: [...tags], attributes: [...attributes], links: [...links], differ };
        }""",
        sources,
    )
    assert found["differ"] == []
    assert set(found["tags"]) <= set(ALLOWED.split())
    assert set(found["attributes"]) <= {"href", "target", "rel", "class", "tabindex", "start", "role", "aria-label"}
    assert set(found["links"]) == {"https:"}


@pytest.mark.parametrize(
    "piece",
    [
        "*",
        "**a",
        "[",
        "![",
        "`",
        "_a ",
        "> ",
        "- ",
        "(",
        "[a](",
        "~~",
        "<",
        "|",
        "1. ",
        "$",
        "$$a ",
        "\\(",
        "\\[a\n",
        "&amp",
        "[^",
    ],
)
def test_long_runs_take_no_long_time(still, piece):
    """Of a hundred thousand characters; what is quadratic in them takes minutes."""
    text = piece * (100_000 // len(piece))
    assert still.evaluate("(text) => { const node = make('div'); new Words(node).show(text); return 1; }", text) == 1


def test_latex_becomes_mathml(still):
    sources = [r"so \(x^2\) it is", "\\[\n\\frac{a}{b}\n\\]", "$$\na_1\n$$", "if $n > 1$, then", "a $$b^c$$ d"]
    found = still.evaluate(
        """(sources) => sources.map((source) => {
          const node = make("div");
          new Words(node).show(source);
          const math = [...node.querySelectorAll("math")];
          return [math.length, math[0]?.className || "", math[0]?.querySelectorAll("msup, msub, mfrac").length,
            node.querySelectorAll("[style]").length, math[0]?.namespaceURI];
        })""",
        sources,
    )
    assert [row[0] for row in found] == [1] * 5
    assert ["display" in row[1] for row in found] == [False, True, True, False, True]
    assert [row[2] for row in found] == [1, 1, 1, 0, 1]
    assert {row[4] for row in found} == {"http://www.w3.org/1998/Math/MathML"}


def test_latex_in_lists_and_tables(still):
    """Formulas, and what stands around them where each becomes x."""
    sources = [
        "- a \\(x\\)\n- \\[ x \\]\n- b\n  \\[\n  x\n  \\]\n  c",
        "1. a:\n\n   \\[\n   x\n   - y\n   \\]\n2. $x$",
        "| a | b |\n|---|---|\n| \\(|x|\\) | $y$ |\n| \\[ x \\] | c |",
        "> \\[\n> x\n> \\]",
        "**a \\(x**y\\) b** *c \\(x*y\\) d*",
    ]
    found = still.evaluate(
        """(sources) => sources.map((source) => {
          const node = make("div");
          new Words(node).show(source);
          const count = node.querySelectorAll("math").length;
          for (const math of node.querySelectorAll("math")) math.replaceWith("x");
          for (const inner of node.querySelectorAll(".formula")) inner.replaceWith(...inner.childNodes);
          return [count, node.innerHTML];
        })""",
        sources,
    )
    cells = "<tr><td>x</td><td>x</td></tr><tr><td>x</td><td>c</td></tr>"
    assert found == [
        [3, "<ul><li>a x</li><li>x</li><li>bx<p>c</p></li></ul>"],
        [2, "<ol><li>a:x</li><li>x</li></ol>"],
        [
            3,
            '<div class="scroll" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
            f"<tbody>{cells}</tbody></table></div>",
        ],
        [1, "<blockquote>x</blockquote>"],
        [2, "<p><strong>a x b</strong> <em>c x d</em></p>"],
    ]


def test_latex_can_do_nothing_but_show(still):
    sources = [r"\(\href{javascript:alert(1)}{x}\)", r"\(\includegraphics{https://a.b/c.png}\)", r"\(\frac{\)"]
    sources += [r"\(\def\a{\a\a}\a\)", r"\(\style{background:url(https://a.b)}{x}\)", r"\(\htmlData{a=b}{x}\)"]
    assert (
        still.evaluate(
            RENDER.replace("node.innerHTML", "node.querySelectorAll('a, img, [href], [style]').length"), sources
        )
        == [0] * 6
    )


def test_code_has_colours(still):
    source = "```python\n# why\nif x == 'a': return 1\n```"
    found = still.evaluate(
        RENDER.replace(
            "node.innerHTML",
            "[...node.querySelectorAll('code span')].map((span) => [span.className, span.textContent])",
        ),
        [source],
    )
    assert found == [
        [
            ["code-comment", "# why"],
            ["code-keyword", "if"],
            ["code-string", "'a'"],
            ["code-keyword", "return"],
            ["code-number", "1"],
        ]
    ]

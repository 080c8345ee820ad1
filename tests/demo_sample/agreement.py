"""How often the embedded model agrees with the drafts of its slices, by skill: a Markdown table for docs/elastic.md.

    python tests/demo_sample/agreement.py

Greedy answers to the sample, three tokens drafted at a time wherever nothing is forced, over the whole model's cache.
A skill's figure is the share of drafted tokens that are right, up to the first wrong one of each draft.
"""

from collections import defaultdict

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.engine import drafts, nested
from g3n_mlx.eval.quality import read_examples
from g3n_mlx.media.policy import MediaPolicy

SLICES, DRAFTED, MAX_TOKENS = ("half", "eighth", "eighth-skip"), 3, 48


def main() -> None:
    drafts.Drafter.draft = lambda *_: []  # no lookups
    nested.SliceDrafter.length = lambda self, limit: min(DRAFTED, limit)
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    model = load("demo", device="cpu", dtype="float32")
    examples = read_examples(demo_folder() / "sample.jsonl")
    for name in SLICES:
        for example in examples:
            prompt = model.prepare(example.messages, MediaPolicy(paths=example.folder))

            def push(self, drafted, accepted, at=counts[example.skill, name]):
                at[0] += accepted
                at[1] += accepted + (drafted > accepted)

            nested.Agreement.push = push
            model.generate(prompt, temperature=0, max_tokens=MAX_TOKENS, draft=name)
    print(f"| skill | {' | '.join(SLICES)} |\n|---|{'---:|' * len(SLICES)}")
    for skill in sorted({example.skill for example in examples}):
        shares = [f"{counts[skill, name][0] / max(1, counts[skill, name][1]):.0%}" for name in SLICES]
        print(f"| {skill} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()

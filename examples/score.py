"""How likely a model finds some sentences: python examples/score.py [MODEL]"""

import sys

import numpy as np

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import default_model

SENTENCES = ("12 + 34 = 46", "12 + 34 = 48", "46 = + 34 12")


def main(model_path: str | None = None) -> None:
    model = load(model_path or default_model()[0])
    for sentence in SENTENCES:
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(sentence)]
        logits = model.logits(ids)[:-1]  # [T - 1, V]: each row predicts the next id
        shifted = logits - logits.max(axis=-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        chosen = logprobs[np.arange(len(logprobs)), ids[1:]]
        print(f"{np.exp(-chosen.mean()):12.1f} perplexity: {sentence}")


if __name__ == "__main__":
    main(*sys.argv[1:])

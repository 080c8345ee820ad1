"""One answer, with its figures: python examples/generate.py [MODEL] [QUESTION]"""

import sys

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import default_model


def main(model_path: str | None = None, question: str = "What is 12 + 34?") -> None:
    model = load(model_path or default_model()[0])
    result = model.generate(question, max_tokens=64, seed=0)
    print(result.text)
    usage = result.usage
    print(f"{usage.prompt_tokens} tokens in, {usage.completion_tokens} out, finished by {result.finish_reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])

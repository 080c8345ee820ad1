"""A conversation of two turns, streamed; the second one reads only what is new: python examples/stream.py [MODEL]"""

import sys

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import default_model


def main(model_path: str | None = None) -> None:
    model = load(model_path or default_model()[0])
    messages = []
    for question in ("My name is Anna.", "What is my name?"):
        messages.append({"role": "user", "content": question})
        answer = ""
        for chunk in model.stream(messages, max_tokens=48):
            print(chunk.text, end="", flush=True)
            answer += chunk.text
            if chunk.usage is not None:
                print(
                    f"\n[{chunk.usage.cached_tokens} of {chunk.usage.prompt_tokens} prompt tokens came from the cache]"
                )
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Ask about a picture, then once more: python examples/image.py [MODEL] [PICTURE] [QUESTION]"""

import sys
from pathlib import Path

from g3n_mlx import Image, load
from g3n_mlx.checkpoint.hub import default_model

MEDIA = Path(__file__).resolve().parent / "media"


def main(model_path: str | None = None, picture: str | None = None, question: str = "What is in this picture?") -> None:
    model = load(model_path or default_model()[0])
    image = Image(picture or MEDIA / "shapes.png")  # or bytes, a PIL image, an array [h, w, 3], a URL
    messages = [{"role": "user", "content": [image, question]}]
    answer = model.generate(messages, max_tokens=64, temperature=0.0)
    print(answer.text)

    # The picture is not read a second time: its soft tokens and the conversation's cache are kept.
    messages += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "How many circles are there?"},
    ]
    again = model.generate(messages, max_tokens=64, temperature=0.0)
    print(again.text)
    print(f"[{again.usage.cached_tokens} of {again.usage.prompt_tokens} prompt tokens came from the cache]")

    # What enters the text model in the picture's place, for uses of your own.
    print(f"[soft tokens: {model.encode_image(image).shape}]")


if __name__ == "__main__":
    main(*sys.argv[1:])

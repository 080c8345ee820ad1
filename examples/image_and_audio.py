"""A picture and a voice in one question: python examples/image_and_audio.py [MODEL] [PICTURE] [SOUND] [QUESTION]

The parts are written as Hugging Face's processors take them; OpenAI's `image_url` and `input_audio` work as well.
"""

import sys
from pathlib import Path

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import default_model

MEDIA = Path(__file__).resolve().parent / "media"
QUESTION = "Does the voice name what the picture shows?"


def main(
    model_path: str | None = None,
    picture: str = str(MEDIA / "circle.jpg"),
    sound: str = str(MEDIA / "red_circle.ogg"),
    question: str = QUESTION,
) -> None:
    model = load(model_path or default_model()[0])
    content = [
        {"type": "image", "image": picture},
        {"type": "audio", "audio": sound},
        {"type": "text", "text": question},
    ]
    for chunk in model.stream([{"role": "user", "content": content}], max_tokens=64, temperature=0.0):
        print(chunk.text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])

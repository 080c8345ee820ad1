"""Write down what is said: python examples/audio.py [MODEL] [SOUND] [QUESTION]"""

import sys
from pathlib import Path

from g3n_mlx import Audio, load
from g3n_mlx.checkpoint.hub import default_model

MEDIA = Path(__file__).resolve().parent / "media"
OURS = (
    ("digits.ogg", "Transcribe this."),
    ("tone.wav", "What do you hear?"),
    ("beeps.flac", "How many beeps are there?"),
)


def main(model_path: str | None = None, sound: str | None = None, question: str = "Transcribe this.") -> None:
    model = load(model_path or default_model()[0])
    asked = [(Path(sound), question)] if sound else [(MEDIA / name, question) for name, question in OURS]
    for path, question in asked:
        # Or bytes, a URL, or Audio(waveform, rate). What is longer than a clip is split at quiet places, and a
        # warning says what it costs.
        messages = [{"role": "user", "content": [Audio(path), question]}]
        print(f"{path.name}: {model.generate(messages, max_tokens=64, temperature=0.0).text}")


if __name__ == "__main__":
    main(*sys.argv[1:])

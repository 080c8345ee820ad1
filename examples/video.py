"""What happens in a video, pictures and sound: python examples/video.py [MODEL] [VIDEO] [QUESTION]

One picture a second is shown, each after its time, and the sound beside them.
"""

import sys
from pathlib import Path

from g3n_mlx import Video, load
from g3n_mlx.checkpoint.hub import default_model

MEDIA = Path(__file__).resolve().parent / "media"


def main(
    model_path: str | None = None, video: str | None = None, question: str = "What happens in this video?"
) -> None:
    model = load(model_path or default_model()[0])
    shown = Video(video or MEDIA / "clip.mp4", fps=1.0, max_frames=60)
    prompt = model.prepare([{"role": "user", "content": [shown, question]}])
    kinds = [span.features.kind for span in prompt.media]
    print(f"[pictures: {kinds.count('image')}, sounds: {kinds.count('audio')}, tokens: {len(prompt.token_ids)}]")
    print(model.generate(prompt, max_tokens=64, temperature=0.0).text)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A picture and a sound in one message: python examples/server/image_and_audio.py [URL of the server]."""

import base64
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")
media = Path(__file__).parent.parent / "media"


def encoded(name: str) -> str:
    """A file as base64."""
    return base64.b64encode((media / name).read_bytes()).decode()


content = [
    {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded('circle.jpg')}"}},
    {"type": "input_audio", "input_audio": {"data": encoded("red_circle.ogg"), "format": "ogg"}},
    {"type": "text", "text": "Does the voice name what the picture shows?"},
]
answer = client.chat.completions.create(
    model="default", messages=[{"role": "user", "content": content}], max_tokens=64, temperature=0
)
print(answer.choices[0].message.content)

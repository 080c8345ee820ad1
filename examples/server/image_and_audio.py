"""A picture and a sound in one message: python examples/server/image_and_audio.py [URL of the server]."""

import base64
import io
import math
import struct
import sys
import wave

from openai import OpenAI
from PIL import Image, ImageDraw

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")


def picture() -> str:
    """A blue square as base64."""
    drawn = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(drawn).rectangle((24, 24, 72, 72), fill="blue")
    written = io.BytesIO()
    drawn.save(written, "JPEG")
    return base64.b64encode(written.getvalue()).decode()


def beep() -> str:
    """Half a second of 880 Hz as base64."""
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(
            b"".join(struct.pack("<h", int(9000 * math.sin(math.tau * 880 * i / 16000))) for i in range(8000))
        )
    return base64.b64encode(written.getvalue()).decode()


content = [
    {"type": "input_audio", "input_audio": {"data": beep(), "format": "wav"}},
    {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture()}"}},
    {"type": "text", "text": "What do you hear, and what do you see?"},
]
answer = client.chat.completions.create(
    model="default", messages=[{"role": "user", "content": content}], max_tokens=64, temperature=0
)
print(answer.choices[0].message.content)

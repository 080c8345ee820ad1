"""Write down what a sound says: python examples/server/transcription.py [URL of the server [sound]].

Any length and format will do; without a file it is a tone, in which there is little to hear.
"""

import io
import math
import struct
import sys
import wave
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")


def tone() -> bytes:
    """A second of 440 Hz."""
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(
            b"".join(struct.pack("<h", int(9000 * math.sin(math.tau * 440 * i / 16000))) for i in range(16000))
        )
    return written.getvalue()


sound = ("tone.wav", tone()) if len(sys.argv) < 3 else Path(sys.argv[2])
answer = client.audio.transcriptions.create(model="default", file=sound, language="en", response_format="verbose_json")
for segment in answer.segments:
    print(f"{segment.start:7.2f} to {segment.end:7.2f} s: {segment.text}")

for event in client.audio.transcriptions.create(model="default", file=sound, stream=True):
    if event.type == "transcript.text.delta":
        print(event.delta, end="", flush=True)
print()

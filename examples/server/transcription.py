"""Write down what a sound of any length says: python examples/server/transcription.py [URL of the server [sound]]."""

import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")
path = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent.parent / "media" / "digits.ogg"

answer = client.audio.transcriptions.create(model="default", file=path, language="en", response_format="verbose_json")
for segment in answer.segments:
    print(f"{segment.start:7.2f} to {segment.end:7.2f} s: {segment.text}")

for event in client.audio.transcriptions.create(model="default", file=path, stream=True):
    if event.type == "transcript.text.delta":
        print(event.delta, end="", flush=True)
print()

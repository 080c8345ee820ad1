"""Ask a running server about a picture: python examples/server/image.py [URL of the server [picture]]."""

import base64
import io
import sys
from pathlib import Path

from openai import OpenAI
from PIL import Image, ImageDraw

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")

if len(sys.argv) > 2:
    data = Path(sys.argv[2]).read_bytes()
else:
    picture = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(picture).ellipse((20, 20, 76, 76), fill="red")
    written = io.BytesIO()
    picture.save(written, "PNG")
    data = written.getvalue()

# A picture travels inside the request; the server opens paths and addresses of this network only if it is told to.
url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": "Please describe this image in detail."},
]
answer = client.chat.completions.create(
    model="default", messages=[{"role": "user", "content": content}], max_tokens=64, temperature=0
)
print(answer.choices[0].message.content)

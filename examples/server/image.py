"""Ask a running server about a picture: python examples/server/image.py [URL of the server [picture]]."""

import base64
import mimetypes
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")
path = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent.parent / "media" / "shapes.png"

# A picture travels inside the request; the server opens paths and addresses of this network only if it is told to.
kind = mimetypes.guess_type(path)[0]
url = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": "What is in this picture?"},
]
answer = client.chat.completions.create(
    model="default", messages=[{"role": "user", "content": content}], max_tokens=64, temperature=0
)
print(answer.choices[0].message.content)

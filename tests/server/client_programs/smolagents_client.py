"""smolagents against the server at the URL given; its agents need a model that can follow them."""

import base64
import io
import sys
from pathlib import Path

from PIL import Image
from smolagents import OpenAIServerModel, ToolCallingAgent, tool

URL, picture = sys.argv[1], Path(sys.argv[2]).read_text("utf-8")
question = [{"role": "user", "content": [{"type": "text", "text": "What is 12 + 34?"}]}]
model = OpenAIServerModel("default", api_base=f"{URL}/v1", api_key="none", temperature=0, max_tokens=80)


@tool
def where(town: str) -> str:
    """The country of a town.

    Args:
        town: The town.
    """
    return f"{town}: Switzerland"


answer = model(question)
assert answer.content
assert answer.token_usage.output_tokens > 0
assert "".join(chunk.content or "" for chunk in model.generate_stream(question)) == answer.content
assert "4" not in model(question, stop_sequences=["4"]).content
image = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
look = [{"type": "text", "text": "What is it?"}, {"type": "image", "image": image}]
assert model([{"role": "user", "content": look}]).content
called = model(question, tools_to_call_from=[where]).tool_calls
assert {call.function.name for call in called} == {"where"}
agent = ToolCallingAgent(tools=[where], model=model, max_steps=1, verbosity_level=0)
assert agent.run("Where is Bern?") is not None

"""Let the model call a function, and tell it what came of it: python examples/server/tools.py [URL of the server]."""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")


def add(a: int, b: int) -> int:
    """The function that the model may call."""
    return a + b


number = {"type": "integer", "minimum": 0, "maximum": 99}
tool = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": number, "b": number},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
messages = [{"role": "user", "content": "What is 17 + 25?"}]
answer = client.chat.completions.create(
    model="default",
    messages=messages,
    tools=[tool],
    tool_choice="required",  # "auto" leaves it to the model
    parallel_tool_calls=False,
    max_tokens=200,
)
message = answer.choices[0].message
call = message.tool_calls[0]
result = add(**json.loads(call.function.arguments))
print(f"{call.function.name}({call.function.arguments}) = {result}")

messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": str(result)}]
answer = client.chat.completions.create(
    model="default", messages=messages, tools=[tool], tool_choice="none", max_tokens=48
)
print(answer.choices[0].message.content)

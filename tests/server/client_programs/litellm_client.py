"""LiteLLM against the server at the URL given: its OpenAI, Ollama and Anthropic sides."""

import sys
from pathlib import Path
from typing import Any

import litellm

URL, picture = sys.argv[1], Path(sys.argv[2]).read_text("utf-8")
QUESTION = {"role": "user", "content": "What is 12 + 34?"}
LOOK = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": picture}}]
TOWN = {"type": "object", "properties": {"town": {"enum": ["Bern", "Rome"]}}, "required": ["town"]}
WHERE = {"type": "function", "function": {"name": "where", "description": "Its country.", "parameters": TOWN}}
SUM = {"type": "object", "properties": {"total": {"type": "integer"}}, "required": ["total"]}
OURS: dict[str, Any] = {"model": "openai/default", "api_base": f"{URL}/v1", "api_key": "none", "max_tokens": 60}
OURS["temperature"] = 0


def streamed(**options: Any) -> str:
    chunks = litellm.completion(messages=[QUESTION], stream=True, **options)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


plain = litellm.completion(messages=[QUESTION], **OURS)
text = plain.choices[0].message.content
assert text
assert plain.usage.completion_tokens > 0
assert streamed(**OURS, stream_options={"include_usage": True}) == text
assert litellm.completion(messages=[{"role": "user", "content": LOOK}], **OURS).choices[0].message.content

offered: dict[str, Any] = {"tools": [WHERE], "tool_choice": "required", **OURS}
called = litellm.completion(messages=[QUESTION], **offered).choices[0].message
assert called.tool_calls[0].function.name == "where"
pieces = list(litellm.completion(messages=[QUESTION], stream=True, **offered))
joined = litellm.stream_chunk_builder(pieces).choices[0].message.tool_calls
assert [call.function.arguments for call in joined] == [call.function.arguments for call in called.tool_calls]
results = [{"role": "tool", "tool_call_id": call.id, "content": "Switzerland"} for call in called.tool_calls]
assert litellm.completion(messages=[QUESTION, called, *results], **OURS).choices[0].finish_reason in ("stop", "length")
schema = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SUM}}
assert "total" in litellm.completion(messages=[QUESTION], response_format=schema, **OURS).choices[0].message.content

response = litellm.responses(model="openai/default", input="What is 12 + 34?", api_base=f"{URL}/v1", api_key="none")
assert response.output[0].content[0].text
ollama = {"model": "ollama_chat/default", "api_base": URL, "temperature": 0, "max_tokens": 60}
assert streamed(**ollama) == text
anthropic = {"model": "anthropic/default", "api_base": URL, "api_key": "none", "temperature": 0, "max_tokens": 60}
assert litellm.completion(messages=[QUESTION], **anthropic).choices[0].message.content == text

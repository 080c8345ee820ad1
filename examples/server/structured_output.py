"""Answers that follow a JSON schema, a regex or a grammar: python examples/server/structured_output.py [URL]."""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")

schema = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "integer", "minimum": 0, "maximum": 99},
        "sum": {"type": "integer", "minimum": 0, "maximum": 198},
    },
    "required": ["a", "b", "sum"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "What is 12 + 34? Answer in JSON."}],
    response_format={"type": "json_schema", "json_schema": {"name": "addition", "schema": schema}},
    max_tokens=200,
)
numbers = json.loads(answer.choices[0].message.content)
print(numbers["a"], numbers["b"], numbers["sum"])

answer = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "What is 5 + 6?"}],
    extra_body={"grammar": {"type": "regex", "value": r"\d+ \+ \d+ = \d+"}},
    max_tokens=100,
)
print(answer.choices[0].message.content)

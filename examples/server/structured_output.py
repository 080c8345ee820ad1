"""Answers that follow a JSON schema, a regex or a grammar: python examples/server/structured_output.py [URL]."""

import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")

schema = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "corners": {"type": "integer", "minimum": 0, "maximum": 12},
        "round": {"type": "boolean"},
    },
    "required": ["colour", "corners", "round"],
    "additionalProperties": False,
}
answer = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Describe a red triangle."}],
    response_format={"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}},
    max_tokens=200,
)
shape = json.loads(answer.choices[0].message.content)
print(shape["colour"], shape["corners"], shape["round"])

answer = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": "Is ice cold?"}],
    extra_body={"grammar": {"type": "regex", "value": "(Yes|No), because [a-z ]{5,40}"}},
    max_tokens=100,
)
print(answer.choices[0].message.content)

"""Talk to a running server with the official client: a whole answer, then one that streams.

In one terminal: python -m g3n_mlx.server        In another: python examples/server/chat.py
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080/v1", api_key="none")

messages = [{"role": "user", "content": "My name is Anna."}]
answer = client.chat.completions.create(model="default", messages=messages, max_tokens=48, seed=1)
print(answer.choices[0].message.content)

messages += [
    {"role": "assistant", "content": answer.choices[0].message.content},
    {"role": "user", "content": "What is my name?"},
]
stream = client.chat.completions.create(
    model="default", messages=messages, max_tokens=48, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    else:
        cached = chunk.usage.prompt_tokens_details.cached_tokens
        print(
            f"\n[{chunk.usage.prompt_tokens} tokens in, {cached} of them cached; {chunk.usage.completion_tokens} out]"
        )

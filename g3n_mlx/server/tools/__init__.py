"""Tools: the convention by which a Gemma 3n, whose template knows none, is offered functions and calls them.

The system text lists the functions, one JSON object a line: name, description, JSON schema of the parameters. A call is
a JSON object `{"name": ..., "parameters": {...}}` that begins a line; it may be fenced, and text may come before it.
Several calls stand below each other. Results come back as a user's text, `Result of NAME:` and a fenced block.
A grammar keeps the response to that: once it names an offered function, the rest of the call must fit its schema; with
a required call the response is calls and nothing else, with a named one a single call of it. docs/tools.md has it all.
Sources: the JSON form is the one of "Function calling with Gemma", ai.google.dev; tool_choice and deltas are OpenAI's.
"""

"""LlamaIndex against the server at the URL given."""

import sys
from pathlib import Path
from typing import Any, Literal

import pydantic
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

URL, picture = sys.argv[1], Path(sys.argv[2]).read_text("utf-8")
QUESTION = "What is 12 + 34?"


class Sum(pydantic.BaseModel):
    """A sum."""

    total: int = pydantic.Field(ge=0, le=99)


def where(town: Literal["Bern", "Rome"]) -> str:
    """The country of a town."""
    return {"Bern": "Switzerland", "Rome": "Italy"}[town]


tool = FunctionTool.from_defaults(where)
options: dict[str, Any] = {"model": "default", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0}
options |= {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 60}
look = ChatMessage(role="user", blocks=[TextBlock(text="What is it?"), ImageBlock(url=picture)])
for llm in (OpenAILike(**options), OpenAILikeResponses(**options)):
    text = llm.complete(QUESTION).text
    assert text
    assert "".join(chunk.delta or "" for chunk in llm.stream_complete(QUESTION)) == text
    assert llm.chat([look]).message.content
    answer = llm.chat_with_tools([tool], "Where is Bern?", tool_required=True)
    (call, *_) = llm.get_tool_calls_from_response(answer)
    assert (call.tool_name, set(call.tool_kwargs)) == ("where", {"town"})
    assert str(llm.predict_and_call([tool], "Where is Bern?", tool_required=True)) in ("Switzerland", "Italy")
structured = OpenAILike(**options, should_use_structured_outputs=True).as_structured_llm(Sum)
assert 0 <= structured.complete(QUESTION).raw.total <= 99

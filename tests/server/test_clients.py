"""Programs that people point at a server, over a real socket: OpenAI's agents, pydantic-ai, LangChain.

Their packages are in the dependency group `peers`; what is asked holds whatever the model says.
"""

import importlib.util
from typing import Any, Literal

import pydantic
import pytest
from running import WAIT_S

pytestmark = pytest.mark.slow
Town = Literal["Bern", "Rome"]


def needs(*packages: str) -> Any:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


class Sum(pydantic.BaseModel):
    """A sum."""

    total: int = pydantic.Field(ge=0, le=99)


@needs("agents")
@pytest.mark.anyio
async def test_openai_agents(server):
    """A tool is called, its result goes back, and the last answer is of the schema."""
    import agents
    import openai

    called: list[str] = []

    @agents.function_tool
    def where(town: Town) -> str:
        """The country of a town."""
        called.append(town)
        return "Switzerland"

    agents.set_tracing_disabled(True)
    remote = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=WAIT_S)
    chosen = agents.OpenAIResponsesModel("default", remote)
    caller = agents.Agent(
        name="caller",
        instructions="Be brief.",
        model=chosen,
        model_settings=agents.ModelSettings(
            temperature=0, max_tokens=80, tool_choice="required", parallel_tool_calls=False
        ),
        tools=[where],
        tool_use_behavior="stop_on_first_tool",
    )
    done = await agents.Runner.run(caller, "Where is Bern?")
    assert called
    assert done.final_output == "Switzerland"
    counter = agents.Agent(name="counter", model=chosen, output_type=Sum)
    follow_up = [*done.to_input_list(), {"role": "user", "content": "And 12 + 34?"}]
    assert 0 <= (await agents.Runner.run(counter, follow_up)).final_output.total <= 99
    plain = agents.Agent(name="plain", model=chosen)
    streamed = agents.Runner.run_streamed(plain, "What is 12 + 34?")
    kinds = [event.data.type async for event in streamed.stream_events() if event.type == "raw_response_event"]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert streamed.final_output
    await remote.close()  # or its collection closes it later, in another test's event loop


@needs("pydantic_ai")
@pytest.mark.anyio
async def test_pydantic_ai(server):
    import openai
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    # A client of this test's own: the package's is shared, and outlives the event loop of its first use.
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=WAIT_S) as remote:
        model = OpenAIResponsesModel("default", provider=OpenAIProvider(openai_client=remote))
        settings: Any = {"temperature": 0, "max_tokens": 60}
        agent: Any = Agent(model, output_type=NativeOutput(Sum), system_prompt="Be brief.", model_settings=settings)
        assert 0 <= (await agent.run("What is 12 + 34?")).output.total <= 99
        called: Any = Agent(model, output_type=Sum, model_settings=settings)  # the output is a tool's call here
        assert 0 <= (await called.run("What is 12 + 34?")).output.total <= 99
        async with Agent(model, model_settings=settings).run_stream("What is 12 + 34?") as run:
            assert await run.get_output()


@needs("langchain_openai")
def test_langchain(server):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    options: Any = {"base_url": f"{server.url}/v1", "api_key": "x", "model": "default", "temperature": 0}
    chat = ChatOpenAI(**options, use_responses_api=True, max_tokens=60)
    question = HumanMessage("What is 12 + 34?")
    answer = chat.invoke([question])
    assert "".join(str(chunk.text) for chunk in chat.stream([question])) == str(answer.text)
    assert answer.usage_metadata["output_tokens"] > 0
    assert 0 <= chat.with_structured_output(Sum).invoke([question]).total <= 99

    def where(town: Town) -> str:
        """The country of a town."""
        return town

    called = chat.bind_tools([where], tool_choice="required", parallel_tool_calls=False).invoke([question])
    (call,) = called.tool_calls[:1]
    assert call["name"] == "where"
    rest = [ToolMessage("Switzerland", tool_call_id=one["id"]) for one in called.tool_calls]
    assert chat.invoke([question, called, *rest]).text
    plain = ChatOpenAI(**options, max_tokens=60)
    assert plain.invoke([question]).content == str(answer.text)


@pytest.fixture
def anyio_backend():
    return "asyncio"

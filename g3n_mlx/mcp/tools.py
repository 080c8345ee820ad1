"""The tools that a model offers over the Model Context Protocol: text, images, audio and video in, text out.

Media come by path, http(s) or data: URI, as far as the policy allows; what is wrong with them is an answer that says
so.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, Literal

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from g3n_mlx.engine.transcript import FORMATS, Segment
from g3n_mlx.failures import is_expected, one_line
from g3n_mlx.installation import version
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.model import Gemma3n

INSTRUCTIONS = (
    "A local Gemma 3n, which looks at images, listens to audio and watches videos. "
    "Media are named by path, http(s) URL or data: URI."
)
MAX_TOKENS = 1024  # of an answer that sets no limit
MAX_AUDIO_S = 4 * 3600.0  # to transcribe, half a gigabyte an hour while it is decoded
PARALLEL = 4  # calls in progress: each has a cache of its own; others wait
MEDIA_S = 120.0  # for opening what one call names
READS = ToolAnnotations(read_only_hint=True, open_world_hint=True)


class Tools:
    """The tools, over one model."""

    def __init__(self, model: Gemma3n, policy: MediaPolicy) -> None:
        self._model, self._policy = model, policy
        self._places = asyncio.Semaphore(PARALLEL)

    async def ask(
        self,
        prompt: str,
        images: Sequence[str] = (),
        audio: Sequence[str] = (),
        videos: Sequence[str] = (),
        system: str | None = None,
        max_tokens: int = MAX_TOKENS,
        temperature: float | None = None,
    ) -> str:
        """Asks Gemma 3n, also about images, audio and videos together: paths, http(s) URLs or data: URIs."""
        media = {"image": images, "audio": audio, "video": videos}
        parts = [{"type": kind, kind: source} for kind, sources in media.items() for source in sources]
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": prompt}]})
        async with self._place():
            policy = replace(self._policy, deadline=time.monotonic() + MEDIA_S)
            read = await asyncio.to_thread(self._model.prepare, messages, policy)
            result = await self._model.agenerate(read, max_tokens=max_tokens, temperature=temperature)
        return result.text

    async def describe_image(self, image: str, question: str = "Describe this image.") -> str:
        """Looks at an image (path, http(s) URL or data: URI) and describes it, or answers a question about it."""
        return await self.ask(question, images=[image])

    async def watch_video(self, video: str, question: str = "What happens in this video?") -> str:
        """Watches a video with its sound (path, http(s) URL or data: URI) and answers a question about it."""
        return await self.ask(question, videos=[video])

    async def transcribe(
        self,
        audio: str,
        context: Context[Any],
        language: str | None = None,
        prompt: str | None = None,
        translate: bool = False,
        format: Literal["txt", "srt", "vtt", "json"] = "txt",
    ) -> str:
        """Writes down what is said in an audio or video file of any length (path, http(s) URL or data: URI).

        language: what is spoken, as German or de. prompt: a hint at the words, such as names. translate: in English.
        """
        policy = replace(self._policy, max_seconds=MAX_AUDIO_S, deadline=time.monotonic() + MEDIA_S)
        segments: list[Segment] = []
        async with self._place():
            heard = self._model.transcribe_stream(audio, language, prompt, translate, policy=policy)
            # One step at a time in a thread: between them a call that was cancelled ends.
            while (segment := await asyncio.to_thread(next, heard, None)) is not None:
                segments.append(segment)
                await context.report_progress(segment.end_s, message=f"{segment.end_s:.0f} s heard")
        return FORMATS[format](segments)

    @asynccontextmanager
    async def _place(self) -> AsyncGenerator[None]:
        async with self._places:
            with _told():
                yield


@contextmanager
def _told() -> Generator[None]:
    """Has the caller read what is wrong with what it asked for; a bug of ours stays one."""
    try:
        yield
    except Exception as error:
        if not is_expected(error):
            raise
        raise ToolError(one_line(error)) from None


def tool_server(model: Gemma3n, policy: MediaPolicy) -> MCPServer[Any]:
    """The server of the tools, for any transport."""
    tools = Tools(model, policy)
    server = MCPServer[Any]("g3n", instructions=INSTRUCTIONS, version=version(), log_level="WARNING")
    offered: list[Callable[..., Awaitable[str]]] = [tools.ask]
    if model.config.vision is not None:
        offered += [tools.describe_image, tools.watch_video]
    if model.config.audio is not None:
        offered.append(tools.transcribe)
    for tool in offered:
        server.add_tool(tool, annotations=READS, structured_output=False)
    return server

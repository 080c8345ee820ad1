"""Messages to prompts: what the template, the tokenizer and the opener of media do together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from g3n_mlx.failures import BadValue
from g3n_mlx.media.opener import MediaOpener
from g3n_mlx.media.part import Media
from g3n_mlx.media.policy import MediaPolicy
from g3n_mlx.prompt.own_template import OwnTemplate
from g3n_mlx.prompt.prompt import Features, Prompt, PromptTooLong, encode
from g3n_mlx.prompt.template import Border, Control, render
from g3n_mlx.prompt.tokenizer import Tokenizer

ANY_MEDIA = MediaPolicy()


class Preparer:
    """Makes the prompts of one checkpoint. Safe for several threads at once, also while the model runs."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        opener: MediaOpener,
        context_tokens: int,
        own_template: OwnTemplate | None = None,
    ) -> None:
        """own_template: the checkpoint's, to be used in the place of Gemma 3n's."""
        self.tokenizer, self.opener, self.context_tokens = tokenizer, opener, context_tokens
        self.own_template = own_template

    def prepare(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        policy: MediaPolicy = ANY_MEDIA,
        *,
        continued: bool = False,
    ) -> Prompt:
        """The prompt that asks for an answer to `messages`; a string is one user message.

        continued: the answer goes on with the last message, which is the assistant's, instead of being a new turn.
        Media are fetched as the policy allows, opened and brought to the model's sizes. Raises ValueError naming the
        message or part that can't be used, and PromptTooLong when no context holds the text, before media are opened.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if self.own_template is None:
            rendered = render(messages, continued=continued)
        elif continued:
            raise BadValue("a message can only be continued with Gemma 3n's own template")
        else:
            rendered = self.own_template.render(messages, self.tokenizer.control_words)
        self._check_texts([piece for piece in rendered if isinstance(piece, str)])
        pieces: list[Control | Border | Features | str] = []
        for piece in rendered:
            if not isinstance(piece, Media):
                pieces.append(piece)
                continue
            try:
                pieces += self.opener.open(piece.source(), policy)
            except ValueError as error:
                raise BadValue(f"{piece.named}: {error}") from None
        return encode(pieces, self.tokenizer, self.opener.soft_tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text; raises PromptTooLong when no context holds it, ValueError on a lone surrogate."""
        self._check_texts([text])
        return self.tokenizer.encode(text)

    def _check_texts(self, texts: Iterable[str]) -> None:
        """Raises PromptTooLong when no context holds the texts, however they are tokenized.

        Tokenizing takes a second for some megabytes, so what is far too long should not come to it.
        """
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        most = self.context_tokens * self.tokenizer.max_token_bytes
        if num_bytes > most:
            raise PromptTooLong(
                f"the prompt's text has {num_bytes:,} bytes, and the context of {self.context_tokens} tokens holds "
                f"{most:,} of the longest ones at most: shorten it"
            )

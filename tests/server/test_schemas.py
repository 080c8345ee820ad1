"""A body of wrong values is refused at the first ones: an error each would be a larger answer than the body."""

import pytest

pydantic = pytest.importorskip("pydantic")
pytest.importorskip("fastapi")

from g3n_mlx.server.schemas.chat import ChatRequest  # noqa: E402
from g3n_mlx.server.schemas.completions import CompletionRequest  # noqa: E402


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionRequest, {"prompt": [None] * 10_000}),
        (CompletionRequest, {"prompt": [[None] * 10_000]}),
        (ChatRequest, {"messages": [{}] * 100}),
        (ChatRequest, {"messages": [{"role": "user", "content": [None] * 100}] * 100}),
    ],
)
def test_wrong_values_are_few_errors(schema, body):
    with pytest.raises(pydantic.ValidationError) as refused:
        schema.model_validate(body)
    assert refused.value.error_count() < 1000

"""What `/set` sets: keywords of sampling, and their types."""

SETTINGS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "max_tokens": int,
    "seed": int,
    "prefill_step_size": int,
}

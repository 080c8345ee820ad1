"""The wire types: requests and responses as this server reads and writes them, a file for each protocol or route.

Names and ranges are OpenAI's, with the sampling fields that other local servers add (top_k, min_p,
repetition_penalty, grammar). Other fields that would change an answer are refused (`Wire.REFUSED`), at every depth of
the body; whatever else is not listed is ignored, with a line in the log.
Source: OpenAI's API reference (chat, completions, audio, models); mistral.rs for `grammar` and the speeds in usage.
"""

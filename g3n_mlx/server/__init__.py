"""The local OpenAI endpoint: `python -m g3n_mlx.server`, one thread that owns the model behind a FastAPI app.

`app.py` puts it together, `gate.py` says who may call, `engine.py` and `scheduler.py` run the requests; the other files
are a group of routes each.
"""

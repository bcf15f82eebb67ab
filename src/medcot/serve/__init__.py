"""Serving a tuned model over HTTP in OpenAI's protocol, from this process.

A request is a *job* (``jobs.py``): prompt, limits, and where its text goes. A *row* (``rows.py``) is a job while it is
written: tokens so far, thinking apart from answer, the thinking budget, stop strings. *Lanes* (``lanes.py``) are the
slots of one adapter over the base that all lanes share. The *scheduler* (``scheduler.py``) is the one thread that
touches the model: rows join free slots and leave at any step. ``protocol.py`` says what a request may hold, ``app.py``
speaks HTTP, ``metrics.py`` counts. Only ``lanes.py`` and ``scheduler.py`` know tensors; ``medcot.serving`` opens models
and starts it all.

Why not vLLM's server or ``transformers serve`` as they are: neither puts a question in the prompt style a run was
trained with, keeps a thinking budget with the ids of training, or runs on a laptop's CPU.
"""

"""What a run hands over: artefacts that open in the plain libraries without medcot, and the proof that they are it.

``adapter``, ``merged``, ``nf4``, ``gguf`` and ``ollama`` each write one kind, whose name and place ``kinds`` knows;
``places`` gives them a disk that never holds half of one; ``equality`` reads an artefact back with the library that
will use it and compares it with the tuned model; ``commands`` says how to serve it. The job that joins them is
``exporting.py``.

Nothing is imported here: training does not wait for a GGUF writer, nor a misspelt kind for PyTorch.
"""

"""What a run hands over: artefacts that open in the plain libraries without medcot, and the proof that they are it.

``adapter``, ``merged``, ``nf4``, ``gguf`` and ``ollama`` each write one kind; ``places`` gives them a disk that never
holds half of one; ``equality`` reads an artefact back with the library that will use it and compares it with the tuned
model; ``commands`` says how to serve it. The job that joins them is ``exporting.py``.

Only what ``medcot run`` itself saves is named here; the others are imported where they are used, so that training does
not wait for a GGUF writer.
"""

from medcot.export.adapter import ADAPTER_FILES, estimate_adapter_bytes, save_adapter
from medcot.export.merged import Merged, estimate_merged_bytes, save_merged
from medcot.export.places import check_free_space

__all__ = [
    "ADAPTER_FILES",
    "Merged",
    "check_free_space",
    "estimate_adapter_bytes",
    "estimate_merged_bytes",
    "save_adapter",
    "save_merged",
]

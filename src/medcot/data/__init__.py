"""Training data: from a file or a Hub id to examples (``sources``, ``columns``) and on to checked rows (``checks``)."""

"""The algorithms, each one text; `requests` is the vocabulary they are written in, `registry` finds them by name."""

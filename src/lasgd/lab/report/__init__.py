"""The report of a comparison: one HTML page that needs nothing else, and the same tables as Markdown.

Reading order: source.py reads folders, tables.py and words.py say what is in them, charts.py and strips.py draw it,
write.py puts the page together. matplotlib and Jinja2 are imported only by who draws and renders.
"""

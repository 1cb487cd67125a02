"""Comparing algorithms: entries x conditions x seeds, each a real run in a child process, one after another.

Reading order: entry.py says what is compared, plan.py which runs that makes and where they lie, engine.py runs them,
child.py is one run, figures.py what a run folder says, results.py what results.json says of all.

Other runners than `lasgd train` join with an `Entry` that has a `command` of their own: see entry.py.
"""

"""The stages of `python -m benchmarks.gpu`, in the order of what they decide.

A measuring stage is a module with two functions. `measurements(dry)` yields (name, work) pairs; work() returns the results of
one row. `decide(stage)` turns the rows on file into the stage's decision, so a stage that was killed decides from what it had.
suites.py holds the stages that run pytest or the tile sweep, and the table of all stages.
"""

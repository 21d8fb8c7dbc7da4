"""Evaluation: benchmarks, KL and size of a model, as per-item records and a summary with intervals.

task.py says what a benchmark is, records.py how results are kept, runner.py runs and resumes,
engine.py asks the model in batches, data.py finds and verifies the questions. One file per
benchmark beside them. Scorers are pure functions: they import neither MLX nor files.
"""

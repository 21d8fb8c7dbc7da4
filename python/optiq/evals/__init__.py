"""Evaluation: benchmarks, KL and size of a model, as per-item records and a summary with intervals.

task.py says what a benchmark is, records.py how results are kept, data.py finds and verifies the
questions, prepare.py makes the benchmarks of tasks/, engine.py asks the model in batches, runner.py
runs and resumes. metrics.py, summary.py and comparison.py make figures of the records. Scorers are
pure functions: they import neither MLX nor files.
"""

"""Measurements behind the numbers in README; each prints a table and stores it under benchmarks/results/."""

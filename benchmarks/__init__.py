"""Benchmarks; imported by nothing."""

"""Benchmarks: what they ask, how they read answers, what comes out, and how sure that is."""

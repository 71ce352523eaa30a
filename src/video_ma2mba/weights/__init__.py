"""Weights in and out: other formats into ours, ours to the Hub."""

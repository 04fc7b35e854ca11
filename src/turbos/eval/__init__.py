"""Measuring what a model can do, and showing it."""

"""The fused CPU decode step: one token for each of a few sequences, compiled by numba, beside its parity test."""

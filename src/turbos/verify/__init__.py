"""The parity certificate: the same numbers however a model is called, saved, or loaded elsewhere."""

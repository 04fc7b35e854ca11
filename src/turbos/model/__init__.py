"""One hybrid language model for every use: its configuration, sublayers, state, files and plain generation loop."""

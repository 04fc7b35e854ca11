"""Floor 6: the one command, `turbos`, with a verb for each stage."""

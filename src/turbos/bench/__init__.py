"""Floor 5: measurements against peers, and the tables that show results."""

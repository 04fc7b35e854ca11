"""Floor 0: what every room may import - records, errors, recipes, metrics, the machine."""

"""The engine: many answers at once over one pool of states, cheap at any length. It never imports `train`."""

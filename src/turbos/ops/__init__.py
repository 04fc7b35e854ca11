"""Pure functions over packed tokens: a slow truth, a chunked form and a one-step form of each, alike in meaning."""

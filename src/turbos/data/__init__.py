"""Sources of text, shards, packing, the stateless loader, and problems whose answers a program checks."""

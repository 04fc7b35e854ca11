"""Conversations that a server keeps: in an index that survives a crash, with states that survive a restart."""

"""The tokenizer and the one renderer of chats."""

"""Curation: from raw documents to text worth training on, in stages whose every drop is counted and shown."""

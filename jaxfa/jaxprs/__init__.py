"""Traced programs: the audit that follows errors through them, a walk that finds contractions, what depends on what."""

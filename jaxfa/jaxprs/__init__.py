"""Traced programs: the audit that follows errors through them, a walk that finds contractions with weights, and what depends on what."""

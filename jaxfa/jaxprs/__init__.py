"""Traced programs: the audit that follows errors through them, and a walk that finds contractions with weights."""

"""Plain networks that know nothing of jaxfa."""

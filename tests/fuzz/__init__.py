"""A randomised search over the whole argument space of the public functions; see __main__.py."""

"""Loader plug-ins for other libraries. Each registers itself when it is imported, so this package imports none."""

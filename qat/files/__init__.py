"""The files of an export: shards and their alignment, the manifest, the evidence, the directory that appears whole.

Nothing here knows a format's keys or a model library.
"""

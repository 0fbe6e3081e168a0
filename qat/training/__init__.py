"""Training with Lightning: the callback for a module that a user already has, and a generic module.

Names are imported from the files, so that a configuration with a schedule loads no Lightning.
"""

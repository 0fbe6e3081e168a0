"""Training with Lightning: the callback for a module that a user already has, and a generic module.

Lightning trains, shards and resumes; here it is only decided *when* quantization happens. Nothing before it knows
Lightning, so a plain loop needs none of it. Names are imported from the files, so that a configuration with a schedule
loads no Lightning.
"""

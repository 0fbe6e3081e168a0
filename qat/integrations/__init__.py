"""Loader plug-ins for other libraries; nothing here is imported unless it is asked for by its full name.

``import qat.integrations.transformers`` teaches ``from_pretrained`` to read directories that qat exported for the
target ``transformers``. Each plug-in registers itself when it is imported, so this package imports none of them.
"""

"""Target ``quanto``: optimum-quanto's own directory and ``requantize``. Every module has its own type in the map."""

from qat.targets.base import Target

__all__ = ["QUANTO"]

QUANTO = Target("quanto")

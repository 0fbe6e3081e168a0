"""The hosts: one file each, one entry each in `HOSTS`; and the targets, pairs of a format and a host, in `TARGETS`."""

from __future__ import annotations

from qat.hosts.base import Host
from qat.hosts.targets import HOSTS, MODULE, TARGETS, Rules, Target, get_target, host_of, inner_models

__all__ = ["HOSTS", "MODULE", "TARGETS", "Host", "Rules", "Target", "get_target", "host_of", "inner_models"]

"""Noise and targets of diffusion training, by a pipeline's own scheduler.

The scheduler knows how much noise a timestep means and what the model is asked for; both are taken from it. Flow
matching (``scale_noise``, or the prediction type ``flow_prediction``) asks for noise minus sample, the direction from
the one to the other; the other types for the noise, the sample, or the velocity of the scheduler's own definition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recipes.data import DataError

__all__ = ["NoiseSchedule", "stratified"]

# What only spaces the steps of sampling; training wants every timestep.
_TRAINING = {
    "timestep_spacing": "linspace",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
}


class NoiseSchedule:
    """The training timesteps of a scheduler: noised samples and targets at any of them.

    Args:
        scheduler: a pipeline's; it is left as it is, and a fresh one is made from its configuration.

    Attributes:
        timesteps: (steps,), from the least noise to the most.

    Raises:
        DataError: the scheduler adds noise in a way that is not understood.
    """

    def __init__(self, scheduler: Any) -> None:
        name = type(scheduler).__name__
        config = dict(scheduler.config)
        self._flows = hasattr(scheduler, "scale_noise")
        if config.get("invert_sigmas") or not (self._flows or hasattr(scheduler, "add_noise")):
            raise DataError(f"model: {name} adds noise in no known way: give a pipeline with another scheduler")
        if self._flows:  # dynamic shifting is left to sampling, as in the training of the models that use it
            self._scheduler = type(scheduler).from_config(config)
        else:
            changed = {key: value for key, value in _TRAINING.items() if key in config}
            self._scheduler = type(scheduler).from_config(config, **changed)
            if hasattr(self._scheduler, "sigmas"):  # until it is told, its sigmas run against its timesteps
                self._scheduler.set_timesteps(len(self._scheduler.timesteps))
            if float(self._scheduler.init_noise_sigma) != 1.0:
                raise DataError(
                    f"model: {name} scales what the model sees, which is not supported: give the pipeline a scheduler "
                    "of the same configuration that does not (such as DDIM)"
                )
        self.prediction = "flow_prediction" if self._flows else str(config.get("prediction_type", "epsilon"))
        if self.prediction not in ("flow_prediction", "epsilon", "v_prediction", "sample"):
            raise DataError(f"model: {name} has the unknown prediction_type {self.prediction!r}")
        self.timesteps: Tensor = self._scheduler.timesteps.flip(0)

    def noised(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mix a sample with noise.

        Args:
            sample: (batch, ...), float.
            noise: the same shape.
            timesteps: (batch,), some of `timesteps`.
        """
        if self._flows:
            result: Tensor = self._scheduler.scale_noise(sample, timesteps, noise)
        else:
            result = self._scheduler.add_noise(sample, noise, timesteps)
        return result

    def target(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is asked for; arguments as in `noised`."""
        if self.prediction == "flow_prediction":
            return noise - sample
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return sample
        if hasattr(self._scheduler, "get_velocity"):
            velocity: Tensor = self._scheduler.get_velocity(sample, noise, timesteps)
            return velocity
        # alpha * noise - sigma * sample, where add_noise(a, b) is alpha * a + sigma * b
        return self.noised(noise, -sample, timesteps)


def stratified(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw numbers from [0, 1), one from each of ``count`` equal parts, in random order.

    Args:
        count: how many.
        generator: None: torch's global random numbers.

    >>> sorted((stratified(4) * 4).int().tolist())
    [0, 1, 2, 3]
    """
    parts = torch.randperm(count, generator=generator)
    drawn = (parts + torch.rand(count, generator=generator)) / count
    return drawn.clamp(max=1 - 2**-24)  # the sum may round up to the next part, the last one up to 1

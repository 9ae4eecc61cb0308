"""What torchattacks' ``Attack`` offers an attack, for where torchattacks is not installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from twins_fast.nn.modes import in_mode


class Attack:
    """Targets, normalisation and the call of an attack, by the names that torchattacks 3.5.1 has for them."""

    def __init__(self, name: str, model: nn.Module):
        self.attack = name
        self.set_model(model)
        self.device: torch.device | str | None = next((p.device for p in model.parameters()), None)
        self.attack_mode = "default"
        self.supported_mode = ["default"]
        self.targeted = False
        self.normalization_used: dict[str, Tensor] | None = None
        self._normalization_applied: bool | None = None
        self._target_map_function: Callable[[Tensor, Tensor | None], Tensor] | None = None
        self._model_training = self._batchnorm_training = self._dropout_training = False
        if type(model).__name__ == "RobModel":  # of MAIR
            mean, std = (getattr(model, name, None) for name in ("mean", "std"))
            if mean is not None and std is not None and ((mean != 0).all() or (std != 1).all()):
                self.set_normalization_used(mean.tolist(), std.tolist())

    def set_model(self, model: nn.Module) -> None:
        self.model = model
        self.model_name = type(model).__name__

    def set_device(self, device: torch.device | str) -> None:
        self.device = device

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """The network takes (images - mean) / std, C numbers each, and so does the attack."""
        numbers = {"mean": mean, "std": std}
        self.normalization_used = {name: torch.tensor(value).reshape(1, -1, 1, 1) for name, value in numbers.items()}
        self._normalization_applied = True

    def normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._normalisation(inputs)
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        mean, std = self._normalisation(inputs)
        return inputs * std + mean

    def _normalisation(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        assert self.normalization_used is not None
        return self.normalization_used["mean"].to(inputs.device), self.normalization_used["std"].to(inputs.device)

    def get_mode(self) -> str:
        return self.attack_mode

    def set_mode_default(self) -> None:
        self.attack_mode, self.targeted = "default", False

    def set_mode_targeted_by_function(self, target_map_function: Callable[..., Tensor], quiet: bool = False) -> None:
        """Targets are ``target_map_function(images, labels)``."""
        self._set_targeted("targeted(custom)", target_map_function)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Targets are other classes, by chance."""
        self._set_targeted("targeted(random)", self.get_random_target_label)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Targets are the other classes with the k-th smallest logit."""
        if kth_min < 1:
            raise ValueError(f"kth_min must be at least 1, got {kth_min}")
        self._kth_min = kth_min
        self._set_targeted("targeted(least-likely)", self.get_least_likely_label)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """The labels of a call are its targets."""
        self._set_targeted("targeted(label)", lambda images, labels: labels)

    def _set_targeted(self, mode: str, function: Callable[..., Tensor]) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError("Targeted mode is not supported.")
        self.attack_mode, self.targeted, self._target_map_function = mode, True, function

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        self._model_training, self._batchnorm_training = model_training, batchnorm_training
        self._dropout_training = dropout_training

    def get_logits(self, inputs: Tensor) -> Tensor:
        return self.model(self.normalize(inputs) if self._normalization_applied is False else inputs)

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        with in_mode(self.model, training=False):
            return self.get_logits(inputs)

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        assert self._target_map_function is not None
        return self._target_map_function(inputs, labels)

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        others = self._others(inputs, labels)
        chosen = [(others.shape[1] * torch.rand([1])).long() for _ in others]  # one by one, as torchattacks draws them
        return others.gather(1, torch.stack(chosen).to(others.device))[:, 0]

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        others = self._others(inputs, labels)
        logits = self.get_output_with_eval_nograd(inputs).gather(1, others)
        return others.gather(1, logits.kthvalue(self._kth_min, 1, keepdim=True).indices)[:, 0]

    def _others(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """All classes but the label, [N, classes - 1]."""
        logits = self.get_output_with_eval_nograd(inputs)
        labels = logits.argmax(1) if labels is None else labels
        classes = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        return classes[classes != labels[:, None]].view(len(logits), -1)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def __call__(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial images like ``inputs`` [N, C, H, W], normalised if those are."""
        if self._normalization_applied is not True:
            return self.forward(inputs, labels)
        self._normalization_applied = False
        try:
            return self.normalize(self.forward(self.inverse_normalize(inputs), labels))
        finally:
            self._normalization_applied = True

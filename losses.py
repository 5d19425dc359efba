"""Training criteria as engine.py calls them: criterion(samples, outputs, targets) -> loss."""

from collections.abc import Callable

from torch import Tensor, nn


class ImageLoss(nn.Module):
    """Apply a loss of (outputs, targets), in float32 whatever the model ran in; the images are not needed."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, samples: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs.float(), targets)

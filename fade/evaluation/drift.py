"""Distance between two models' images of the same prompts and seeds, in pixels.

Accuracies saturate: a model may still be judged right while it draws everything differently. Drift of the retained
prompts is the finer measure of collateral change; it needs no judge and no network.
"""

from torch import Tensor


def rms_difference(images: Tensor, others: Tensor) -> float:
    """Root mean square difference over all images, channels and pixels, in the units of the pixels ([0, 1] here).

    Both are float tensors [n, 3, H, W], image i of the one paired with image i of the other. Raises ValueError for
    tensors of different shape and for none at all.
    """
    if images.shape != others.shape:
        raise ValueError(f"images to compare have shapes {tuple(images.shape)} and {tuple(others.shape)}")
    if images.numel() == 0:
        raise ValueError("there are no images to compare")
    return (images.double() - others.double()).square().mean().sqrt().item()

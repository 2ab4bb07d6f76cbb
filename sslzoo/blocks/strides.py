"""Where a CPU's bfloat16 convolutions cannot be trusted."""

from collections.abc import Callable

from torch import Tensor, nn


def one_pixel_strides(module: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Names of the convolutions of ``module`` that ``forward`` gives a map one pixel wide or high, and that have a
    stride.

    Most of their kernel then sees padding alone. On CPUs torch 2.14 leaves the gradient of that part unset in bfloat16,
    so that it is whatever the memory held before (measured here; pytorch/pytorch#169688 has another such case).
    """
    found: list[str] = []

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, inputs: found.append(name) if min(inputs[0].shape[-2:]) == 1 else None

    strided = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Conv2d) and max(part.stride) > 1 and max(part.kernel_size) > 1
    }
    handles = [part.register_forward_pre_hook(note(name)) for name, part in strided.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found

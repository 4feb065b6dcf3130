"""HostCopy: an asynchronous copy of device tensors to the host."""

import torch


class HostCopy:
    """Host copies of tensors of one device, readable once `arrived`; the originals may change meanwhile."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._ended: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            buffers = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
            self.tensors = [
                buffer.copy_(tensor, non_blocking=True) for buffer, tensor in zip(buffers, tensors, strict=True)
            ]
            self._ended = torch.cuda.Event()
            self._ended.record()
        else:
            self.tensors = [tensor.clone() for tensor in tensors]

    def wait(self) -> None:
        """Blocks until `tensors` can be read."""
        if self._ended is not None:
            self._ended.synchronize()

    @property
    def arrived(self) -> bool:
        """Whether `tensors` can be read; always true on the CPU."""
        return self._ended is None or self._ended.query()

"""Page-locked host memory: what a GPU copies from at full speed, and reads in place."""

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)

USES_HOST_POINTER = 91
"""`CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM` of the CUDA driver's interface."""


def page_lock(memory: torch.Tensor) -> bool:
    """Page-locks host memory that exists, for the current CUDA device; returns whether that worked.

    PyTorch's own page-locked memory comes in powers of two: twice the memory, for a store of unlucky size.

    Args:
        memory: contiguous, page-aligned at its start; to be given to `page_unlock` before it is freed.
    """
    if torch.cuda.get_device_properties(torch.cuda.current_device()).is_integrated:
        logger.warning("the GPU shares the host's memory: experts are not page-locked, and copied through a buffer")
        return False
    error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * memory.element_size(), 0)
    if int(error):
        _forget_error()
        logger.warning(
            "%.2f GiB of experts cannot be page-locked (CUDA error %d): they are copied through a buffer, which is "
            "slower; raise the limit of locked memory (ulimit -l)",
            memory.numel() * memory.element_size() / (1 << 30), int(error),
        )  # fmt: skip
        return False
    return True


def _forget_error() -> None:
    """CUDA reports a failed call once more with the next kernel: to whoever launches it, unless that is here."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        logger.debug("the failure has been reported twice")


def page_unlock(memory: torch.Tensor) -> None:
    """Undoes `page_lock`."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def readable_in_place() -> bool:
    """Whether kernels of the current CUDA device may use the host's addresses of page-locked memory."""
    value = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    error = driver.cuDeviceGetAttribute(ctypes.byref(value), USES_HOST_POINTER, torch.cuda.current_device())
    return error == 0 and bool(value.value)

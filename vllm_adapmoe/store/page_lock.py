"""Page-locked host memory: what a GPU copies from at full speed, and reads in place."""

import ctypes
import logging
import platform

import torch

logger = logging.getLogger(__name__)

USES_HOST_POINTER = 91
"""`CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM` of the CUDA driver's interface."""


OUT_OF_MEMORY, ALREADY_REGISTERED, NOT_SUPPORTED = 2, 712, 801
"""`cudaError_t`, of those that `cudaHostRegister` answers with."""


def page_lock_refusal(memory: torch.Tensor) -> str | None:
    """Page-locks host memory that exists, for the current CUDA device; returns why that did not work, None: it did.

    PyTorch's own page-locked memory comes in powers of two: twice the memory, for a store of unlucky size.

    Args:
        memory: contiguous, page-aligned at its start; to be given to `page_unlock` before it is freed.
    """
    if torch.cuda.get_device_properties(torch.cuda.current_device()).is_integrated:
        return "the GPU shares the host's memory"
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * memory.element_size(), 0))
    if not error:
        return None
    _forget_error()
    reason, remedy = refusal(error)
    return f"{reason} (CUDA error {error}); {remedy}"


def refusal(error: int) -> tuple[str, str]:
    """What a CUDA error says about memory that cannot be page-locked, and what helps.

    The limit of locked memory (`ulimit -l`) has no part in it: that is counted for `mlock`, and not for pages that
    NVIDIA's driver pins (`os_lock_user_pages` in kernel-open/nvidia/os-mlock.c of its open kernel modules).
    """
    if error == OUT_OF_MEMORY and _is_wsl():
        # "CUDA on WSL User Guide", known limitations: pinned system memory is limited. Its users report half of the
        # machine's memory at best, and 0.5 to 1 GiB in containers of Docker Desktop (microsoft/WSL issue 14078).
        return (
            "Windows limits what WSL may lock, to half of the machine's memory or less",
            "run outside Docker Desktop or on Linux itself, or set store=file",
        )
    return {
        OUT_OF_MEMORY: (
            "the driver has not enough memory of the host, or of the GPU, to lock and map it",
            "free some of both, or set store=file",
        ),
        ALREADY_REGISTERED: (
            "something else in this process has locked it before",
            "remove the library that locks memory which it does not own",
        ),
        NOT_SUPPORTED: (
            "this machine does not support it, as GPUs in confidential mode do not",
            "use a machine that does, or set store=file",
        ),
    }.get(error, ("the driver could not lock it", "`dmesg | grep NVRM` may say why; or set store=file"))


def _is_wsl() -> bool:
    return "microsoft" in platform.uname().release.lower()


def _forget_error() -> None:
    """CUDA reports a failed call once more with the next kernel: to whoever launches it, unless that is here."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        logger.debug("the failure has been reported twice")


def page_unlock(memory: torch.Tensor) -> None:
    """Undoes `page_lock_refusal`."""
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

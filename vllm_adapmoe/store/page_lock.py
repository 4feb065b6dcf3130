"""Page-locked host memory, which a GPU can copy from at full speed, and whose kernels can read it."""

import ctypes
import logging
import platform

import torch

logger = logging.getLogger(__name__)

USES_HOST_POINTER = 91
"""`CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM` of the CUDA driver API."""


OUT_OF_MEMORY, ALREADY_REGISTERED, NOT_SUPPORTED = 2, 712, 801
"""`cudaError_t` values returned by `cudaHostRegister`."""


def page_lock_refusal(memory: torch.Tensor) -> str | None:
    """Page-locks existing host memory for the current CUDA device; returns the reason if that fails, else None.

    PyTorch's own page-locked memory is rounded up to powers of two, which can double the size of a store.

    Args:
        memory: contiguous, with a page-aligned start; call `page_unlock` before it is freed.
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
    """Returns the reason and the remedy for a CUDA error of page-locking.

    The locked-memory limit (`ulimit -l`) is irrelevant: it applies to `mlock`, not to pages that NVIDIA's driver pins
    (`os_lock_user_pages` in kernel-open/nvidia/os-mlock.c of its open kernel modules).
    """
    if error == OUT_OF_MEMORY and _is_wsl():
        # "CUDA on WSL User Guide", known limitations: pinned system memory is limited. Users report half of the
        # machine's memory at best, and 0.5 to 1 GiB in containers of Docker Desktop (microsoft/WSL issue 14078).
        return (
            "Windows limits what WSL may lock, to half of the machine's memory or less",
            "run outside Docker Desktop or on Linux itself, or set store=file",
        )
    return {
        OUT_OF_MEMORY: (
            "the driver lacks host or GPU memory to lock and map it",
            "free some of both, or set store=file",
        ),
        ALREADY_REGISTERED: (
            "another library in this process has locked it already",
            "remove that library",
        ),
        NOT_SUPPORTED: (
            "this machine does not support page-locking (nor do GPUs in confidential mode)",
            "use another machine, or set store=file",
        ),
    }.get(error, ("the driver refused", "`dmesg | grep NVRM` may say why; or set store=file"))


def _is_wsl() -> bool:
    return "microsoft" in platform.uname().release.lower()


def _forget_error() -> None:
    """Clears CUDA's last error by launching a kernel, which would otherwise be reported by the next kernel launch."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError:
        logger.debug("the failure has been reported twice")


def page_unlock(memory: torch.Tensor) -> None:
    """Unlocks memory that `page_lock_refusal` has page-locked."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def kernels_read_page_locked() -> bool:
    """Returns whether kernels of the current CUDA device can use the host addresses of page-locked memory."""
    value = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    error = driver.cuDeviceGetAttribute(ctypes.byref(value), USES_HOST_POINTER, torch.cuda.current_device())
    return error == 0 and bool(value.value)

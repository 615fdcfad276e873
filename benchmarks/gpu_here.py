"""The CUDA device of this machine, by the driver alone: prints its compute capability without the dot, e.g. 90.

Where there is none it ends with a sentence that says so.
"""

from __future__ import annotations

import ctypes
import sys

MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*"""
LEAST = 80


def capability() -> str:
    """Of device 0. Raises SystemExit where there is no driver, no device, or one that the kernels are not made for."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        sys.exit(f"this machine has no CUDA driver ({error}); the GPU's checks need a machine with a CUDA device")
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    code = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)
    for number, attribute in zip(numbers, (MAJOR, MINOR), strict=True):
        code = code or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if code:
        sys.exit(f"the CUDA driver finds no device (error {code}); the GPU's checks need a machine with a CUDA device")
    found = 10 * numbers[0].value + numbers[1].value
    if found < LEAST:
        sys.exit(f"the CUDA device is of compute capability {found / 10}; the kernels need {LEAST / 10} or newer")
    return str(found)


if __name__ == "__main__":
    print(capability())

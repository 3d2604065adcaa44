"""Print the machine's matrix-product peak in FLOP/s: the yardstick of the other benchmarks."""

import torch

from sfumato.receipts.probe import matmul_peak
from sfumato.runtime import pick_device

if __name__ == "__main__":
    device = pick_device()
    print(f"{device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"{str(dtype).removeprefix('torch.'):10} {matmul_peak(device, dtype) / 1e9:10.1f} GFLOP/s")

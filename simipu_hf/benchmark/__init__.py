"""What pre-training costs on this machine: the operations, a whole step, the data. Behind `simipu-hf benchmark`.

>>> print(benchmark_step(BenchmarkStepArguments(image_encoder="resnet18", image_size=(96, 320))))
"""

from .data import benchmark_data
from .measure import BenchmarkResult
from .ops import benchmark_ops
from .step import benchmark_step

__all__ = ["BenchmarkResult", "benchmark_data", "benchmark_ops", "benchmark_step"]

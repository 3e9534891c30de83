"""Feature fusion and self-distillation on CIFAR-100: a leader and its students.

    python experiments/cifar100_ffsd.py --data-dir DATA --depth 32

Li et al., "Distilling a Powerful Student Model via Online Knowledge
Distillation" (2021), with the recipe of its code: two common students, whose
fused maps teach a leader. "student_0" is the leader, which is shipped, a plain
network; "common_0" and "common_1" are the others; the "ensemble" of the report
is the fusion module's classifier.

    network       parameters   published (leader, best test epoch of three runs)
    ResNet-20        278,324   72.64 72.58 72.88
    ResNet-32        472,756   74.92 74.82 74.82
    ResNet-56        861,620   75.84 75.66 75.91
    WRN-16-2         704,420   75.87 75.86 75.69

300 epochs are hours on a GPU and days on a CPU; --quick takes minutes.
"""

from ekd_jax import cli
from ekd_jax.config import Config

if __name__ == "__main__":
  cli.main(
    Config(
      method="ffsd",
      dataset="cifar100",
      depth=32,
      initialization="he",
      epochs=300,
      crop_fill="reflect",
    ),
    "Trains a leader and its common students on CIFAR-100.",
  )

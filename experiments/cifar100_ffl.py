"""Feature fusion learning on CIFAR-100: networks and their fused features.

    python experiments/cifar100_ffl.py --data-dir DATA --depth 32

Kim, Hyun, Chung and Kwak, "Feature Fusion for Online Mutual Knowledge
Distillation" (ICPR 2020), with the recipe of its public code: two ResNets that
share all but their last stage. "student_0" and "student_1" can be shipped; the
"ensemble" of the report is the fused classifier, which needs both.

    network      one of them   together   published (mean of the two)
    ResNet-32        472,756    832,920   72.18 +- 0.11
    ResNet-110     1,736,564  3,058,520   77.22 +- 0.41

(as other authors measured and reported them, in "Peer Collaborative Learning
for Online Knowledge Distillation", AAAI 2021). Networks of different kinds
share nothing:

    ... --partners wide_resnet:16-2

300 epochs are hours on a GPU and days on a CPU; --quick takes minutes.
"""

from ekd_jax import cli
from ekd_jax.config import Config

if __name__ == "__main__":
  cli.main(
    Config(
      method="ffl",
      dataset="cifar100",
      depth=32,
      initialization="he",
      epochs=300,
      crop_fill="reflect",
    ),
    "Trains two networks and a classifier of their fused maps on CIFAR-100.",
  )

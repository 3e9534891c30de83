"""Peer collaborative learning on CIFAR-100: three peers, two kinds of teachers.

    python experiments/cifar100_pcl.py --data-dir DATA --depth 32

Wu and Gong, "Peer Collaborative Learning for Online Knowledge Distillation"
(AAAI 2021): three ResNets that share all but their last stage, each shown a
view of its own of every image. "student_0" is the running mean of the first
peer, which is shipped; "peer_0" is that peer itself; the "ensemble" of the
report classifies the features of all peers together.

    network      one of them    together   published
    ResNet-32        472,756   1,212,384   74.14 +- 0.16
    ResNet-110 *   1,170,868   3,038,944   79.98 +- 0.55
    VGG-16        15,299,748  30,771,664   76.89 +- 0.25

(* of bottleneck blocks: --network bottleneck_resnet --variant 110). The paper
reports the first peer of several runs. Its public code, by others, has next to
no distillation before epoch 81: --ramp-up as_coded.

300 epochs are hours on a GPU and days on a CPU; --quick takes minutes.
"""

from ekd_jax import cli
from ekd_jax.config import Config

if __name__ == "__main__":
  cli.main(
    Config(
      method="pcl",
      dataset="cifar100",
      depth=32,
      initialization="he",
      epochs=300,
      weight_decay=5e-4,
    ),
    "Trains three peers and their two kinds of teachers on CIFAR-100.",
  )
